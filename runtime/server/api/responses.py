"""`/v1/responses`: the same conversations as OpenAI's newer clients have them. Nothing is stored here between requests."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from inferloom.runtime.leases import Outcome
from inferloom.runtime.server.api.chat import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, FunctionName
from inferloom.runtime.server.api.common import event, new_id
from inferloom.runtime.server.api.conversation import Conversation, Tools, begin
from inferloom.runtime.server.api.fields import Body, Keyed, Name, Salt, Sampled, json_schema
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import HttpError, bad_request
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.parsers.base import Arguments, CallStart, Piece, Text, Thought
from inferloom.runtime.server.wire import Grammar, Sample, Update


class Content(Body):
    type: Name
    text: str | None = None
    refusal: str | None = None


class Item(Body):
    """A message, a call or its result, or thoughts."""

    type: Name = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[Content], Field(max_length=MAX_PARTS)] | None = None
    summary: Annotated[list[Content], Field(max_length=MAX_PARTS)] | None = None
    call_id: Name | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: str | Annotated[list[Content], Field(max_length=MAX_PARTS)] | None = None


class ResponseTool(Body):
    type: Name
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChosenTool(Body):
    type: Name
    name: FunctionName | None = None


class TextFormat(Body):
    type: Name = "text"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Body):
    format: TextFormat | None = None


class ReasoningOptions(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseBody(Keyed):
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "previous_response_id": (), "conversation": (), "background": (False,), "prompt": (), "max_tool_calls": (),
        "truncation": ("disabled", "auto"), "context_management": ([],)}

    model: Name | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[Name, Name] | None = None
    priority: Annotated[int, Field(ge=-2**31, lt=2**31)] | None = 0
    seed: Annotated[int, Field(ge=-2**63, lt=2**64)] | None = None
    cache_salt: Salt | None = None


class Responses:
    """Answers."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, body: ResponseBody, call: Call) -> Answer:
        model = self._models.of(body.model, "generate")
        sampled = Sampled(temperature=body.temperature, top_p=body.top_p, seed=body.seed, priority=body.priority,
                          cache_salt=body.cache_salt, session_id=body.session_id, session_hold=body.session_hold)
        effort = body.reasoning.effort if body.reasoning else None
        talk = await begin(model, _plain(body), _tools(body), body.max_output_tokens, sampled, call, _grammar(body), None,
                           {} if effort is None else {"reasoning_effort": effort}, body.hint())
        run = _Run(model, body, talk)
        return run.stream() if body.stream else await run.whole()


def _grammar(body: ResponseBody) -> Grammar | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_schema({"type": "object"})
    if form.type == "json_schema" and form.schema_ is not None:
        return json_schema(form.schema_)
    raise bad_request("text.format is text, json_object, or json_schema with a schema", "text")


def _tools(body: ResponseBody) -> Tools:
    functions = []
    for tool in body.tools or ():
        if tool.type != "function" or tool.name is None:
            raise bad_request(f"tools of type {tool.type!r} do not run here: there are functions only", "tools")
        functions.append({"name": tool.name, "description": tool.description or "", "parameters": tool.parameters or {
            "type": "object", "properties": {}}})
    choice, parallel = body.tool_choice, body.parallel_tool_calls is not False
    if not isinstance(choice, ChosenTool):
        return Tools(functions, choice, False, parallel)
    if choice.type != "function" or choice.name is None:
        raise bad_request("tool_choice names no function", "tool_choice")
    return Tools(functions, choice.name, True, parallel)


def _plain(body: ResponseBody) -> list[dict[str, Any]]:
    """The conversation as chat templates take it; calls that follow each other are one message."""
    made: list[dict[str, Any]] = []
    if body.instructions:
        made.append({"role": "system", "content": body.instructions})
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for i, item in enumerate(items):
        where = f"input.{i}"
        if item.type == "message":
            if item.role is None or item.content is None:
                raise bad_request(f"{where}: a message needs a role and a content", "input")
            role = "system" if item.role == "developer" else item.role
            made.append({"role": role, "content": _text(item.content, where)})
        elif item.type == "function_call":
            if item.name is None:
                raise bad_request(f"{where}: a call needs a name", "input")
            last = made[-1] if made and made[-1]["role"] == "assistant" else None
            if last is None:
                made.append(last := {"role": "assistant", "content": ""})
            last.setdefault("tool_calls", []).append({"id": item.call_id or "", "type": "function", "function": {
                "name": item.name, "arguments": _arguments(item.arguments or "{}", where)}})
        elif item.type == "function_call_output":
            made.append({"role": "tool", "tool_call_id": item.call_id or "", "content": _text(item.output or "", where)})
        elif item.type != "reasoning":  # thoughts of earlier turns are not read again
            raise bad_request(f"{where}: items of type {item.type!r} are not supported", "input")
    return made


