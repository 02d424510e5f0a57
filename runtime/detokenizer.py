"""Incremental detokenisation: text grows with tokens, never shows half a character, and holds back what may become
a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokenizers.decoders import ByteLevel

#: A byte-level token may hold a part of a character, which decodes to this until the rest arrives.
REPLACEMENT = "\ufffd"
#: Tokens before the new ones that are decoded with them: spaces and merges depend on the neighbour.
CONTEXT = 6
#: Tokens held back for a character at most; what is longer than any character is not one.
MAX_HELD = 8


class Tokenizer(Protocol):
    """What the runtime needs of `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Pieces(dict[int, str]):
    """What single tokens of a tokenizer are as text, found when they are first asked for.

    `joined`: a text is the texts of its tokens in a row, where these are whole characters.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self.joined = isinstance(getattr(tokenizer, "decoder", None), ByteLevel)

    def __missing__(self, token: int) -> str:
        self[token] = text = self.decode([token])
        return text

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class Detokenizer:
    """The text of one sequence's generated tokens.

    `text` is final: it never changes but by growing. `held` at its end is withheld from streams while it may be
    the beginning of a stop string.
    """

    def __init__(self, pieces: Pieces, prompt: Sequence[int], stop: Sequence[str], include_stop: bool) -> None:
        self._pieces, self._stop, self._include = pieces, tuple(stop), include_stop
        self._ids = list(prompt[-CONTEXT:])
        self._read = len(self._ids)  # tokens whose text is in `text`
        self._prefix = 0  # where decoding starts
        self.text = ""
        self.stopped_by: str | None = None

    @property
    def visible(self) -> str:
        """The text that may be shown now."""
        if not self._stop:
            return self.text
        held = 0 if self.stopped_by is not None else max(
            (size for s in self._stop for size in range(1, len(s)) if self.text.endswith(s[:size])), default=0)
        return self.text[:len(self.text) - held]

    def append(self, token: int, may_stop: bool = True) -> None:
        """Add a token; `stopped_by` is set when a stop string is complete, if that `may_stop` the sequence now."""
        if self._pieces.joined and self._read == len(self._ids):
            piece = self._pieces[token]
            if REPLACEMENT not in piece:
                self._ids.append(token)
                self._prefix, self._read = self._read, self._read + 1
                if self._stop:
                    self._grow(piece, may_stop)
                else:
                    self.text += piece
                return
        self._ids.append(token)
        known, whole = self._decode()
        if len(whole) <= len(known):
            return
        if whole.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD:
            return
        self._grow(whole[len(known):], may_stop)
        self._prefix, self._read = self._read, len(self._ids)

    def finish(self) -> None:
        """Show what is left, half a character included: no more tokens will come."""
        if self._read == len(self._ids) or self.stopped_by is not None:
            return
        known, whole = self._decode()
        if len(whole) > len(known):
            self._grow(whole[len(known):])
            self._read = len(self._ids)

    def _decode(self) -> tuple[str, str]:
        """The text of the tokens that the new ones are decoded with, and of all of these."""
        ids, read = self._ids[self._prefix:], self._read - self._prefix
        return self._pieces[ids[0]] if read == 1 else self._pieces.decode(ids[:read]), self._pieces.decode(ids)

    def _grow(self, new: str, may_stop: bool = True) -> None:
        start = len(self.text)
        self.text += new
        if not may_stop or not self._stop:
            return
        for stop in self._stop:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0 and (self.stopped_by is None or at < self.text.find(self.stopped_by)):
                self.stopped_by = stop
        if self.stopped_by is not None:
            at = self.text.find(self.stopped_by, max(0, start - len(self.stopped_by) + 1))
            self.text = self.text[:at + (len(self.stopped_by) if self._include else 0)]
