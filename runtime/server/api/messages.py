"""`/v1/messages` and `/v1/messages/count_tokens`: the same conversations as Anthropic's clients have them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from inferloom.runtime.leases import Outcome
from inferloom.runtime.server.api.chat import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, FunctionName
from inferloom.runtime.server.api.common import event, new_id
from inferloom.runtime.server.api.conversation import Conversation, Tools, begin
from inferloom.runtime.server.api.fields import Body, Name, Remembered, Sampled, Stop, json_schema
from inferloom.runtime.server.api.wishes import anthropic_hint
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.parsers.base import CallStart, Piece, Text, Thought
from inferloom.runtime.server.wire import Sample, Update


class Block(Body):
    """A part of a message: text, tool_use, tool_result, thinking."""

    type: Name
    text: str | None = None
    thinking: str | None = None
    id: Name | None = None
    name: FunctionName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: str | Annotated[list[Block], Field(max_length=MAX_PARTS)] | None = None
    cache_control: Any = None
    is_error: bool | None = None


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=MAX_PARTS)]


class MessageTool(Body):
    name: FunctionName
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Any = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: OutputFormat | None = None


class Asked(Body):
    """What counting and answering have in common."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"mcp_servers": ([],), "container": ()}

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[Block], Field(max_length=MAX_PARTS)] | None = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Any = None


class MessageBody(Asked, Remembered):
    metadata: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


