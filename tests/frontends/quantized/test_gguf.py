"""GGUF: blocks against the gguf package, files against transformers' models, and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from inferloom.compiler.frontends.gguf import loader
from inferloom.compiler.frontends.gguf.blocks import BLOCKS
from inferloom.compiler.frontends.gguf.config import raw_config
from inferloom.compiler.frontends.gguf.file import read_gguf
from inferloom.compiler.frontends.quantized.weight import quantized_weight
from inferloom.ir.errors import UnsupportedError
from tests import zoo
from tests.frontends.onnx_graphs import run
from tests.frontends.quantized.gguf_files import GEMMA, blocks, gguf_name, llama_metadata, turned, write

IDS = np.random.default_rng(0).integers(3, 131, 23).astype(np.int32)


@pytest.mark.parametrize("kind", [b.name for b in BLOCKS.values()])
def test_blocks_against_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows, columns = 6, 512
    raw = np.frombuffer(blocks(kind, rows, columns), np.uint8)
    block = next(b for b in BLOCKS.values() if b.name == kind)
    found = block.integers(raw, rows)
    want = gguf.quants.dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    scale = np.abs(want).max()
    np.testing.assert_allclose(found.dequantize(), want, rtol=0, atol=1e-6 * scale)
    if block.symmetric:
        assert np.array_equal(found.dequantize(), want)
    weight = quantized_weight((rows, columns), block.format, columns // block.group, block.symmetric, kind, lambda: found)
    assert weight.exact == (kind != "Q6_K")
    assert np.abs(weight.quantized().dequantize() - want).max() <= (1e-6 if weight.exact else 0.005) * scale


def test_a_file_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_rope_freq_base(12345.0)
    writer.add_token_list(["a", "ü", ""])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_add_bos_token(False)
    data = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("a.weight", data)
    writer.add_tensor("b.weight", gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.metadata["general.architecture"] == "llama" and file.metadata["llama.context_length"] == 77
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ü", ""] and file.metadata["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False and file.metadata["llama.rope.freq_base"] == 12345.0
    assert np.array_equal(file.tensors["a.weight"].raw().view("<f4").reshape(4, 64), data)
    near = BLOCKS[8].integers(file.tensors["b.weight"].raw(), 4).dequantize()
    assert file.tensors["b.weight"].shape == (4, 64) and np.abs(near - data).max() < 0.01 * np.abs(data).max()


def as_gguf(name: str, path: Path, more: dict[str, Any] | None = None, biased: dict[str, str] | None = None) -> Any:
    """A tiny model of the zoo as a GGUF file in F32, with its metadata as llama.cpp's converter derives them."""
    model = zoo.build(name)
    c = model.config
    arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(c.model_type, c.model_type)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    metadata = {"general.architecture": arch, f"{arch}.context_length": c.max_position_embeddings,
                f"{arch}.embedding_length": c.hidden_size, f"{arch}.block_count": c.num_hidden_layers,
                f"{arch}.feed_forward_length": c.intermediate_size, f"{arch}.attention.head_count": c.num_attention_heads,
                f"{arch}.attention.head_count_kv": c.num_key_value_heads, f"{arch}.attention.key_length": head_dim,
                f"{arch}.attention.value_length": head_dim, f"{arch}.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
                "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5}
    metadata |= {f"{arch}.{key}": value for key, value in (more or {}).items()}
    tensors = {}
    tied = getattr(c, "tie_word_embeddings", False)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        array = value.numpy()
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            array = turned(array, c.num_attention_heads if "q_proj" in key else c.num_key_value_heads)
        if arch.startswith("gemma") and "norm" in key:
            array = array + np.float32(1)
        tensors[gguf_name(key, GEMMA if arch.startswith("gemma") else None)] = ("F32", array.shape, array.tobytes())
    if "rope_freqs" in (biased or {}):
        factors = (1 / model.model.rotary_emb.inv_freq.numpy()) / 10000.0 ** (np.arange(0, head_dim, 2) / head_dim)
        tensors["rope_freqs.weight"] = ("F32", (head_dim // 2,), factors.astype(np.float32).tobytes())
    write(path, metadata, tensors)
    return model


CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "llama": ({}, {}), "llama_tied_bias": ({}, {}), "llama3_rope": ({}, {"rope_freqs": ""}),
    "mistral": ({"attention.sliding_window": 7}, {}), "qwen2": ({}, {}), "qwen3": ({}, {}),
    "gemma2": ({"attention.sliding_window": 7, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {}),
    "gemma3_text": ({"attention.sliding_window": 7, "rope.freq_base": 1000000.0}, {}),
}


@pytest.mark.parametrize("name", [n if n == "llama_tied_bias" else pytest.param(n, marks=pytest.mark.slow)
                                  for n in CASES])
def test_models_compute_what_transformers_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, options = zoo.ZOO[name]
    if name.startswith("gemma"):  # what the metadata do not say: the divisor of scores is the head, the pattern is the family's
        options = options | {"query_pre_attn_scalar": 32, "num_hidden_layers": 6, "layer_types": None}
        monkeypatch.setitem(zoo.ZOO, name, (model_type, options))
    model = as_gguf(name, tmp_path / "x.gguf", *CASES[name])
    traced = loader.load(tmp_path)
    assert traced.name == "x" and traced.eos_token_ids == (2, 5) and traced.bos_token_id == 1
    with torch.no_grad():
        want = model(torch.from_numpy(IDS)[None].long()).logits[0].numpy()
    assert np.abs(run(traced, IDS) - want).max() <= 1e-4 * want.std()


def tiny(path: Path, checkpoint: Path, kinds: dict[str, str] | None = None, **metadata: Any) -> dict[str, np.ndarray]:
    """The tiny checkpoint as a GGUF; `kinds` gives the types of some weights by the end of their names. Returns its floats."""
    from safetensors.numpy import load_file

    said = {k: v for k, v in (llama_metadata(checkpoint) | {k.replace("__", "."): v for k, v in metadata.items()}).items()
            if v is not None}
    tensors, floats = {}, {}
    for name, array in load_file(checkpoint / "model.safetensors").items():
        stored = turned(array, 4 if "q_proj" in name else 2) if "q_proj" in name or "k_proj" in name else array
        kind = next((k for end, k in (kinds or {}).items() if name.endswith(end)), "F32")
        if kind in ("F32", "F16", "BF16"):
            data = stored.astype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind])
            floats[name] = array.astype(data.dtype).astype(np.float32)
            raw = data.tobytes()
        else:
            raw = blocks(kind, *array.shape)
        tensors[gguf_name(name)] = (kind, array.shape, raw)
    write(path, said, tensors)
    return floats


def test_tensors_of_every_kind_in_one_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kinds = {"q_proj.weight": "Q4_0", "k_proj.weight": "Q8_0", "v_proj.weight": "Q5_1", "gate_proj.weight": "Q4_1",
             "up_proj.weight": "F16", "o_proj.weight": "BF16"}
    floats = tiny(tmp_path / "x.gguf", tiny_checkpoint, kinds)
    file = read_gguf(tmp_path / "x.gguf")
    held = loader.tensors(file, raw_config(file))
    for name, want in floats.items():
        assert np.array_equal(held[name].read().astype(np.float32), want), name
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        raw = np.frombuffer(blocks("Q4_0", 64, 64), np.uint8).reshape(64, -1)
        stored = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
        assert np.array_equal(turned(held[name].read(), 4), stored)


def test_pooling_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tiny(tmp_path / "x.gguf", tiny_checkpoint, llama__pooling_type=1)
    traced = loader.load(tmp_path / "x.gguf", task="embed")
    assert traced.embedding is not None and (traced.embedding.pooling, traced.embedding.normalize) == ("mean", True)
    tiny(tmp_path / "x.gguf", tiny_checkpoint)
    assert loader.load(tmp_path / "x.gguf", task="embed").embedding is None


def test_the_tokenizer_is_the_checkpoints_own(tiny_checkpoint: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = tmp_path / "x.gguf"
    tiny(path, tiny_checkpoint)
    texts = ["def f(x):\n    return  x+1 # ünï 漢字\n", "  two  spaces", "<s>tag</s>", "", "it's 12345"]
    for folder, metadata in ((tiny_checkpoint, None), (demo_checkpoint, llama_metadata(demo_checkpoint))):
        if metadata is not None:
            write(path, metadata, {"token_embd.weight": ("F32", (8, 4), bytes(128))})
        files, notes = loader.tokenizer_files(read_gguf(path))
        made = Tokenizer.from_str(files["tokenizer.json"].decode())  # type: ignore[union-attr]
        given = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in texts:
            ids = made.encode(text, add_special_tokens=False).ids
            assert ids == given.encode(text, add_special_tokens=False).ids and not notes
            assert made.decode(ids, skip_special_tokens=False) == given.decode(ids, skip_special_tokens=False)
            assert made.encode(text).ids == [llama_metadata(folder)["tokenizer.ggml.bos_token_id"], *ids]


def test_a_sentencepiece_vocabulary(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Merges by score, a space before any text, bytes where there is no token."""
    from tokenizers import Tokenizer

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁ab", "▁▁"]
    kinds, scores = [2, 3, 3, *[6] * 256, *[1] * 6], [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0]
    path, ids = tmp_path / "x.gguf", {token: i for i, token in enumerate(tokens)}
    spm = {"tokenizer__ggml__model": "llama", "tokenizer__ggml__tokens": tokens, "tokenizer__ggml__scores": scores,
           "tokenizer__ggml__token_type": kinds, "tokenizer__ggml__merges": None, "tokenizer__ggml__pre": None,
           "tokenizer__ggml__add_bos_token": None, "tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2}
    for prefix in (True, False):
        tiny(path, tiny_checkpoint, **spm, tokenizer__ggml__add_space_prefix=prefix)
        made = Tokenizer.from_str(loader.tokenizer_files(read_gguf(path))[0]["tokenizer.json"].decode())  # type: ignore[union-attr]
        for text, pieces in (("ab", ["▁ab"] if prefix else ["ab"]), (" ab", ["▁", "▁ab"] if prefix else ["▁ab"]),
                             (" ", ["▁▁"] if prefix else ["▁"]), ("é", ["▁"] * prefix + ["<0xC3>", "<0xA9>"])):
            assert made.encode(text).ids == [1, *(ids[p] for p in pieces)], text
            assert made.decode(made.encode(text).ids) == text


def test_tokenizers_that_are_not_known(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for change in ({"tokenizer__ggml__model": "rwkv"}, {"tokenizer__ggml__pre": "no-such"},
                   {"tokenizer__ggml__merges": ["a"], "tokenizer__ggml__bos_token_id": 9999}):
        tiny(path, tiny_checkpoint, **change)
        with pytest.raises(UnsupportedError, match="tokenizer.json beside the file"):
            loader.tokenizer_files(read_gguf(path))
    (tmp_path / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    files, notes = loader.tokenizer_files(read_gguf(path))
    assert files["tokenizer.json"] == tmp_path / "tokenizer.json" and "beside" in notes[0]
    (tmp_path / "tokenizer.json").unlink()
    tiny(path, tiny_checkpoint, tokenizer__ggml__tokens=None)
    assert loader.tokenizer_files(read_gguf(path)) == ({}, ())
    tiny(path, tiny_checkpoint, tokenizer__ggml__pre="default", tokenizer__chat_template="{{ messages }}")
    files, notes = loader.tokenizer_files(read_gguf(path))
    assert "GPT-2" in notes[0] and b"{{ messages }}" in files["tokenizer_config.json"]  # type: ignore[operator]


@pytest.mark.parametrize(("change", "message"), [
    ({"general__architecture": "rwkv6"}, "'rwkv6' is not read"),
    ({"split__count": 2}, "join them"),
    ({"llama__logit_scale": 0.5}, "llama.logit_scale = 0.5"),
    ({"llama__expert_count": 8}, "8 experts"),
    ({"llama__embedding_length": None}, "do not describe a model"),
    ({"llama__attention__head_count": 0}, "do not describe a model|expected"),
    ({"llama__attention__value_length": 8}, "must be equal"),
    ({"llama__attention__head_count_kv": [2, 4]}, "differs between layers"),
    ({"llama__rope__scaling__type": "su"}, "'su' is not read"),
    ({"llama__attention__head_count": 3}, "not a multiple of the number of attention heads"),
])
def test_metadata_that_cannot_be_compiled(change: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tiny(tmp_path / "x.gguf", tiny_checkpoint, **change)
    with pytest.raises(UnsupportedError, match=message):
        loader.load(tmp_path)


def test_rope_scaling(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tiny(path, tiny_checkpoint, llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert raw_config(read_gguf(path))["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    tiny(path, tiny_checkpoint, llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0,
         llama__rope__scaling__original_context_length=64)
    assert raw_config(read_gguf(path))["rope_parameters"]["original_max_position_embeddings"] == 64


def test_tensors_that_are_not_known(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, said = tmp_path / "x.gguf", llama_metadata(tiny_checkpoint)
    embedding = {"token_embd.weight": ("F32", (8, 4), bytes(128))}
    write(path, said, embedding | {"blk.0.attn_gate.weight": ("F32", (4,), bytes(16)), "other": ("F32", (4,), bytes(16))})
    with pytest.raises(UnsupportedError, match="blk.0.attn_gate.weight, other"):
        loader.load(path)
    write(path, said, embedding | {"blk.0.ffn_up.weight": ("Q8_0", (32,), bytes(34))})
    with pytest.raises(UnsupportedError, match="only matrices"):
        loader.load(path)
    write(path, said, embedding | {"rope_freqs.weight": ("F32", (4,), bytes(16))})
    with pytest.raises(UnsupportedError, match=r"expected F32 \[8\]"):
        loader.load(path)
    write(path, said | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
          embedding | {"rope_freqs.weight": ("F32", (8,), bytes(32))})
    with pytest.raises(UnsupportedError, match="both rope_freqs"):
        loader.load(path)
    path.with_name("y.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UnsupportedError, match="holds 2 GGUF files: name one"):
        loader.load(tmp_path)


HEAD = b"GGUF" + struct.pack("<I", 3)
TENSOR = b"\1\0\0\0\0\0\0\0a"
ARCH = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"


def one_tensor(dims: list[int], kind: int, offset: int, items: bytes = ARCH, data: int = 64) -> bytes:
    head = HEAD + struct.pack("<QQ", 1, 1) + items + TENSOR + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % 32 + data)


def alignment(value: int) -> bytes:
    return struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, value)


@pytest.mark.parametrize(("data", "message"), [
    (b"GGUF", "it has 4 bytes"),
    (b"GGML" + bytes(30), "does not begin with GGUF"),
    (b"GGUF" + struct.pack("<I", 1) + bytes(30), "version 1"),
    (b"GGUF" + struct.pack(">I", 3) + bytes(30), "big-endian"),
    (HEAD + struct.pack("<QQ", 1 << 60, 0), "the number of tensors is"),
    (HEAD + struct.pack("<QQ", 0, 1 << 60), "metadata items is"),
    (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 40), "the length of a text"),
    (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1000), "are wanted"),
    (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(9), "not UTF-8"),
    (HEAD + struct.pack("<QQ", 0, 2) + ARCH * 2, "occurs twice"),
    (HEAD + struct.pack("<QQ", 0, 1) + TENSOR + struct.pack("<I", 99), "unknown type 99"),
    (HEAD + struct.pack("<QQ", 0, 1) + TENSOR + struct.pack("<IIQ", 9, 4, 1 << 50), "the length of a list"),
    (HEAD + struct.pack("<QQ", 0, 1) + TENSOR + struct.pack("<IIQ", 9, 4, 1 << 20), "are wanted"),
    (HEAD + struct.pack("<QQ", 0, 1) + TENSOR + struct.pack("<IIQ", 9, 9, 1), "elements of the type 9"),
    (one_tensor([8, 2], 0, 0, alignment(24)), "alignment is 24"),
    (one_tensor([8, 2], 0, 0, alignment(0)), "alignment is 0"),
    (one_tensor([], 0, 0), "has the shape"),
    (one_tensor([8, 0], 0, 0), "has the shape"),
    (one_tensor([1 << 40, 1 << 40], 0, 0), "has the shape"),
    (one_tensor([1] * 5, 0, 0), "the number of axes"),
    (one_tensor([256], 10, 0), "type Q2_K; these are read"),
    (one_tensor([256], 77, 0), "type 77"),
    (one_tensor([33], 8, 0), "not whole blocks of 32"),
    (one_tensor([8, 2], 0, 32), "of .* bytes"),
    (one_tensor([8], 0, 8), "aligned to 32"),
    (one_tensor([8], 0, 1 << 62), "of .* bytes"),
])
def test_damaged_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=message):
        read_gguf(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"general.architecture": "llama"},
                 {"a": ("F32", (8,), bytes(32)), "b": ("F32", (8,), bytes(32))})
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\0\0\0\0b") + 9 + 4 + 8 + 4
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="overlap"):
        read_gguf(path)


def test_a_fuzzed_file_is_read_or_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever bytes change and wherever a file ends: UnsupportedError, or tensors that lie within it."""
    path = tmp_path / "x.gguf"
    tiny(path, tiny_checkpoint, {"_proj.weight": "Q8_0"})
    good = path.read_bytes()
    head = good.index(b"token_embd.weight") + 4096
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        data = bytearray(good)
        if trial % 4 == 0:
            del data[int(rng.integers(0, len(data))):]
        for _ in range(int(rng.integers(1, 4))):
            if data:
                data[int(rng.integers(0, min(head, len(data))))] = int(rng.integers(0, 256))
        path.write_bytes(data)
        try:
            file = read_gguf(path)
            raw_config(file)
            loader.tensors(file, raw_config(file))
            for tensor in file.tensors.values():
                assert len(tensor.raw()) == tensor.stop - tensor.start
        except UnsupportedError:
            refused += 1
    assert 100 < refused < 400
