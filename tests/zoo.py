"""Tiny configs of the architectures that tests trace: hidden 64, vocabulary 131, two or three layers."""

from __future__ import annotations

from typing import Any

import torch

_BASE = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GATED = _BASE | {"intermediate_size": 96, "num_key_value_heads": 2}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

#: name -> (model_type, config). Windows are smaller than the longest test sequence (23).
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "llama_tied_bias": ("llama", _GATED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("llama", _GATED | {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", _GATED | {"sliding_window": 7, "head_dim": 32}),
    "qwen2": ("qwen2", _GATED),
    "qwen2_window": ("qwen2", _GATED | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7,
                                        "max_window_layers": 1}),
    "qwen3": ("qwen3", _GATED | {"head_dim": 32}),
    "phi3": ("phi3", _GATED | {"sliding_window": 7}),
    "gemma": ("gemma", _GATED | {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", _GATED | {"head_dim": 32, "sliding_window": 7, "query_pre_attn_scalar": 24,
                                   "num_hidden_layers": 3}),
    "gemma3_text": ("gemma3_text", _GATED | {"head_dim": 32, "sliding_window": 7, "query_pre_attn_scalar": 24,
                                             "num_hidden_layers": 3, "layer_types": [
                                                 "sliding_attention", "full_attention", "sliding_attention"]}),
    "olmo2": ("olmo2", _GATED),
    "granite": ("granite", _GATED | {"embedding_multiplier": 3.0, "attention_multiplier": 0.3,
                                     "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "smollm3": ("smollm3", _GATED | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "cohere": ("cohere", _GATED | {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("cohere2", _GATED | {"logit_scale": 0.5, "sliding_window": 7, "num_hidden_layers": 3,
                                     "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "stablelm": ("stablelm", _GATED | {"use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", _GATED | {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", _GATED | {"sliding_window": 7}),
    "gpt2": ("gpt2", {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
                      "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neo": ("gpt_neo", {"vocab_size": 131, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 7,
                            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
                            "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("gpt_neox", _BASE | {"intermediate_size": 96}),
    "gptj": ("gptj", {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
                      "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("opt", _BASE | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt_projected": ("opt", _BASE | {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "falcon": ("falcon", _BASE | {"alibi": False, "new_decoder_architecture": False, "multi_query": True,
                                  "parallel_attn": True}),
    "falcon_new": ("falcon", _BASE | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", _BASE | {"alibi": True, "new_decoder_architecture": False, "multi_query": False,
                                        "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {"vocab_size": 131, "hidden_size": 72, "n_layer": 2, "n_head": 6, "bos_token_id": 1,
                        "eos_token_id": 2}),
    "codegen": ("codegen", {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8,
                            "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "mpt": ("mpt", {"vocab_size": 131, "d_model": 72, "n_layers": 2, "n_heads": 6, "max_seq_len": 64,
                    "expansion_ratio": 4}),
    "glm4": ("glm4", _GATED | {"head_dim": 32}),
    "openai_gpt": ("openai-gpt", {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "xglm": ("xglm", {"vocab_size": 131, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4,
                      "max_position_embeddings": 64}),
    "ministral3": ("ministral3", _GATED | {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1}}),
    "gpt_bigcode": ("gpt_bigcode", {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                    "bos_token_id": 1, "eos_token_id": 2}),
}
#: Mixtures of experts: routers by softmax and sigmoid, in groups, with shared experts, biases, interleaved gates.
_EXPERTS = _GATED | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
ZOO |= {
    "mixtral": ("mixtral", _GATED | {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "olmoe": ("olmoe", _GATED | {"num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", _GATED | {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 7,
                                     "layer_types": ["sliding_attention", "full_attention"]}),
    "granitemoe": ("granitemoe", _GATED | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "glm4_moe": ("glm4_moe", _EXPERTS | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
                                         "first_k_dense_replace": 1}),
    "phimoe": ("phimoe", _GATED | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "dots1_groups": ("dots1", _EXPERTS | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
                                   "first_k_dense_replace": 1}),
}
#: Latent attention.
_LATENT = _BASE | {"intermediate_size": 96, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32,
                   "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}
ZOO |= {
    "minicpm3": ("minicpm3", _LATENT),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                              "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", _LATENT | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                              "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
}
#: State-space, linear-attention and convolution layers, alone and with attention between them.
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2 = _MAMBA | {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
          "layer_types": ["linear_attention", "full_attention"]}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", _BASE | {"state_size": 8, "intermediate_size": 96, "time_step_rank": 8}),
    "mamba2": ("mamba2", _BASE | {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "jamba": ("jamba", _GATED | _MAMBA | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
                                          "attn_layer_offset": 1, "mamba_dt_rank": 8}),
    "bamba": ("bamba", _GATED | _MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", _GATED | _MAMBA2 | {"mamba_d_ssm": 128}),
    "qwen3_next": ("qwen3_next", _EXPERTS | _DELTA | {"num_experts": 4, "shared_expert_intermediate_size": 48}),
    "kimi_linear": ("kimi_linear", _BASE | {
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_experts": 4, "num_experts_per_token": 2,
        "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"]}),
    "recurrent_gemma": ("recurrent_gemma", _GATED | {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 7,
                                                     "head_dim": 16}),
    "minimax": ("minimax", _GATED | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                                     "layer_types": ["linear_attention", "full_attention"]}),
    "rwkv": ("rwkv", {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64,
                      "intermediate_size": 96, "rescale_every": 0, "context_length": 256}),
    "lfm2": ("lfm2", _GATED | {"layer_types": ["conv", "full_attention"]}),
}
ZOO |= RECURRENT
#: Decoders of families that mostly are encoders: token types, positions that begin after the padding's.
ZOO |= {
    "roberta": ("roberta", _BASE | {"intermediate_size": 96, "is_decoder": True}),
    "bart": ("bart", {"vocab_size": 131, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4,
                      "decoder_ffn_dim": 96, "max_position_embeddings": 256, "is_encoder_decoder": False,
                      "is_decoder": True, "num_hidden_layers": 2}),
}
#: Families that need no options of their own.
ZOO |= {name: (name, _GATED | {"head_dim": 16}) for name in (
    "olmo", "olmo3", "exaone4", "helium", "nemotron", "ernie4_5", "seed_oss", "hunyuan_v1_dense", "glm", "phi",
    "persimmon", "biogpt", "arcee", "bitnet", "vaultgemma", "ministral", "cwm", "jais2", "diffllama", "nanochat")}

ZOO["diffllama_pairs"] = ("diffllama", _GATED | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8})


def config(name: str, layers: int = 0) -> Any:
    """A fresh transformers config of one entry, with another (even) number of layers when `layers` is given."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, options = ZOO[name]
    options = dict(options)
    if layers:
        depth = next(k for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in options)
        options[depth] = layers
        for kinds in ("layer_types", "mlp_layer_types", "no_rope_layers"):
            if kinds in options:
                options[kinds] = (options[kinds] * layers)[:layers]
        if "attention_types" in options:
            options["attention_types"] = [[options["attention_types"][0][0], layers // 2]]
    return CONFIG_MAPPING[model_type](**options)


def build(name: str, seed: int = 0) -> Any:
    """The model of one entry in float32 with random weights, norms and biases included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = config(name)
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if path.endswith("weight") and "gemma" not in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in path else 1.5)
                                / parameter.shape[-1] ** 0.5)
    return model
