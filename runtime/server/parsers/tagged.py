"""Tool calls between tags, as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

from __future__ import annotations

import json
import re

from inferloom.runtime.server.parsers.base import Piece, Text, call, held_back, read_call

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class Tagged:
    """A call is told when its closing tag is there; what is no call after all is answer."""

    def __init__(self) -> None:
        self._buffer, self._inside, self._calls = "", False, 0

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        made: list[Piece] = []
        while True:
            if self._inside:
                body, closed, rest = self._buffer.partition(CLOSE)
                if not closed:
                    return made
                made += self._call(body, OPEN + body + CLOSE)
                self._inside, self._buffer = False, rest
            else:
                before, opened, rest = self._buffer.partition(OPEN)
                if not opened:
                    keep = len(before) - held_back(before, OPEN)
                    made += self._text(before[:keep])
                    self._buffer = before[keep:]
                    return made
                made += self._text(before)
                self._inside, self._buffer = True, rest

    def finish(self) -> list[Piece]:
        rest, self._buffer = self._buffer, ""
        return self._call(rest, OPEN + rest) if self._inside else self._text(rest)

    def _text(self, text: str) -> list[Piece]:
        if self._calls and not text.strip():  # lines between calls
            return []
        return [Text(text)] if text else []

    def _call(self, body: str, whole: str) -> list[Piece]:
        found = _read(body)
        if found is None:
            return [Text(whole)]
        self._calls += 1
        return call(self._calls - 1, *found)


def _read(body: str) -> tuple[str, str] | None:
    try:
        return read_call(json.loads(body))
    except (ValueError, RecursionError):
        pass
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return None
    arguments = {name: _value(text) for name, text in _PARAMETER.findall(function[2])}
    return function[1], json.dumps(arguments, ensure_ascii=False)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
