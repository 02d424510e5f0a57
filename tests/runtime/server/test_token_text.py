"""Tokens that hold a part of a character are told by their bytes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from inferloom.runtime.server.token_text import TokenTexts


def test_bytes_of_a_texts_tokens_are_the_texts(demo_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    texts, sample = TokenTexts(tokenizer), "naïve → 日本語 🙂\n\tdef f(x):  # ½"
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    assert b"".join(texts.data(t) for t in ids).decode() == sample
    parts = [texts.text(t) for t in ids]
    assert any(p.startswith("bytes:\\x") for p in parts) and "\ufffd" not in "".join(parts)


def test_byte_fallback() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<0xE2>": 0, "a": 1}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    texts = TokenTexts(tokenizer)
    assert (texts.text(0), texts.data(0)) == ("bytes:\\xe2", b"\xe2") and texts.text(1) == "a"
    assert TokenTexts(None).text(3) == ""
