"""Text grows with tokens: whole characters only, stop strings held back."""

from __future__ import annotations

from collections.abc import Sequence

from inferloom.runtime.detokenizer import Detokenizer


class Bytes:
    """One token a byte."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def feed(text: str, stop: Sequence[str] = (), include: bool = False) -> tuple[list[str], Detokenizer]:
    made, shown = Detokenizer(Bytes(), b"prompt", stop, True, include), []
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
    made = Detokenizer(Bytes(), b"", (), True, False)
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
