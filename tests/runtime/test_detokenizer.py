"""Text grows with tokens: whole characters only, stop strings held back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from inferloom.runtime.detokenizer import Detokenizer, Pieces


class Bytes:
    """One token a byte."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def feed(text: str, stop: Sequence[str] = (), include: bool = False) -> tuple[list[str], Detokenizer]:
    made, shown = Detokenizer(Pieces(Bytes(), True), b"prompt", stop, include), []
    for token in text.encode():
        made.append(token)
        shown.append(made.visible)
        if made.stopped_by is not None:
            break
    made.finish()
    return shown, made


def test_never_half_a_character() -> None:
    shown, made = feed("naïve 🧵 wörk")
    assert made.text == "naïve 🧵 wörk" and all("\ufffd" not in s for s in shown)
    assert all(b.startswith(a) for a, b in zip(shown, shown[1:], strict=False))


def test_half_a_character_at_the_end_is_shown() -> None:
    made = Detokenizer(Pieces(Bytes(), True), b"", (), False)
    for token in "a🧵".encode()[:3]:
        made.append(token)
    made.finish()
    assert made.text.startswith("a") and made.text.endswith("\ufffd")


def test_stop_strings_are_held_back_and_cut() -> None:
    shown, made = feed("one STO two STOP three", ["STOP"])
    assert made.stopped_by == "STOP" and made.text == "one STO two " == made.visible
    assert not any(s.endswith(("S", "ST", "STO")) and s != "one STO" for s in shown)
    assert feed("a STOP b", ["STOP"], include=True)[1].text == "a STOP"
    assert feed("ab STO", ["STOP"])[1].text == "ab STO"


def test_the_first_stop_string_wins() -> None:
    assert feed("xx<b>yy<a>", ["<a>", "<b>"])[1].text == "xx"


def test_byte_level_text_is_that_of_all_tokens_at_once(demo_checkpoint: Path) -> None:
    """Of whole characters token by token, of others with their neighbours; joined or not makes no difference."""
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    for seed in range(200):
        r = random.Random(seed)
        text = "".join(r.choice(["a", " def", "\n", "ö", "🧵", "線", "<s>", "\t", "é"]) for _ in range(30))
        ids = tokenizer.encode(text).ids if seed % 2 else [r.randrange(tokenizer.get_vocab_size()) for _ in range(30)]
        for skip in (True, False):
            shown = []
            for joined in (True, False):
                pieces = Pieces(tokenizer, skip)
                assert pieces.joined
                pieces.joined = joined
                made = Detokenizer(pieces, ids[:3], (), False)
                for token in ids[3:]:
                    made.append(token)
                made.finish()
                shown.append(made.text)
            assert shown[0] == shown[1]
            if seed % 2:
                assert shown[0] == tokenizer.decode(ids, skip_special_tokens=skip)[len(
                    tokenizer.decode(ids[:3], skip_special_tokens=skip)):]
