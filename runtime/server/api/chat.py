"""`/v1/chat/completions`: conversations with tools, thoughts, structured output."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from inferloom.runtime.leases import Outcome
from inferloom.runtime.server.api.common import DONE, chat_logprobs, event, new_id, usage
from inferloom.runtime.server.api.conversation import Conversation, Tools, begin
from inferloom.runtime.server.api.fields import Body, Name, Sampled
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.parsers.base import Arguments, CallStart, Parser, Piece, Text, Thought
from inferloom.runtime.server.wire import Update

MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 4096, 1024, 512
FunctionName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")]


class Part(Body):
    type: Name
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    name: FunctionName
    arguments: str = "{}"


class ToolCall(Body):
    id: Name = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedTool(Body):
    type: Literal["function"]
    function: CalledFunction


class ChatBody(Sampled):
    refused: ClassVar[dict[str, tuple[Any, ...]]] = Sampled.refused | {
        "functions": ([],), "function_call": ("none",), "audio": (), "modalities": (["text"],),
        "web_search_options": (), "add_generation_prompt": (True,), "continue_final_message": (False,),
        "documents": ([],), "mm_processor_kwargs": ({},), "echo": (False,), "best_of": (1,), "prompt_logprobs": ()}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=1024)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[Name, bool | Name | None] | None = None
    include_reasoning: bool | None = True


class Chats:
    """Answers chats."""

    def __init__(self, models: Models, max_logprobs: int) -> None:
        self._models, self._most = models, max_logprobs

    async def __call__(self, body: ChatBody, call: Call) -> Answer:
        model = self._models.of(body.model, "generate")
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs", "top_logprobs")
        if (body.top_logprobs or 0) > self._most:
            raise bad_request(f"top_logprobs is at most {self._most} here: start with --max-logprobs for more",
                              "top_logprobs")
        options = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            options.setdefault("reasoning_effort", body.reasoning_effort)
        choice = body.tool_choice
        tools = Tools([t.function.model_dump(exclude_none=True) for t in body.tools or ()],
                      choice if isinstance(choice, str) or choice is None else choice.function.name,
                      isinstance(choice, NamedTool), body.parallel_tool_calls is not False)
        conversation = await begin(
            model, [plain(m, i) for i, m in enumerate(body.messages)], tools, body.max_completion_tokens or body.max_tokens,
            body, call, body.grammar(), (body.top_logprobs or 0) if body.logprobs else None, options)
        run = _Run(model, body, conversation)
        return run.stream() if body.stream else await run.whole()


def plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates take it: text in one piece, arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type not in ("text", "refusal"):
                raise bad_request(f"messages.{index}: content of type {part.type!r} is not supported: this model reads "
                                  "text only", "messages")
        content = "".join(part.text or part.refusal or "" for part in content)
    if content is None and not message.tool_calls:
        raise bad_request(f"messages.{index}: content is missing", "messages")
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            made[name] = getattr(message, name)
    if message.tool_calls:
        calls = []
        for each in message.tool_calls:
            try:
                arguments = json.loads(each.function.arguments or "{}")
            except (ValueError, RecursionError):
                raise bad_request(f"messages.{index}: the arguments of {each.function.name} are not JSON",
                                  "messages") from None
            calls.append({"id": each.id, "type": "function",
                          "function": {"name": each.function.name, "arguments": arguments}})
        made["tool_calls"] = calls
    return made


class _Run:
    """The choices of one chat."""

    def __init__(self, model: Model, body: ChatBody, conversation: Conversation) -> None:
        self._model, self._body, self._talk = model, body, conversation
        n = body.n or 1
        self._parsers: list[Parser] = [conversation.parser() for _ in range(n)]
        self._called, self._made, self._cached = [False] * n, 0, 0
        self._held: Outcome | None = None
        self._head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model.name,
                      "system_fingerprint": None}

    async def whole(self) -> dict[str, Any]:
        choices = [_Whole() for _ in self._parsers]
        async for update in self._talk.updates:
            for sample in update.samples:
                choice = choices[sample.index]
                choice.add(self._pieces(sample.index, sample.text, sample.finish_reason is not None))
                if sample.logprobs is not None:
                    choice.logprobs += chat_logprobs(self._model, sample.tokens, sample.logprobs,
                                                     self._body.top_logprobs or 0)
                choice.reason, choice.stop = sample.finish_reason, sample.stop_reason
            self._count(update)
        return self._head | {"object": "chat.completion", "usage": self._usage(), "choices": [
            {"index": i, "message": c.message(self._body.include_reasoning is not False),
             "logprobs": {"content": c.logprobs, "refusal": None} if self._body.logprobs else None,
             "finish_reason": self._reason(i, c.reason), "stop_reason": c.stop} for i, c in enumerate(choices)]} | self._kept()

    async def stream(self) -> AsyncIterator[bytes]:
        options, opened = self._body.stream_options, set[int]()
        async for update in self._talk.updates:
            self._count(update)
            for sample in update.samples:
                if sample.index not in opened:
                    opened.add(sample.index)
                    yield self._chunk(sample.index, {"role": "assistant", "content": ""})
                deltas = [d for p in self._pieces(sample.index, sample.text, sample.finish_reason is not None)
                          if (d := self._delta(p)) is not None]
                logprobs = None if sample.logprobs is None else chat_logprobs(
                    self._model, sample.tokens, sample.logprobs, self._body.top_logprobs or 0)
                for delta in deltas or ([{}] if logprobs else []):
                    yield self._chunk(sample.index, delta, logprobs)
                    logprobs = None
                if sample.finish_reason is not None:
                    yield self._chunk(sample.index, {}, None, self._reason(sample.index, sample.finish_reason),
                                      sample.stop_reason)
        if options is not None and options.include_usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _pieces(self, index: int, text: str, last: bool) -> list[Piece]:
        parser = self._parsers[index]
        pieces = [*parser.feed(text), *(parser.finish() if last else ())]
        self._called[index] |= any(isinstance(p, CallStart) for p in pieces)
        return pieces

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        if isinstance(piece, Text):
            return {"content": piece.text}
        if isinstance(piece, Thought):
            if self._body.include_reasoning is False:
                return None
            return {"reasoning": piece.text, "reasoning_content": piece.text}
        if isinstance(piece, CallStart):
            return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function",
                                    "function": {"name": piece.name, "arguments": ""}}]}
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None,
               reason: str | None = None, stop: str | int | None = None) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason,
                                  "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None}}
        if reason is not None:
            choice["stop_reason"] = stop
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        if reason is not None and not index:  # the first sample is what its session goes on from
            chunk |= self._kept()
        options = self._body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        return event(chunk)

    def _reason(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._called[index] else reason

    def _count(self, update: Update) -> None:
        self._made += sum(len(s.tokens) for s in update.samples)
        self._cached = max(self._cached, update.cached)
        self._held = update.held or self._held

    def _kept(self) -> dict[str, Any]:
        return {} if self._talk.wish is None else self._talk.wish.answer(self._held)

    def _usage(self) -> dict[str, Any]:
        return usage(len(self._talk.prompt), self._made, self._cached)


class _Whole:
    """One choice, put together."""

    def __init__(self) -> None:
        self.text, self.thoughts = list[str](), list[str]()
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.reason: str | None = None
        self.stop: str | int | None = None

    def add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Text):
                self.text.append(piece.text)
            elif isinstance(piece, Thought):
                self.thoughts.append(piece.text)
            elif isinstance(piece, CallStart):
                self.calls.append({"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}})
            elif isinstance(piece, Arguments):
                self.calls[piece.index]["function"]["arguments"] += piece.text

    def message(self, reasoning: bool) -> dict[str, Any]:
        text, thoughts = "".join(self.text), "".join(self.thoughts)
        made: dict[str, Any] = {"role": "assistant", "content": text if text or not self.calls else None, "refusal": None}
        if self.calls:
            made["tool_calls"] = self.calls
        if thoughts and reasoning:
            made["reasoning"] = made["reasoning_content"] = thoughts
        return made