def _arguments(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise bad_request(f"{where}: arguments are not JSON", "input") from None


def _text(content: str | list[Content], where: str) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("input_text", "output_text", "text", "refusal", "summary_text"):
            raise bad_request(f"{where}: content of type {part.type!r} is not supported: this model reads text only",
                              "input")
    return "".join(part.text or part.refusal or "" for part in content)


class _Run:
    """One response: items that open, grow and close."""

    def __init__(self, model: Model, body: ResponseBody, talk: Conversation) -> None:
        self._model, self._body, self._talk, self._parser = model, body, talk, talk.parser()
        self._id, self._created = new_id("resp_"), int(time.time())
        self._items: list[dict[str, Any]] = []
        self._made = self._cached = self._thought = self._number = 0
        self._held: Outcome | None = None

    async def whole(self) -> dict[str, Any]:
        reason: str | None = None
        async for update in self._talk.updates:
            for sample in self._samples(update):
                for piece in self._pieces(sample):
                    self._grow(piece)
                reason = sample.finish_reason
        self._close()
        return self._response(reason)

    async def stream(self) -> AsyncIterator[bytes]:
        opened = False
        reason: str | None = None
        try:
            async for update in self._talk.updates:
                if not opened:
                    opened = True
                    yield self._event("response.created", response=self._response(None))
                    yield self._event("response.in_progress", response=self._response(None))
                for sample in self._samples(update):
                    for piece in self._pieces(sample):
                        for each in self._grow(piece):
                            yield each
                    reason = sample.finish_reason
        except HttpError as error:
            if not opened:
                raise
            failed = self._response(None) | {"status": "failed", "error": {"code": "server_error", "message": error.message}}
            yield self._event("response.failed", response=failed)
            return
        for each in self._close():
            yield each
        name = "response.completed" if reason != "length" else "response.incomplete"
        yield self._event(name, response=self._response(reason))

    def _samples(self, update: Update) -> list[Sample]:
        self._made += sum(len(s.tokens) for s in update.samples)
        self._cached = max(self._cached, update.cached)
        self._held = update.held or self._held
        return update.samples

    def _pieces(self, sample: Sample) -> list[Piece]:
        pieces = [*self._parser.feed(sample.text), *(self._parser.finish() if sample.finish_reason else ())]
        if any(isinstance(p, Thought) for p in pieces):
            self._thought += len(sample.tokens)
        return pieces

    def _grow(self, piece: Piece) -> list[bytes]:
        """Add a piece to the item it belongs to; the events that say so."""
        made: list[bytes] = []
        kind = "message" if isinstance(piece, Text) else "reasoning" if isinstance(piece, Thought) else "function_call"
        last = self._items[-1] if self._items else None
        if last is None or last["type"] != kind or last["status"] == "completed" or isinstance(piece, CallStart):
            made += self._close()
            made += self._open(kind, piece)
        item, at = self._items[-1], len(self._items) - 1
        if isinstance(piece, Text):
            item["content"][0]["text"] += piece.text
            made.append(self._event("response.output_text.delta", item_id=item["id"], output_index=at, content_index=0,
                                    delta=piece.text, logprobs=[]))
        elif isinstance(piece, Thought):
            item["content"][0]["text"] += piece.text
            made.append(self._event("response.reasoning_text.delta", item_id=item["id"], output_index=at, content_index=0,
                                    delta=piece.text))
        elif isinstance(piece, Arguments):
            item["arguments"] += piece.text
            made.append(self._event("response.function_call_arguments.delta", item_id=item["id"], output_index=at,
                                    delta=piece.text))
        return made

    def _open(self, kind: str, piece: Piece) -> list[bytes]:
        item: dict[str, Any]
        if isinstance(piece, CallStart):
            item = {"type": kind, "id": new_id("fc_"), "call_id": piece.id, "name": piece.name, "arguments": "",
                    "status": "in_progress"}
        elif isinstance(piece, Text):
            item = {"type": kind, "id": new_id("msg_"), "role": "assistant", "status": "in_progress", "content": []}
        else:
            item = {"type": kind, "id": new_id("rs_"), "summary": [], "status": "in_progress", "content": []}
        self._items.append(item)
        at = len(self._items) - 1
        made = [self._event("response.output_item.added", output_index=at, item=item)]
        if "content" in item:
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []} if isinstance(
                piece, Text) else {"type": "reasoning_text", "text": ""}
            item["content"] = [part]
            made.append(self._event("response.content_part.added", item_id=item["id"], output_index=at, content_index=0,
                                    part=part))
        return made

    def _close(self) -> list[bytes]:
        """End the item that is open; the events that say so."""
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item, at = self._items[-1], len(self._items) - 1
        item["status"] = "completed"
        place = {"item_id": item["id"], "output_index": at}
        made = []
        if item["type"] == "function_call":
            made.append(self._event("response.function_call_arguments.done", **place, name=item["name"],
                                    arguments=item["arguments"]))
        else:
            part = item["content"][0]
            name = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            made.append(self._event(name, **place, content_index=0, text=part["text"], **more))
            made.append(self._event("response.content_part.done", **place, content_index=0, part=part))
        made.append(self._event("response.output_item.done", output_index=at, item=item))
        return made

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **more}, kind)

    def _response(self, reason: str | None) -> dict[str, Any]:
        body = self._body
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        counted = {"input_tokens": len(self._talk.prompt), "input_tokens_details": {"cached_tokens": self._cached},
                   "output_tokens": self._made, "output_tokens_details": {"reasoning_tokens": self._thought},
                   "total_tokens": len(self._talk.prompt) + self._made}
        choice = body.tool_choice
        kept = {} if status == "in_progress" or self._talk.wish is None else self._talk.wish.answer(self._held)
        return kept | {"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
                "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
                "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self._model.name,
                "output": self._items, "parallel_tool_calls": body.parallel_tool_calls is not False,
                "previous_response_id": None, "store": False, "temperature": body.temperature, "top_p": body.top_p,
                "text": {"format": {"type": (body.text.format.type if body.text and body.text.format else "text")}},
                "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, ChosenTool) else choice or "auto",
                "tools": [t.model_dump(exclude_none=True) | {"strict": False} for t in body.tools or ()],
                "truncation": "disabled", "metadata": body.metadata or {}, "prompt_cache_key": body.prompt_cache_key,
                "usage": None if status == "in_progress" else counted}