class Messages:
    """Answers and counts."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, body: MessageBody, call: Call) -> Answer:
        model = self._models.of(body.model, "generate")
        form = body.output_format or (body.output_config.format if body.output_config else None)
        sampled = Sampled(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stop_sequences,
                          session_id=body.session_id, session_hold=body.session_hold)
        talk = await begin(model, _plain(body), _tools(body), body.max_tokens, sampled, call,
                           None if form is None else json_schema(form.schema_), None, _options(body),
                           anthropic_hint(list(_marks(body)), (body.metadata or {}).get("user_id")))
        run = _Run(model, talk)
        return run.stream() if body.stream else await run.whole()

    async def count(self, body: Asked, call: Call) -> Answer:
        model = self._models[body.model]
        tools = _tools(body)
        tools.check()
        _, prompt = await model.chat(_plain(body), tools.shown, **_options(body))
        return {"input_tokens": len(prompt)}


def _marks(body: Asked) -> Iterator[Any]:
    """What stands as `cache_control` anywhere in a request."""
    yield body.cache_control
    yield from (tool.cache_control for tool in body.tools or ())
    waiting: list[str | list[Block] | None] = [body.system, *(turn.content for turn in body.messages)]
    while waiting:
        for block in (b for b in waiting.pop() or () if isinstance(b, Block)):
            yield block.cache_control
            waiting.append(block.content)


def _options(body: Asked) -> dict[str, Any]:
    return {} if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}


def _tools(body: Asked) -> Tools:
    functions = [{"name": t.name, "description": t.description or "", "parameters": t.input_schema}
                 for t in body.tools or ()]
    choice = body.tool_choice
    if choice is None:
        return Tools(functions)
    if choice.type == "tool" and choice.name is None:
        raise bad_request("tool_choice.name is missing", "tool_choice")
    wanted = {"auto": "auto", "any": "required", "none": "none", "tool": choice.name}[choice.type]
    return Tools(functions, wanted, choice.type == "tool", not choice.disable_parallel_tool_use)


def _plain(body: Asked) -> list[dict[str, Any]]:
    """The conversation as chat templates take it."""
    made: list[dict[str, Any]] = []
    if body.system:
        made.append({"role": "system", "content": _text(body.system, "system")})
    for i, turn in enumerate(body.messages):
        where = f"messages.{i}"
        if isinstance(turn.content, str):
            made.append({"role": turn.role, "content": turn.content})
        elif turn.role == "assistant":
            made.append(_assistant(turn.content, where))
        else:
            made += _user(turn.content, where)
    return made


def _assistant(blocks: list[Block], where: str) -> dict[str, Any]:
    calls = [{"id": b.id or "", "type": "function", "function": {"name": b.name, "arguments": b.input or {}}}
             for b in blocks if b.type == "tool_use" and b.name]
    thoughts = "".join(b.thinking or "" for b in blocks if b.type == "thinking")
    said = [b for b in blocks if b.type not in ("tool_use", "thinking", "redacted_thinking")]
    made: dict[str, Any] = {"role": "assistant", "content": _text(said, where)}
    return made | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})


def _user(blocks: list[Block], where: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": b.tool_use_id or "", "content": _text(b.content or "", where)}
        for b in blocks if b.type == "tool_result"]
    said = [b for b in blocks if b.type != "tool_result"]
    return made + ([{"role": "user", "content": _text(said, where)}] if said or not made else [])


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise bad_request(f"{where}: content of type {block.type!r} is not supported: this model reads text only",
                              "messages")
    return "".join(block.text or "" for block in content)


class _Run:
    """One answer."""

    def __init__(self, model: Model, talk: Conversation) -> None:
        self._model, self._talk, self._parser = model, talk, talk.parser()
        self._id, self._made, self._cached, self._called = new_id("msg_"), 0, 0, False
        self._held: Outcome | None = None

    async def whole(self) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        reason: str | None = None
        stop: str | int | None = None
        async for update in self._talk.updates:
            for sample in self._samples(update):
                for piece in self._pieces(sample):
                    _add(blocks, piece)
                reason, stop = sample.finish_reason, sample.stop_reason
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _object(block["input"])
        return self._message(blocks, reason, stop) | self._kept()

    async def stream(self) -> AsyncIterator[bytes]:
        opened, kinds = False, list[str]()
        reason: str | None = None
        stop: str | int | None = None
        async for update in self._talk.updates:
            if not opened:
                self._cached, opened = update.cached, True
                yield event({"type": "message_start", "message": self._message([], None, None)}, "message_start")
            for sample in self._samples(update):
                for piece in self._pieces(sample):
                    kind = _kind(piece)
                    if kind != (kinds[-1] if kinds else None) or isinstance(piece, CallStart):
                        if kinds:
                            yield _block("stop", len(kinds) - 1)
                        kinds.append(kind)
                        yield _block("start", len(kinds) - 1, content_block=_opened(piece))
                    if (delta := _delta(piece)) is not None:
                        yield _block("delta", len(kinds) - 1, delta=delta)
                reason, stop = sample.finish_reason, sample.stop_reason
        if kinds:
            yield _block("stop", len(kinds) - 1)
        why, by = self._why(reason, stop)
        yield event({"type": "message_delta", "delta": {"stop_reason": why, "stop_sequence": by}, "usage": self._usage(),
                     **self._kept()}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _samples(self, update: Update) -> list[Sample]:
        self._made += sum(len(s.tokens) for s in update.samples)
        self._cached = max(self._cached, update.cached)
        self._held = update.held or self._held
        return update.samples

    def _kept(self) -> dict[str, Any]:
        return {} if self._talk.wish is None else self._talk.wish.answer(self._held)

    def _pieces(self, sample: Sample) -> list[Piece]:
        pieces = [*self._parser.feed(sample.text), *(self._parser.finish() if sample.finish_reason else ())]
        self._called |= any(isinstance(p, CallStart) for p in pieces)
        return pieces

    def _why(self, reason: str | None, stop: str | int | None) -> tuple[str | None, str | None]:
        if self._called and reason == "stop":
            return "tool_use", None
        if isinstance(stop, str):
            return "stop_sequence", stop
        return {"stop": "end_turn", "length": "max_tokens"}.get(reason or "", None), None

    def _usage(self) -> dict[str, int]:
        return {"input_tokens": len(self._talk.prompt) - self._cached, "cache_read_input_tokens": self._cached,
                "cache_creation_input_tokens": 0, "output_tokens": self._made}

    def _message(self, blocks: list[dict[str, Any]], reason: str | None, stop: str | int | None) -> dict[str, Any]:
        why, by = self._why(reason, stop)
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model.name, "content": blocks,
                "stop_reason": why, "stop_sequence": by, "usage": self._usage()}


def _kind(piece: Piece) -> str:
    return "text" if isinstance(piece, Text) else "thinking" if isinstance(piece, Thought) else "tool_use"


def _opened(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, CallStart):
        return {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
    return {"type": "text", "text": ""} if isinstance(piece, Text) else {"type": "thinking", "thinking": "", "signature": ""}


def _delta(piece: Piece) -> dict[str, Any] | None:
    if isinstance(piece, CallStart):
        return None
    if isinstance(piece, Text):
        return {"type": "text_delta", "text": piece.text}
    if isinstance(piece, Thought):
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "input_json_delta", "partial_json": piece.text}


def _add(blocks: list[dict[str, Any]], piece: Piece) -> None:
    kind = _kind(piece)
    if isinstance(piece, CallStart):
        blocks.append({"type": kind, "id": piece.id, "name": piece.name, "input": ""})
        return
    if not blocks or blocks[-1]["type"] != kind:
        blocks.append(_opened(piece))
    blocks[-1]["input" if kind == "tool_use" else kind] += piece.text


def _object(text: str) -> dict[str, Any]:
    """A call's arguments; what max_tokens cut off is no object."""
    try:
        made = json.loads(text)
    except ValueError:
        return {}
    return made if isinstance(made, dict) else {}


def _block(what: str, index: int, **more: Any) -> bytes:
    name = f"content_block_{what}"
    return event({"type": name, "index": index, **more}, name)
