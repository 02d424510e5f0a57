"""A Hugging Face config from a GGUF file's metadata, and the name and form of each tensor.

Only what is known is read: a key of the architecture's own that has no meaning here is refused, since leaving one out
(a scale, a cap, a window) would change the model without a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.compiler.frontends.gguf.file import GgufFile, GgufTensor
from inferloom.ir.errors import UnsupportedError

#: Keys of every architecture. Those with "" say nothing that the tensors do not say, or nothing about the arithmetic.
_KEYS = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
         "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
         "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
         "attention.key_length": "", "attention.value_length": "", "rope.dimension_count": "", "rope.freq_base": "",
         "rope.scaling.type": "", "rope.scaling.factor": "", "rope.scaling.original_context_length": "",
         "rope.scaling.finetuned": "", "vocab_size": "", "expert_count": "", "expert_used_count": "",
         "tensor_data_layout": "", "pooling_type": ""}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
          "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
          "post_ffw_norm": "post_feedforward_layernorm"}
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp: the model type of transformers, and what differs from a plain Llama.

    `keys`: more keys of its metadata. `layer`: more names of a layer's tensors. `interleaved`: rotary halves of q and k lie
    in turns. `shifted_norms`: norms are stored as 1 + weight. `more`: options that depend on the metadata.
    """

    model_type: str
    keys: Mapping[str, str]
    layer: Mapping[str, str]
    interleaved: bool = False
    shifted_norms: bool = False
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "mistral"} if config.get("sliding_window") else {}


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": _scalar(config, 46)}


def _gemma3(config: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.pop("local_theta", 10000.0)}
    return {"query_pre_attn_scalar": _scalar(config, 62),
            "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local}}


def _scalar(config: Mapping[str, Any], deepest: int) -> int:
    """What attention scores are divided by the root of; the largest model of a family (27B) has its own, as llama.cpp has."""
    if config["num_hidden_layers"] == deepest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
         "attention.sliding_window": "sliding_window"}
FAMILIES = {
    "llama": Family("llama", {"attention.sliding_window": "sliding_window"}, {}, interleaved=True, more=_llama),
    "qwen2": Family("qwen2", {}, {}),
    "qwen3": Family("qwen3", {}, _QK_NORM),
    "gemma2": Family("gemma2", _CAPS, _GEMMA, shifted_norms=True, more=_gemma2),
    "gemma3": Family("gemma3_text", _CAPS | {"rope.freq_base_swa": "local_theta"}, _GEMMA | _QK_NORM, shifted_norms=True,
                     more=_gemma3),
}


def family(file: GgufFile) -> Family:
    """The architecture of a file; UnsupportedError lists those that are read."""
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise UnsupportedError(f"{file.path}: the architecture {name!r} is not read from GGUF; these are: "
                               f"{', '.join(FAMILIES)}. Any other compiles from its Hugging Face checkpoint")
    if int(file.metadata.get("split.count", 1)) > 1:
        raise UnsupportedError(f"{file.path} is one of {file.metadata['split.count']} parts: join them with llama-gguf-split "
                               "--merge")
    return FAMILIES[name]


