"""`AsyncLLM`: `LLM` for asyncio. One thread runs the engine; requests come and go from any event loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

from inferloom.llm import LLM
from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.params import SamplingParams

__all__ = ["AsyncLLM"]

_Item = RequestOutput | BaseException


class AsyncLLM:
    """A model that answers many requests at once. Takes what `LLM` takes.

    The engine runs in a thread of its own, which alone touches it; methods hand it work and outputs come back to
    the event loop that asked. Close it, or use `async with`.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self._llm = LLM(model, **options)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Callable[[_Item], None]] = {}
        self._names = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="inferloom-engine", daemon=True)
        self._thread.start()

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None, *,
                       request_id: str | None = None, priority: int = 0) -> AsyncIterator[RequestOutput]:
        """Yield the request's outputs so far as it makes progress; the last one is `finished`.

        Leaving the loop early, or cancelling the task, aborts the request. RequestError when it cannot be served.
        """
        if self._closed:
            raise RequestError("this AsyncLLM is closed")
        name = f"async-{next(self._names)}" if request_id is None else request_id
        if name in self._listeners:
            raise RequestError(f"request id {name!r} is in use")
        tokens = self._llm.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text = prompt if isinstance(prompt, str) else None
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[_Item]()
        self._listeners[name] = lambda item: _deliver(loop, inbox, item)
        self._work.put(lambda: self._add(name, tokens, params or SamplingParams(), text, priority))
        finished = False
        try:
            while not finished:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            self._listeners.pop(name, None)
            if not finished:
                self._work.put(lambda: self._abort(name))

    async def abort(self, request_id: str) -> None:
        """End a request now; its stream then yields a last output with `finish_reason` "abort"."""
        self._work.put(lambda: self._abort(request_id))

    async def close(self) -> None:
        """Abort what runs, stop the thread, give memory back. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._work.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    # -- the engine's thread

    def _run(self) -> None:
        engine = self._llm.engine
        try:
            while True:
                while not engine.has_unfinished or not self._work.empty():
                    job = self._work.get()
                    if job is None:
                        return
                    job()
                for output in engine.step():
                    self._tell(output.request_id, output)
        except BaseException as error:  # a bug, or the device: nobody may wait for ever
            self._closed = True
            for name in list(self._listeners):
                self._tell(name, error)
        finally:
            for name in list(self._listeners):
                self._abort(name)
            self._llm.close()

    def _add(self, name: str, tokens: list[int], params: SamplingParams, text: str | None, priority: int) -> None:
        try:
            self._llm.engine.add_request(name, tokens, params, text, priority)
        except RequestError as error:
            self._tell(name, error)

    def _abort(self, name: str) -> None:
        output = self._llm.engine.abort(name)
        self._tell(name, output if output is not None else RequestError(f"request {name!r} has ended"))

    def _tell(self, name: str, item: _Item) -> None:
        listener = self._listeners.get(name)
        if listener is not None:
            listener(item)


def _deliver(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[_Item], item: _Item) -> None:
    try:
        loop.call_soon_threadsafe(inbox.put_nowait, item)
    except RuntimeError:
        pass  # the loop has been closed: nobody listens any more
