"""`<think> ... </think>` before the answer, as Qwen, DeepSeek and others write it."""

from __future__ import annotations

from inferloom.runtime.server.parsers.base import Parser, Piece, Thought, held_back

OPEN, CLOSE = "<think>", "</think>"


class Reasoning:
    """Splits thoughts off; what follows them goes to `answer`. `thinking`: the prompt has opened them already."""

    def __init__(self, answer: Parser, thinking: bool) -> None:
        self._answer, self._state, self._buffer = answer, "thinking" if thinking else "before", ""

    def feed(self, text: str) -> list[Piece]:
        if self._state == "closed":  # the blank lines behind thoughts are not the answer's
            text = text.lstrip("\n")
            self._state = "answer" if text else "closed"
        if self._state in ("closed", "answer"):
            return self._answer.feed(text)
        self._buffer += text
        if self._state == "before":
            start = self._buffer.lstrip()
            if OPEN.startswith(start):  # also of nothing but space
                return []
            if not start.startswith(OPEN):
                self._state, rest, self._buffer = "answer", self._buffer, ""
                return self._answer.feed(rest)
            self._state, self._buffer = "thinking", start[len(OPEN):]
        thought, closed, rest = self._buffer.partition(CLOSE)
        if closed:
            self._state, self._buffer = "closed", ""
            return [*([Thought(thought)] if thought else []), *self.feed(rest)]
        keep = len(thought) - held_back(thought, CLOSE)
        self._buffer = thought[keep:]
        return [Thought(thought[:keep])] if keep else []

    def finish(self) -> list[Piece]:
        rest, self._buffer = self._buffer, ""
        if self._state == "thinking":
            return [*([Thought(rest)] if rest else []), *self._answer.finish()]
        return [*(self._answer.feed(rest) if rest else []), *self._answer.finish()]
