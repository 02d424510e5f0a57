"""Tool calls as bare JSON from a mark to the end of the text, as Llama 3 and Mistral write them."""

from __future__ import annotations

import json
import re

from inferloom.runtime.server.parsers.base import Piece, Text, call, held_back, read_call

_DECODER = json.JSONDecoder()
_NAMED = re.compile(r"\s*([A-Za-z0-9_.\-]+)(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?\s*(?=\{)")


class Prefixed:
    """Calls follow one of `marks`, or with `bare` are the whole text, if that begins with `{`."""

    def __init__(self, marks: tuple[str, ...], bare: bool) -> None:
        self._marks, self._bare = marks, bare
        self._buffer, self._state = "", "start" if bare else "text"
        self._mark = ""

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        if self._state == "start":
            start = self._buffer.lstrip()
            if not start:
                return []
            self._state = "calls" if start[0] == "{" else "text"
        if self._state == "calls":
            return []
        at, mark = min(((self._buffer.find(m), m) for m in self._marks if m in self._buffer), default=(-1, ""))
        if at >= 0:
            before, self._buffer = self._buffer[:at], self._buffer[at + len(mark):]
            self._state, self._mark = "calls", mark
            return [Text(before)] if before else []
        keep = len(self._buffer) - max((held_back(self._buffer, m) for m in self._marks), default=0)
        out, self._buffer = self._buffer[:keep], self._buffer[keep:]
        return [Text(out)] if out else []

    def finish(self) -> list[Piece]:
        rest, self._buffer = self._buffer, ""
        found = _calls(rest, self._marks) if self._state == "calls" else None
        if found:
            return [piece for i, each in enumerate(found) for piece in call(i, *each)]
        return [Text(self._mark + rest)] if self._mark + rest else []


def _calls(text: str, marks: tuple[str, ...]) -> list[tuple[str, str]] | None:
    """All calls in a text that holds nothing else; None when it holds anything else."""
    made: list[tuple[str, str]] = []
    at = 0
    while True:
        while at < len(text) and (text[at].isspace() or text[at] in ";,"):
            at += 1
        mark = next((m for m in marks if text.startswith(m, at)), None)
        if mark is not None:
            at += len(mark)
            continue
        if at >= len(text):
            return made or None
        named = _NAMED.match(text, at)
        try:
            value, at = _DECODER.raw_decode(text, named.end() if named else at)
        except (ValueError, RecursionError):
            return None
        values = [{"name": named[1], "arguments": value}] if named else value if isinstance(value, list) else [value]
        for each in values:
            found = read_call(each)
            if found is None:
                return None
            made.append(found)
