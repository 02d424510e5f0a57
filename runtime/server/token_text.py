"""How single tokens read: their bytes, and a text for them even where they hold a part of a character."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

from inferloom.runtime.detokenizer import REPLACEMENT

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (GPT-2's table): printable ones stand for themselves,
    the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, remembered."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """How it reads; as OpenAI writes it, `bytes:\\xe2\\x82`, where it is no whole characters."""
        return self._of(token)[0]

    def data(self, token: int) -> bytes:
        """What it adds to a text in UTF-8."""
        return self._of(token)[1]

    def _of(self, token: int) -> tuple[str, bytes]:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def _find(self, token: int) -> tuple[str, bytes]:
        if self._tokenizer is None:
            return "", b""
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        written = self._tokenizer.id_to_token(token) or ""
        if REPLACEMENT not in text:
            return text, text.encode()
        if match := _BYTE.fullmatch(written):
            data = bytes([int(match[1], 16)])
        elif written and all(c in _ALPHABET for c in written):
            data = bytes(_ALPHABET[c] for c in written)
        else:
            return text, text.encode()
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data), data
