"""Tool calls that a grammar has forced: the text is a JSON list of calls, or one call's arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from inferloom.runtime.server.parsers.base import Arguments, CallStart, Piece, Text, call, call_id, read_call


class ForcedList:
    """`[{"name": ..., "parameters": ...}, ...]`"""

    def __init__(self) -> None:
        self._buffer = ""

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        return []

    def finish(self) -> list[Piece]:
        try:
            values = json.loads(self._buffer)
        except ValueError:  # cut off by max_tokens
            return [Text(self._buffer)] if self._buffer else []
        found = [read_call(value) for value in values]
        return [piece for i, each in enumerate(found) if each is not None for piece in call(i, *each)]


class ForcedArguments:
    """The arguments of the tool `name`."""

    def __init__(self, name: str) -> None:
        self._name, self._started = name, False

    def feed(self, text: str) -> list[Piece]:
        start: list[Piece] = [] if self._started or not text else [CallStart(0, call_id(), self._name)]
        self._started = self._started or bool(text)
        return [*start, Arguments(0, text)] if text else []

    def finish(self) -> list[Piece]:
        return []


def list_schema(tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of at least one call of any of these functions; of just one unless `parallel`."""
    calls = [{"type": "object", "properties": {"name": {"const": t["name"]}, "parameters": arguments_schema(t)},
              "required": ["name", "parameters"], "additionalProperties": False} for t in tools]
    limits = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, **limits}


def arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments."""
    return dict(tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False})
