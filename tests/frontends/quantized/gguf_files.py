"""GGUF files written by hand, from the format's description."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

#: ggml's numbers of types, with the elements and bytes of a block.
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
         "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "BF16": (30, 1, 2)}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def item(value: Any) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    inner = item(value[0])[:4] if value else struct.pack("<I", 4)
    return struct.pack("<I", 9) + inner + struct.pack("<Q", len(value)) + b"".join(item(v)[4:] for v in value)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
          alignment: int = 32) -> Path:
    """`tensors`: type, shape (fastest axis last) and data by name."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(name) + item(value) for name, value in metadata.items())
    at, data = 0, []
    for name, (kind, shape, raw) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], TYPES[kind][0], at)
        data.append(raw + bytes(-len(raw) % alignment))
        at += len(data[-1])
    path.write_bytes(head + bytes(-len(head) % alignment) + b"".join(data))
    return path


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> bytes:
    """Random blocks of a quantised type; their f16 are small and finite."""
    _, size, count = TYPES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * columns // size, count), np.uint8)
    halves = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
              "Q6_K": (208,)}[kind]
    for at in halves:
        raw[:, at : at + 2] = (rng.standard_normal((len(raw), 1)) * 0.01).astype("<f2").view(np.uint8)
    return raw.tobytes()


def q4_k(weight: np.ndarray) -> np.ndarray:
    """Blocks u8 [n, bytes] of a weight: for each 32 numbers 6 bits of a scale and of a minimum, for 256 an f16 of both."""
    groups = weight.reshape(-1, 8, 32).astype(np.float64)
    low = np.minimum(groups.min(axis=2), 0)
    scales = (groups.max(axis=2) - low) / 15
    d, least = (np.float16(a.max(axis=1) / 63) for a in (scales, -low))
    sc, mn = (np.rint(a / np.maximum(b[:, None].astype(float), 1e-9)).astype(np.uint8) for a, b in ((scales, d), (-low, least)))
    step = d[:, None].astype(float) * sc
    q = np.rint((groups + (least[:, None].astype(float) * mn)[:, :, None]) / np.maximum(step, 1e-9)[:, :, None])
    q = q.clip(0, 15).astype(np.uint8)
    packed = np.zeros((len(groups), 12), np.uint8)
    for j in range(4):
        packed[:, j] = sc[:, j] | (sc[:, j + 4] >> 4 << 6)
        packed[:, j + 4] = mn[:, j] | (mn[:, j + 4] >> 4 << 6)
        packed[:, j + 8] = (sc[:, j + 4] & 15) | (mn[:, j + 4] & 15) << 4
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(groups), 128)
    raw = np.concatenate((d[:, None].view(np.uint8), least[:, None].view(np.uint8), packed, nibbles), axis=1)
    return raw.reshape(len(weight), -1)


def q6_k(weight: np.ndarray) -> np.ndarray:
    """Blocks u8 [n, bytes] of a weight: for each 16 numbers 8 bits of a scale, for 256 an f16 of these."""
    groups = weight.reshape(-1, 16, 16).astype(np.float64)
    scales = np.abs(groups).max(axis=2) / 31
    d = np.float16(scales.max(axis=1) / 127)
    sc = np.rint(scales / np.maximum(d[:, None].astype(float), 1e-9)).astype(np.int8)
    q = np.rint(groups / np.maximum(d[:, None].astype(float) * sc, 1e-9)[:, :, None]).clip(-32, 31).astype(np.int64) + 32
    q = q.reshape(len(groups), 256).astype(np.uint8)
    low, high = np.zeros((len(groups), 128), np.uint8), np.zeros((len(groups), 64), np.uint8)
    for i in range(256):
        half, j = divmod(i, 128)
        low[:, half * 64 + j % 64] |= (q[:, i] & 15) << (4 * (j // 64))
        high[:, half * 32 + j % 32] |= (q[:, i] >> 4) << (2 * (j // 32))
    return np.concatenate((low, high, sc.view(np.uint8), d[:, None].view(np.uint8)), axis=1).reshape(len(weight), -1)


def llama_metadata(folder: Path, arch: str = "llama") -> dict[str, Any]:
    """What llama.cpp's converter would write of a Hugging Face checkpoint with a byte-level tokenizer."""
    c = json.loads((folder / "config.json").read_text())
    t = json.loads((folder / "tokenizer.json").read_text())
    vocab = dict(t["model"]["vocab"]) | {a["content"]: a["id"] for a in t["added_tokens"]}
    special = {a["content"] for a in t["added_tokens"]}
    names = sorted(vocab, key=lambda name: vocab[name])
    merges = [m if isinstance(m, str) else " ".join(m) for m in t["model"]["merges"]]
    return {"general.architecture": arch, "general.name": folder.name,
            f"{arch}.context_length": c["max_position_embeddings"], f"{arch}.embedding_length": c["hidden_size"],
            f"{arch}.block_count": c["num_hidden_layers"], f"{arch}.feed_forward_length": c["intermediate_size"],
            f"{arch}.attention.head_count": c["num_attention_heads"],
            f"{arch}.attention.head_count_kv": c["num_key_value_heads"],
            f"{arch}.attention.key_length": c["head_dim"], f"{arch}.attention.value_length": c["head_dim"],
            f"{arch}.rope.freq_base": float(c["rope_parameters"]["rope_theta"]),
            f"{arch}.attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]), f"{arch}.vocab_size": c["vocab_size"],
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": names,
            "tokenizer.ggml.token_type": [3 if n in special else 1 for n in names], "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": c["bos_token_id"], "tokenizer.ggml.eos_token_id": c["eos_token_id"],
            "tokenizer.ggml.add_bos_token": True}


#: transformers' names to GGUF's, as llama.cpp's documentation lists them.
_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "q_proj": "attn_q", "k_proj": "attn_k",
          "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
          "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_norm": "attn_q_norm",
          "k_norm": "attn_k_norm"}
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
         "post_feedforward_layernorm": "post_ffw_norm"}


def gguf_name(name: str, more: dict[str, str] | None = None) -> str:
    parts = name.split(".")
    stem = (_NAMES | (more or {}))[parts[-2]]
    return f"blk.{parts[2]}.{stem}.{parts[-1]}" if "layers" in parts else f"{stem}.{parts[-1]}"


def turned(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with the rotary halves of a head in turns, as llama.cpp's converter stores Llama's."""
    size = len(array) // heads
    made = np.empty_like(array)
    for h in range(heads):
        for i in range(size // 2):
            made[h * size + 2 * i] = array[h * size + i]
            made[h * size + 2 * i + 1] = array[h * size + size // 2 + i]
    return made
