"""Parsers read a model's text as it grows and tell its parts apart."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; it is the request's `index`-th."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as JSON."""

    index: int
    text: str


Piece = Text | Thought | CallStart | Arguments


class Parser(Protocol):
    """Reads one sample's text."""

    def feed(self, text: str) -> list[Piece]:
        """More text has come."""
        ...

    def finish(self) -> list[Piece]:
        """No more comes."""
        ...


class Plain:
    """All of it is answer."""

    def feed(self, text: str) -> list[Piece]:
        return [Text(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


def call(index: int, name: str, arguments: str) -> list[Piece]:
    """A whole call."""
    return [CallStart(index, call_id(), name), Arguments(index, arguments)]


def call_id() -> str:
    """An id for a tool call."""
    return "call_" + secrets.token_hex(12)


def read_call(value: Any) -> tuple[str, str] | None:
    """Name and arguments (as JSON) of `{"name": ..., "arguments" or "parameters": ...}`; None if it is not one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return (value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
