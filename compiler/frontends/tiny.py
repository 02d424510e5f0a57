"""Small configurations of every causal language model that transformers has, found by rules and not by a list.

A configuration starts from the architecture's own defaults. Numbers are shrunk by what they are called, lists with an
entry a layer are cut to one layer of each kind. What the defaults turn on (experts, windows, hybrids) stays on.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LONGEST, WINDOW = 131, 64, 4, 2, 16, 96, 256, 7
LEAST_LAYERS = 2

#: (pattern of a field's name, value); the first that matches holds. None keeps the default.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size|.*token_type.*|segment_types|prompt_.*", None),
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    (r"(pad|eos|bos|sep|eod)_token_id|decoder_start_token_id|forced_.*_token_id", 2),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads|num_query_groups", KV_HEADS),
    (r"(num_attention_heads|n_heads?|num_heads|swa_num_attention_heads|linear_num_value_heads|linear_num_heads|"
     r"mamba_n_heads|encoder_attention_heads|decoder_attention_heads|index_n_heads)", HEADS),
    (r"n_mamba_heads", 2),
    (r"head_dim|kv_channels|swa_head_dim|linear_(key_|value_)?head_dim|dim_head|v_head_dim|qk_nope_head_dim|"
     r"attention_head_dim|index_head_dim|global_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", HEAD_DIM + 8),
    (r"mamba_d_head|mamba_head_dim", 32),
    (r"q_lora_rank|o_lora_rank|gated_norm_rank", 24),
    (r"kv_lora_rank", 32),
    (r"mamba_d_ssm", 128),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"n_groups|mamba_n_groups|mamba_num_groups", 1),
    (r"time_step_rank|mamba_dt_rank|laurel_rank|hidden_size_per_layer_input", 8),
    (r"lru_width", HIDDEN),
    (r"hidden_size|n_embd|d_model|dim_model|attention_hidden_size|embedding_size|word_embed_proj_dim|dim_model_base", HIDDEN),
    (r"(moe_|shared_)?(expert_|shared_expert_|shared_experts_)?(ffn_)?(hidden|intermediate)_size(_mlp)?|n_inner|ffn_dim|"
     r"ffn_hidden_size|intermediate_size|(encoder|decoder)_ffn_dim|dim_ff|dff|expert_ffn_hidden_size", INNER),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|moe_num_primary_experts)", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts", 2),
    (r"n_group|num_expert_group", 2), (r"topk_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|zero_expert_num", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", -1),
    (r"global_attn_every_n_layers|attn_layer_period|layer_group_size|(_)?sliding_window_pattern|full_attention_interval|"
     r"no_rope_layer_interval|global_attn_every", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mem_blocks", 0),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|original_max_position_embeddings|"
     r"max_sequence_length|seq_length", LONGEST),
    (r"sliding_window(_size)?|window_size|attention_window_size", WINDOW),
    (r"attention_chunk_size", 8),
    (r"max_window_layers", 1),
    (r"query_pre_attn_scalar", 24),
    (r".*(dropout|pdrop|layerdrop).*", 0.0),
)
#: What architectures leave open and then need.
_UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS, "n_routed_experts": 8, "num_experts_per_tok": 2,
          "n_shared_experts": 1}
#: What rules cannot know: fields that follow from others.
_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": KV_HEADS, "rope_theta": 10000.0}},
    "falcon_h1": {"mamba_d_head": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": 32,
              "attention_hidden_size": 128, "num_key_value_heads": HEADS},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
               "num_mem_blocks": 1, "attention_head_dim": 32, "attention_hidden_size": 128, "mamba_headdim": 16,
               "n_mamba_heads": 8, "num_key_value_heads": HEADS, "adapter_rank": 8},
}
_META = ("_", "transformers_version", "architectures", "model_type", "id2label", "label2id")
_DEPTH = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "decoder_layers")


def architectures() -> list[str]:
    """Model types that transformers can load as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(model_type: str) -> Any:
    """A small configuration of an architecture. Raises what transformers raises when it accepts none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return _shrunk(kind())


def _shrunk(default: Any) -> Any:
    given = default.to_dict()
    depth = next((name for name in _DEPTH if isinstance(given.get(name), int)), "")
    layers = _layers(given, given[depth]) if depth else []
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name == "is_decoder":
            value = True
        held = vars(default).get(name, value)
        if value is None:
            value = _UNSET.get(name)
        if value is None or name.startswith(_META):
            continue
        if name in (depth, "num_hidden_layers"):
            changed[name] = max(len(layers), LEAST_LAYERS)
        elif isinstance(value, list) and depth and len(value) == given[depth]:
            changed[name] = [value[i] for i in layers]
        elif name == "per_layer_config":
            changed[name] = {new: value[key] for new, i in enumerate(layers) for key in value if int(key) == i}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            changed[name] = _number(name, value)
        elif hasattr(held, "to_dict"):
            changed[name] = _nested(held)
        else:
            changed[name] = value
    if "qk_rope_head_dim" in given:  # latent attention has no groups, and heads as wide as what is rotated
        changed |= {name: value for name, value in (("num_key_value_heads", HEADS), ("head_dim", 8)) if name in given}
    if {"expand", "num_heads", "head_dim"} <= given.keys():
        changed["head_dim"] = HIDDEN * given["expand"] // HEADS
    return type(default)(**changed | _FIELDS.get(default.model_type, {}))


def _nested(config: Any) -> Any:
    """A part of a configuration, which may know less of its fields than it needs."""
    made = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(made, name, _number(name, value))
    return made if isinstance(made, dict) or not hasattr(config, "num_hidden_layers") else _shrunk(config)


def _number(name: str, value: float) -> Any:
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            keep = small is None or value == 0 and not name.endswith("_id")
            return value if keep else small if name.endswith("_id") else min(value, small)
    return value


def _layers(given: dict[str, Any], count: int) -> list[int]:
    """The first layer of each kind, by all lists that have an entry a layer; at least two."""
    lists = [value for value in given.values() if isinstance(value, list) and len(value) == count]
    kinds = dict.fromkeys(tuple(str(each[i]) for each in lists) for i in range(count)) if lists else {}
    first = [next(i for i in range(count) if tuple(str(each[i]) for each in lists) == kind) for kind in kinds]
    return sorted({*first, *range(min(count, LEAST_LAYERS))} if len(first) < LEAST_LAYERS else first)


def model(model_type: str, seed: int = 0) -> Any:
    """The small model in float32 with random weights that give activations of about one; norms and biases random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = config(model_type)
    made._attn_implementation = "eager"
    built = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in built.named_parameters():
            if parameter.dim() > 1:
                gain = 1.0 if "embed" in path else 1.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(gain * torch.randn_like(parameter))
            elif not re.search(r"A_log|dt_bias|\bD\b|decay|slope", path):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built