def raw_config(file: GgufFile) -> dict[str, Any]:
    """What config.json of the model would say. UnsupportedError for what is missing or not known."""
    known, prefix = family(file), f"{file.metadata['general.architecture']}."
    keys = {**_KEYS, **known.keys}
    said = {name.removeprefix(prefix): value for name, value in file.metadata.items() if name.startswith(prefix)}
    unknown = {name: value for name, value in said.items() if name not in keys}
    if unknown:
        listed = ", ".join(f"{prefix}{name} = {value!r}"[:120] for name, value in sorted(unknown.items()))
        raise UnsupportedError(f"{file.path}: it is not known what these mean for the model: {listed}")
    if said.get("expert_count"):
        raise UnsupportedError(f"{file.path} has {said['expert_count']} experts; mixtures of experts are read from Hugging "
                               "Face checkpoints only")
    try:
        config = {keys[name]: _single(prefix + name, value) for name, value in said.items() if keys[name]}
        return _config(file, known, said, config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedError(f"{file.path}: the metadata do not describe a model: {error!r}") from None


def _config(file: GgufFile, known: Family, said: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    heads, embedding = config["num_attention_heads"], file.tensors["token_embd.weight"]
    head_dim = said.get("attention.key_length", config["hidden_size"] // heads)
    if {head_dim, said.get("attention.value_length", head_dim), said.get("rope.dimension_count", head_dim)} != {head_dim}:
        raise UnsupportedError(f"{file.path}: keys of {head_dim}, values of {said.get('attention.value_length')} and rotary "
                               f"embeddings of {said.get('rope.dimension_count')} numbers; they must be equal")
    config |= {"model_type": known.model_type, "head_dim": head_dim, "vocab_size": embedding.shape[0],
               "num_key_value_heads": config.get("num_key_value_heads", heads),
               "tie_word_embeddings": "output.weight" not in file.tensors, "rope_parameters": _rope(file, said, head_dim, config)}
    if known.model_type == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors}
    config |= known.more(config)
    tokens = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id", "eot_token_id",
                                                                          "eom_token_id")}
    ends = [tokens[k] for k in ("eos_token_id", "eot_token_id", "eom_token_id") if tokens[k] is not None]
    return config | {"bos_token_id": tokens["bos_token_id"], "eos_token_id": list(dict.fromkeys(ends)) or None}


def _single(name: str, value: Any) -> Any:
    """A number; a list of equal ones is one number for all layers."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UnsupportedError(f"{name} differs between layers: {value[:8]}")
        return value[0]
    return value


def _rope(file: GgufFile, said: Mapping[str, Any], head_dim: int, config: Mapping[str, Any]) -> dict[str, Any]:
    theta, kind = float(said.get("rope.freq_base", 10000.0)), said.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": float(said["rope.scaling.factor"])}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(said["rope.scaling.factor"]),
                 "original_max_position_embeddings": int(said["rope.scaling.original_context_length"])}
    elif kind != "none":
        raise UnsupportedError(f"{file.path}: rope.scaling.type {kind!r} is not read; none, linear and yarn are")
    if ROPE_FREQS not in file.tensors:
        return rope
    factors = _factors(file.tensors[ROPE_FREQS], head_dim)
    if kind != "none":
        raise UnsupportedError(f"{file.path} has both {ROPE_FREQS} and rope.scaling.type {kind!r}")
    # Llama 3's scaling, as the factor of each frequency: transformers takes such lists for longrope.
    return rope | {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
                   "original_max_position_embeddings": config["max_position_embeddings"]}


def _factors(tensor: GgufTensor, head_dim: int) -> list[float]:
    if tensor.type != 0 or tensor.shape != (head_dim // 2,):
        raise UnsupportedError(f"{tensor.path}: {tensor.name} is {list(tensor.shape)}, expected F32 [{head_dim // 2}]")
    return [float(f) for f in tensor.raw().view("<f4")]


def hf_name(known: Family, name: str) -> str | None:
    """transformers' name of a tensor; None when it is not known."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _MODEL:
        return f"{_MODEL[stem]}.{kind}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    part = {**_LAYER, **known.layer}.get(part, "")
    return f"model.layers.{block}.{part}.{kind}" if stem.startswith("blk.") and block.isdecimal() and part else None


def row_order(known: Family, name: str, rows: int, config: Mapping[str, Any]) -> np.ndarray | None:
    """The stored row of each row of q and k whose rotary halves lie in turns (h, i, half) instead of apart (h, half, i)."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if not known.interleaved or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    if rows % (2 * heads):
        raise UnsupportedError(f"{name} has {rows} rows, which are not {heads} heads of two halves")
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
