"""From messages and tools to a running request, for every endpoint that talks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from inferloom.runtime.server.api.common import room
from inferloom.runtime.server.api.fields import Sampled, json_schema
from inferloom.runtime.server.api.wishes import Hint, Wish, opening, wish
from inferloom.runtime.server.endpoint import Call
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.model import Model
from inferloom.runtime.server.parsers.base import Parser, Plain
from inferloom.runtime.server.parsers.choice import SPECIAL_MARKS, TOOL_PARSERS
from inferloom.runtime.server.parsers.forced import ForcedArguments, ForcedList, arguments_schema, list_schema
from inferloom.runtime.server.parsers.reasoning import OPEN, Reasoning
from inferloom.runtime.server.wire import Grammar, Update


@dataclass(frozen=True, slots=True)
class Tools:
    """Functions (name, description, parameters) that may be called. `choice` is "none", "auto", "required", None for
    auto, or if `named` the function that must be called."""

    functions: Sequence[dict[str, Any]]
    choice: str | None = None
    named: bool = False
    parallel: bool = True

    @property
    def forced(self) -> bool:
        return self.named or self.choice == "required"

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates take them."""
        return [{"type": "function", "function": f} for f in self.functions] if self.choice != "none" else None

    def check(self) -> None:
        """HttpError 400 when the choice makes no sense."""
        if self.forced and not self.functions:
            raise bad_request("tool_choice needs tools", "tool_choice")
        if self.named and self.choice not in [f["name"] for f in self.functions]:
            raise bad_request(f"tool_choice names {self.choice!r}, which is not among the tools", "tool_choice")

    def grammar(self) -> Grammar:
        """What a forced call looks like."""
        if self.named:
            return json_schema(arguments_schema(next(f for f in self.functions if f["name"] == self.choice)))
        return json_schema(list_schema(self.functions, self.parallel))


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt whose answer is on its way. `guided`: a grammar holds the answer, so there are no thoughts before it."""

    model: Model
    prompt: list[int]
    updates: AsyncIterator[Update]
    tools: Tools
    thinking: bool
    guided: bool
    wish: Wish | None = None

    def parser(self) -> Parser:
        """A parser for one sample's text."""
        if self.tools.named:
            return ForcedArguments(str(self.tools.choice))
        if self.tools.choice == "required":
            return ForcedList()
        name = self.model.tool_parser
        answer: Parser = Plain() if name is None or not self.tools.shown else TOOL_PARSERS[name]()
        return answer if self.guided or self.model.reasoning_parser is None else Reasoning(answer, self.thinking)


async def begin(model: Model, messages: Sequence[dict[str, Any]], tools: Tools, max_tokens: int | None, body: Sampled,
                call: Call, grammar: Grammar | None, logprobs: int | None, options: dict[str, Any],
                hint: Hint | None = None) -> Conversation:
    """Write the prompt and hand it to the engine. HttpError when it cannot be served.

    `hint` is what the request says of its cache, if not in the words of `body`.
    """
    tools.check()
    text, prompt = await model.chat(messages, tools.shown, **options)
    if tools.forced:
        if grammar is not None:
            raise bad_request("a forced tool call and response_format exclude each other", "tool_choice")
        grammar = tools.grammar()
    changes: dict[str, Any] = {}
    if tools.shown and not tools.forced and model.tool_parser in SPECIAL_MARKS:
        changes["skip_special_tokens"] = False
    params = body.sampling(room(model, prompt, max_tokens), logprobs, **changes)
    salt = body.salted(call.salt)
    wanted = wish(model, salt, body.session_id, body.session_hold, hint or body.hint(), opening(messages, tools.shown), params.n)
    model.engine.admit(params.n)
    updates = model.engine.stream(prompt, params, body.priority or 0, salt, grammar, wanted.session if wanted else None)
    return Conversation(model, prompt, updates, tools, text.rstrip().endswith(OPEN), grammar is not None, wanted)
