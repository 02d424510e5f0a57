"""The tokenizer of a GGUF file, as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inferloom.compiler.frontends.gguf.file import GgufFile
from inferloom.compiler.frontends.paths import TOKENIZER_FILES
from inferloom.ir.errors import UnsupportedError

#: How a byte-level vocabulary's texts are split when that is named so: as GPT-2 does.
_GPT2 = ("gpt-2", "gpt2")
#: Vocabularies whose own entries are found before merges are tried, and which begin with a token (llama.cpp, `llama-vocab.cpp`).
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")
_KEYS = {"model": "tokenizer_type", "pre": "pre_tokenizer_type", "tokens": "tokens", "scores": "scores",
         "token_type": "token_type", "merges": "merges", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
         "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id", "add_space_prefix": "add_prefix_space"}


def tokenizer_files(file: GgufFile) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The files of the tokenizer, and notes.

    It is made of the metadata where these say how; a tokenizer.json that lies beside the file is taken where they do not.
    UnsupportedError when there is neither; no files when the metadata have no tokens.
    """
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in file.metadata.items()}
    said = {ours: ggml[key] for key, ours in _KEYS.items() if key in ggml}
    if "tokens" not in said:
        return _beside(file), ()
    try:
        return _made(file, said)
    except UnsupportedError as error:
        if found := _beside(file):
            return found, (f"{error}: tokenizer.json beside the file is used",)
        raise UnsupportedError(f"{error}. Put the model's tokenizer.json beside the file") from None


def _beside(file: GgufFile) -> dict[str, Path | bytes]:
    folder = file.path.parent
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return dict(found) if "tokenizer.json" in found else {}


def _made(file: GgufFile, said: dict[str, Any]) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
            convert_gguf_tokenizer,
        )
    except ImportError:
        raise UnsupportedError(f"{file.path}: this version of transformers makes no tokenizers of GGUF files") from None

    kind, split = said.get("tokenizer_type"), said.get("pre_tokenizer_type", "default")
    notes: tuple[str, ...] = ()
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"{file.path}: a tokenizer of kind {kind!r} is not read; gpt2 and llama are")
    if kind == "gpt2" and split == "default":
        notes = ("the file does not name its pre-tokenizer: text is split as by GPT-2",)
    elif kind == "gpt2" and split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _GPT2:
        raise UnsupportedError(f"{file.path}: text split as by {split!r} is not known")
    try:
        backend, _ = convert_gguf_tokenizer(file.metadata["general.architecture"], dict(said))
        if split in _LLAMA3 and kind == "gpt2":
            backend.model.ignore_merges = True
        if kind == "llama":
            _put_space_first(backend, bool(said.get("add_prefix_space", True)))
        _add_ends(backend, file, said)
        made = json.loads(backend.to_str())
    except UnsupportedError:
        raise
    except Exception as error:  # the library raises what its parts raise
        raise UnsupportedError(f"{file.path}: the metadata do not describe a tokenizer: {error!r}") from None
    config = {name: said["tokens"][said[key]] for name, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"),
                                                                ("unk_token", "unk_token_id"), ("pad_token", "pad_token_id"))
              if key in said}
    if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {"tokenizer.json": _json(made), "tokenizer_config.json": _json(config)}, notes


def _put_space_first(backend: Any, prefix: bool) -> None:
    """A space before any text, one that begins with spaces too, as sentencepiece and llama.cpp do."""
    from tokenizers import decoders, normalizers

    first = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer, backend.pre_tokenizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")]), None
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _add_ends(backend: Any, file: GgufFile, said: dict[str, Any]) -> None:
    """Begin and end tokens around a text, as the metadata want; without a word on it, as llama.cpp does."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    first = said["tokenizer_type"] == "llama" or said.get("pre_tokenizer_type") in _LLAMA3
    ends = []
    for key, usual in (("bos", first), ("eos", False)):
        token = said.get(f"{key}_token_id")
        wanted = file.metadata.get(f"tokenizer.ggml.add_{key}_token", usual) and token is not None
        ends.append([(said["tokens"][token], token)] if wanted else [])
    steps: list[Any] = [ByteLevel(trim_offsets=False)] if said["tokenizer_type"] == "gpt2" else []
    if ends[0] or ends[1]:
        before, after = ([f"{t}:0" for t, _ in end] for end in ends)
        steps.append(TemplateProcessing(single=[*before, "$A:0", *after], pair=[*before, "$A:0", *after, "$B:1"],
                                        special_tokens=[*ends[0], *ends[1]]))
    backend.post_processor = Sequence(steps)
