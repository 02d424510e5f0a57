"""A Llama or Qwen2 checkpoint in bf16 as GGUF, with the `gguf` package; quantized by llama.cpp itself.

    to_gguf.py convert CHECKPOINT FILE       to_gguf.py quantize FILE FILE TYPE
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}
LAYER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name and its bf16 words, uint16 in its shape."""
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    data = np.memmap(file, np.uint8, "r", 8 + size)
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {entry['dtype']}, and only BF16 is converted")
            begin, end = entry["data_offsets"]
            yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs side by side, as llama.cpp's llama has them; transformers keeps the two halves of a head apart."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(rope: dict[str, Any], dim: int) -> np.ndarray:
    """By what each rotary frequency is divided, f32 [dim / 2]."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = np.array([context / (2 * math.pi * rope["rope_theta"] ** (i / dim)) for i in range(0, dim, 2)])
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def convert(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    kind, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"{source}: model_type {kind} is not converted")
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(target, kind)
    writer.add_name(source.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _tokenizer(writer, json.loads((source / "tokenizer.json").read_text()), config)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, dim))
    for name, words in tensors(source / "model.safetensors"):
        if name in NAMES:
            new = NAMES[name]
        else:
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            stem, part = rest.rsplit(".", 1)
            new = f"blk.{layer}.{LAYER[stem]}.{part}"
        if kind == "llama" and (".attn_q." in new or ".attn_k." in new):
            words = interleaved(words, heads if ".attn_q." in new else kv_heads)
        if words.ndim == 1:
            writer.add_tensor(new, (words.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(new, np.ascontiguousarray(words).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(writer: Any, file: dict[str, Any], config: dict[str, Any]) -> None:
    words = sorted(file["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {token["content"] for token in file["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word, _ in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)


def quantize(source: Path, target: Path, kind: str) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise RuntimeError(f"llama_model_quantize: {code}")


if __name__ == "__main__":
    what, source, target, *kind = sys.argv[1:]
    if what == "convert":
        convert(Path(source), Path(target))
    else:
        quantize(Path(source), Path(target), *kind)
