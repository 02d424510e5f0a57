"""`/v1/completions`: prompts as texts or tokens, one or many, with echo and log-probabilities of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from inferloom.runtime.leases import Outcome
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.server.api.common import DONE, event, new_id, room, usage
from inferloom.runtime.server.api.fields import MAX_PROMPTS, MAX_SEQUENCES, Sampled, Token
from inferloom.runtime.server.api.wishes import Wish, wish
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.streams import merged
from inferloom.runtime.server.wire import Sample, Scored, Update

Tokens = Annotated[list[Token], Field(min_length=1)]


class CompletionBody(Sampled):
    refused: ClassVar[dict[str, tuple[Any, ...]]] = Sampled.refused | {"suffix": ("",), "prompt_embeds": ()}

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] | Annotated[
        list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=1024)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=1024)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool | None = True


@dataclass(slots=True)
class _Choice:
    """One continuation as it grows; `offset` counts characters for `logprobs.text_offset`."""

    tokens: int = 0
    offset: int = 0
    parts: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] | None = None
    reason: str | None = None
    stop: str | int | None = None
    echoed: bool = False


class Completions:
    """Answers completions."""

    def __init__(self, models: Models, max_logprobs: int) -> None:
        self._models, self._most = models, max_logprobs

    async def __call__(self, body: CompletionBody, call: Call) -> Answer:
        model = self._models.of(body.model, "generate")
        n = body.n or 1
        if body.best_of is not None and body.best_of != n:
            raise bad_request("best_of must be n: samples are not ranked", "best_of")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(body, name) or 0) > self._most:
                raise bad_request(f"{name} is at most {self._most} here: start with --max-logprobs for more", name)
        prompts = await self._prompts(model, body)
        if len(prompts) * n > MAX_SEQUENCES:
            raise bad_request(f"{len(prompts)} prompts with n={n} make more than {MAX_SEQUENCES} sequences", "n")
        if body.max_tokens == 0 and not body.echo:
            raise bad_request("max_tokens must be at least 1, or 0 with echo", "max_tokens")
        params = [self._params(model, body, prompt) for prompt in prompts]
        grammar, salt = body.grammar(), body.salted(call.salt)
        wanted = wish(model, salt, body.session_id, body.session_hold, body.hint(), prompts[0], n, len(prompts))
        model.engine.admit(len(prompts) * n)
        run = _Run(model, body, prompts, n, wanted)
        updates = merged([model.engine.stream(prompt, p, body.priority or 0, salt, grammar, wanted.session if wanted else None)
                          for prompt, p in zip(prompts, params, strict=True)])
        return run.stream(updates) if body.stream else await run.whole(updates)

    async def _prompts(self, model: Model, body: CompletionBody) -> list[list[int]]:
        given: Any = body.prompt
        many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        return list(await asyncio.gather(*(_tokens(model, p, body.add_special_tokens is not False) for p in many)))

    def _params(self, model: Model, body: CompletionBody, prompt: list[int]) -> SamplingParams:
        most = room(model, prompt, None if body.max_tokens is None else max(body.max_tokens, 1))
        of_prompt = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            of_prompt = max(body.logprobs, of_prompt or 0)
        return body.sampling(most, body.logprobs, of_prompt)


async def _tokens(model: Model, prompt: str | list[int], special: bool) -> list[int]:
    return await model.encode(prompt, special) if isinstance(prompt, str) else prompt


class _Run:
    """The choices of one request."""

    def __init__(self, model: Model, body: CompletionBody, prompts: list[list[int]], n: int, wanted: Wish | None) -> None:
        self._model, self._body, self._prompts, self._n, self._wish = model, body, prompts, n, wanted
        self._held: Outcome | None = None
        self._choices = [_Choice() for _ in range(len(prompts) * n)]
        self._of_prompt: list[list[list[Scored] | None] | None] = [None] * len(prompts)
        self._cached = [0] * len(prompts)
        self._head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()),
                      "model": model.name}

    async def whole(self, updates: AsyncIterator[tuple[int, Update]]) -> dict[str, Any]:
        async for at, update in updates:
            self._take_prompt(at, update)
            for sample in update.samples:
                choice, text, logprobs = self._take(at, sample)
                choice.parts.append(text)
                if logprobs is not None:
                    mine = choice.logprobs = choice.logprobs or {name: [] for name in logprobs}
                    for name, values in logprobs.items():
                        mine[name] += values
        made = []
        for i, choice in enumerate(self._choices):
            entry = self._entry(i, choice, "".join(choice.parts), choice.logprobs)
            if self._body.prompt_logprobs is not None:
                entry["prompt_logprobs"] = _as_maps(self._of_prompt[i // self._n], self._model)
            made.append(entry)
        return self._head | {"choices": made, "usage": self._usage()} | self._kept()

    async def stream(self, updates: AsyncIterator[tuple[int, Update]]) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        async for at, update in updates:
            self._take_prompt(at, update)
            for sample in update.samples:
                choice, text, logprobs = self._take(at, sample)
                if not text and not sample.tokens and sample.finish_reason is None:
                    continue
                chunk = self._head | {"choices": [self._entry(at * self._n + sample.index, choice, text, logprobs)]}
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = self._usage()
                if not at and not sample.index and sample.finish_reason is not None:  # what its session goes on from
                    chunk |= self._kept()
                yield event(chunk)
        if options is not None and options.include_usage:
            yield event(self._head | {"choices": [], "usage": self._usage()})
        yield DONE

    def _kept(self) -> dict[str, Any]:
        return {} if self._wish is None else self._wish.answer(self._held)

    def _take_prompt(self, at: int, update: Update) -> None:
        self._held = update.held or self._held
        if self._of_prompt[at] is None:
            self._of_prompt[at] = update.prompt_logprobs
        self._cached[at] = max(self._cached[at], update.cached)

    def _take(self, at: int, sample: Sample) -> tuple[_Choice, str, dict[str, list[Any]] | None]:
        """Add what is new; its text and log-probabilities, with the prompt's in front if they are to be echoed."""
        choice = self._choices[at * self._n + sample.index]
        text, logprobs = "", None
        if self._body.echo and not choice.echoed:
            choice.echoed = True
            prompt = self._prompts[at]
            text = self._body.prompt if isinstance(self._body.prompt, str) else self._echo(at)
            if self._body.logprobs is not None:
                logprobs = self._lists(choice, prompt, self._of_prompt[at] or [None] * len(prompt))
        if self._body.max_tokens != 0:
            choice.tokens += len(sample.tokens)
            text += sample.text
            if sample.logprobs is not None:
                more = self._lists(choice, sample.tokens, list(sample.logprobs))
                logprobs = more if logprobs is None else {k: logprobs[k] + more[k] for k in more}
        choice.reason, choice.stop = sample.finish_reason, sample.stop_reason
        if self._body.max_tokens == 0 and choice.reason is not None:
            choice.reason, choice.stop = "length", None
        return choice, text, logprobs

    def _echo(self, at: int) -> str:
        given: Any = self._body.prompt
        return given[at] if isinstance(given[0], str) else self._model.decode(self._prompts[at], False)

    def _lists(self, choice: _Choice, tokens: list[int], steps: list[list[Scored] | None]) -> dict[str, list[Any]]:
        """`logprobs` of a completion: lists of equal length."""
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, step in zip(tokens, steps, strict=True):
            made["tokens"].append(self._model.texts.text(token))
            made["text_offset"].append(choice.offset)
            choice.offset += len(made["tokens"][-1])
            if step is None:
                made["token_logprobs"].append(None)
                made["top_logprobs"].append(None)
                continue
            made["token_logprobs"].append(next(p for t, p, _ in step if t == token))
            best = sorted(step, key=lambda e: e[2])[:self._body.logprobs or 0]
            made["top_logprobs"].append({self._model.texts.text(t): p for t, p, _ in reversed(best)})
        return made

    def _entry(self, index: int, choice: _Choice, text: str, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason,
                "stop_reason": choice.stop}

    def _usage(self) -> dict[str, Any]:
        return usage(sum(map(len, self._prompts)), sum(c.tokens for c in self._choices), sum(self._cached))


def _as_maps(steps: list[list[Scored] | None] | None, model: Model) -> list[Any] | None:
    """Log-probabilities of a prompt as vLLM has them: for each token a map from token id."""
    if steps is None:
        return None
    return [None if step is None else {str(t): {"logprob": p, "rank": r, "decoded_token": model.texts.text(t)}
                                       for t, p, r in step} for step in steps]
