"""Which parser reads a model's text: by name, or by what its chat template writes."""

from __future__ import annotations

from collections.abc import Callable

from inferloom.runtime.errors import RequestError
from inferloom.runtime.server.parsers.base import Parser
from inferloom.runtime.server.parsers.prefixed import Prefixed
from inferloom.runtime.server.parsers.tagged import Tagged

TOOL_PARSERS: dict[str, Callable[[], Parser]] = {
    "hermes": Tagged,
    "qwen": Tagged,
    "llama3_json": lambda: Prefixed(("<|python_tag|>",), bare=True),
    "mistral": lambda: Prefixed(("[TOOL_CALLS]",), bare=False),
}
#: Parsers whose marks are special tokens, which text otherwise leaves out.
SPECIAL_MARKS = frozenset({"llama3_json", "mistral"})
REASONING_PARSERS = ("think",)
_HINTS = (("<tool_call>", "hermes"), ("<|python_tag|>", "llama3_json"), ("[TOOL_CALLS]", "mistral"))


def tool_parser(name: str, template: str | None) -> str | None:
    """The parser called `name`; of "auto" the one that the template suggests, None where it suggests none."""
    if name == "auto":
        return next((parser for mark, parser in _HINTS if template is not None and mark in template), None)
    if name == "none":
        return None
    if name not in TOOL_PARSERS:
        raise RequestError(f"tool parser {name!r} is not known: use auto, none, {', '.join(TOOL_PARSERS)}")
    return name


def reasoning_parser(name: str, template: str | None) -> str | None:
    """The same for thoughts."""
    if name == "auto":
        return "think" if template is not None and "<think>" in template else None
    if name == "none":
        return None
    if name not in REASONING_PARSERS:
        raise RequestError(f"reasoning parser {name!r} is not known: use auto, none, {', '.join(REASONING_PARSERS)}")
    return name
