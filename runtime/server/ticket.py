"""What waits for one request's news, and bounds how much of it piles up."""

from __future__ import annotations

import asyncio
import time

from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.wire import Sample, Update

#: Tokens and scored tokens that may wait for a reader.
MAX_PENDING = 1 << 16


class Ticket:
    """A request that the engine has, as its reader sees it. Times are `time.monotonic` seconds.

    News that came while the reader was busy are put together; when too much waits, `put` says so.
    """

    def __init__(self, number: int, samples: int, prompt_tokens: int) -> None:
        self.id, self.samples, self.prompt_tokens = number, samples, prompt_tokens
        self.created, self.first, self.last = time.monotonic(), 0.0, 0.0
        self.generated, self.queued, self.finished = 0, 0.0, False
        self._news: list[Update] = []
        self._pending = 0
        self._error: HttpError | None = None
        self._ready = asyncio.Event()

    def put(self, update: Update) -> bool:
        """Add news; False when too much waits."""
        self._news.append(update)
        self.last = time.monotonic()
        self.first = self.first or self.last
        new = sum(len(s.tokens) for s in update.samples)
        scored = sum(len(p) for s in update.samples for p in s.logprobs or ())
        self._pending += new + scored
        self.generated += new
        self.queued = update.queued
        self.finished = update.finished
        self._ready.set()
        return self._pending <= MAX_PENDING

    def fail(self, error: HttpError) -> None:
        """No more news will come, for this reason."""
        self._error, self.finished = error, True
        self._ready.set()

    async def next(self) -> Update:
        """All that is new. HttpError when the request failed."""
        while not self._news:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        news, self._news, self._pending = self._news, [], 0
        return news[0] if len(news) == 1 else _together(news)


def _together(news: list[Update]) -> Update:
    samples: dict[int, list[Sample]] = {}
    for update in news:
        for sample in update.samples:
            samples.setdefault(sample.index, []).append(sample)
    last = news[-1]
    prompt = next((u.prompt_logprobs for u in news if u.prompt_logprobs is not None), None)
    return Update(last.id, [_joined(parts) for parts in samples.values()], last.cached, last.finished, last.error,
                  last.own_fault, last.queued, prompt, last.held, last.embedding)


def _joined(parts: list[Sample]) -> Sample:
    if len(parts) == 1:
        return parts[0]
    logprobs = None if parts[0].logprobs is None else [p for part in parts for p in part.logprobs or ()]
    return Sample(parts[0].index, "".join(p.text for p in parts), [t for p in parts for t in p.tokens], logprobs,
                  parts[-1].finish_reason, parts[-1].stop_reason)
