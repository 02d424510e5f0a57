"""The one table of hooks that make a model trace into one op per attention.

transformers' attention interface is routed to the custom op `inferloom::attention`; families that compute
attention by hand get a replacement from `FAMILIES` for the time of the trace. `attention` is the function for
models of one's own.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferloom.compiler.frontends import recurrent
from inferloom.ir.errors import UnsupportedError

NAME = "inferloom"

torch.library.define(
    "inferloom::attention",
    "(Tensor q, Tensor k, Tensor v, float scale, int window, int chunk, float softcap, Tensor? sinks, "
    "Tensor? alibi) -> Tensor")


@torch.library.register_fake("inferloom::attention")
def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, chunk: int, softcap: float,
           sinks: Tensor | None, alibi: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.impl("inferloom::attention", "CompositeExplicitAutograd")
def _eager(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, chunk: int, softcap: float,
           sinks: Tensor | None, alibi: Tensor | None) -> Tensor:
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if softcap:
        score = torch.tanh(score / softcap) * softcap
    i = torch.arange(tokens, device=q.device)[:, None]
    j = torch.arange(tokens, device=q.device)[None]
    if alibi is not None:
        score = score + alibi.float()[:, None, None] * (j - i)
    seen = j <= i
    if window:
        seen = seen & (i - j < window)
    if chunk:
        seen = seen & (i // chunk == j // chunk)
    score = score.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks.float().view(heads, 1, 1).expand(heads, tokens, 1)], -1)
    weight = score.softmax(-1)[..., :tokens]
    return torch.einsum("hqk,khd->qhd", weight, v.float()).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int = 0, chunk: int = 0,
              softcap: float = 0.0, sinks: Tensor | None = None, alibi: Tensor | None = None) -> Tensor:
    """Causal attention of q [tokens, H, dk] over k [tokens, Hkv, dk], v [tokens, Hkv, dv] -> [tokens, H, dv].

    `scale` defaults to dk^-0.5; `window`, `chunk` and `softcap` are off at 0; `sinks` and `alibi` are per head
    [H]. Run eagerly, all tokens are one sequence that starts at position 0; compiled, they are a ragged batch.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.inferloom.attention(q, k, v, float(scale), int(window), int(chunk), float(softcap), sinks, alibi)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`attention` of tensors [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    q, k, v = (t.transpose(1, 2).squeeze(0) for t in (q, k, v))
    return attention(q, k, v, **options).unsqueeze(0)


#: Keywords that transformers passes along and that change nothing for a causal decoder.
_IGNORED = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits",
                      "output_hidden_states", "num_items_in_batch", "return_dict", "past_key_values"})


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
               softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None,
               **kwargs: Any) -> tuple[Tensor, None]:
    """The function registered with transformers; raises on whatever it does not understand."""
    where = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedError(f"{where} passes an attention mask; only causal and windowed attention are known")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal is False:
        raise UnsupportedError(f"{where} is not causal; only causal language models are supported")
    for name, given in kwargs.items():
        if name not in _IGNORED and given is not None and given is not False:
            raise UnsupportedError(f"{where} passes {name!r} to its attention, which inferloom does not know")
    window, chunk = int(sliding_window or 0), 0
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and layer is not None and layer < len(kinds):
        if kinds[layer] == "sliding_attention" and not window:
            raise UnsupportedError(f"{where} is a sliding-window layer but passes no sliding_window")
        if kinds[layer] == "full_attention" and window:
            raise UnsupportedError(f"{where} is a full-attention layer but passes sliding_window={window}")
        if kinds[layer] == "chunked_attention":
            chunk = int(getattr(config, "attention_chunk_size"))
    out = _one_sequence(query, key, value, scale=scaling, window=window, chunk=chunk, softcap=softcap or 0.0,
                        sinks=s_aux)
    return out, None


torch.library.define("inferloom::expert_linear",
                     "(Tensor x, Tensor weight, Tensor choice, Tensor? bias, bool transposed) -> Tensor")


@torch.library.register_fake("inferloom::expert_linear")
def _expert_shape(x: Tensor, weight: Tensor, choice: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(choice.shape[0], choice.shape[1], weight.shape[2 if transposed else 1])


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' experts do, over the experts that each token has chosen: [tokens, choices, ...]."""
    if module.has_post_expert_norm or getattr(module, "_is_expert_parallel", False):
        raise UnsupportedError(f"{type(module).__name__} norms each expert's output, or shares experts out to devices")

    def linear(x: Tensor, name: str) -> Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return torch.ops.inferloom.expert_linear(x, getattr(module, name), top_k_index, bias, module.is_transposed)

    up = linear(hidden_states.unsqueeze(1), "gate_up_proj" if module.has_gate else "up_proj")
    down = linear(module._apply_gate(up) if module.has_gate else module.act_fn(up), "down_proj")
    return (down * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _after_padding(forward: Any) -> Any:
    """RoBERTa's embeddings count positions from the one after the padding's, unless they are given."""

    def moved(self: Any, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        return forward(self, *args, position_ids=position_ids + (self.padding_idx + 1), **kwargs)

    return moved


def _bloom(self: Any, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    if self.pretraining_tp > 1 and self.slow_but_exact:
        raise UnsupportedError("bloom with slow_but_exact=True")
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    out = _one_sequence(q, k, v, scale=self.inv_norm_factor, alibi=_get_alibi_slopes(self.num_heads, None))
    return self.dense(out.flatten(2)) + residual, None


def _mpt(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (t.unflatten(2, (self.n_heads, self.head_dim)).squeeze(0) for t in mixed.chunk(3, dim=2))
    out = attention(q, k, v, scale=self.softmax_scale, alibi=mpt_slopes(self.n_heads))
    return self.out_proj(out.flatten(1).unsqueeze(0)), None


def mpt_slopes(heads: int, bias_max: float = 8.0) -> Tensor:
    """ALiBi slopes f32 [heads] as MPT orders them when `heads` is not a power of two."""
    full = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** -(torch.arange(1, full + 1, dtype=torch.float32) * (bias_max / full))
    return slopes if full == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def _falcon(self: Any, hidden_states: Tensor, alibi: Tensor | None, *args: Any, position_embeddings: Any = None,
            **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    fused = self.query_key_value(hidden_states)
    if self.new_decoder_architecture:
        group = self.num_heads // self.num_kv_heads
        fused = fused.unflatten(2, (self.num_kv_heads, group + 2, self.head_dim))
        q, k, v = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    else:
        q, k, v = self._split_heads(fused)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    slopes = None
    if self.config.alibi:
        # Falcon was trained with slopes in bf16, and scales them as it scales the scores.
        slopes = _get_alibi_slopes(self.num_heads, None).bfloat16().float() * self.inv_norm_factor
    else:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = _one_sequence(q, k, v, scale=self.inv_norm_factor, alibi=slopes)
    return self.dense(out.flatten(2)), None


def _by_hand(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The `_attn(query [1, H, tokens, D], ...)` method of gpt_neo and gpt_neox_japanese."""
    window = 0
    if type(self).__name__ == "GPTNeoSelfAttention":
        scale = 1.0
        window = int(self.config.window_size) if self.attention_type == "local" else 0
    else:
        scale = 1.0 / float(self.norm_factor)
    return _one_sequence(query, key, value, scale=scale, window=window).transpose(1, 2), None


def _openai_gpt(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    scale = value.shape[-1] ** -0.5 if self.scale else 1.0
    return [_one_sequence(query, key.transpose(2, 3), value, scale=scale).transpose(1, 2)]  # keys come transposed


def _xglm(self: Any, hidden_states: Tensor, key_value_states: Tensor | None = None, *args: Any,
          **kwargs: Any) -> tuple[Tensor, None]:
    if key_value_states is not None:
        raise UnsupportedError("xglm attends to an encoder")
    q, k, v = (project(hidden_states).unflatten(2, (self.num_heads, self.head_dim)).squeeze(0)
               for project in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(attention(q, k, v, scale=self.scaling).flatten(1).unsqueeze(0)), None


def _xglm_positions(self: Any, position_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
    """The table is long enough for all positions that the model was made for."""
    return F.embedding(position_ids + self.offset, self.weights)


def _text_only(self: Any, freq: Tensor) -> Tensor:
    """Rotary angles of a text's tokens, whose places in time, height and width are one."""
    return torch.cat((freq[0], freq[0]), -1)


def _unread_mask(*args: Any, **kwargs: Any) -> Tensor:
    """A mask for models that convert it before the replaced attention ignores it."""
    return torch.zeros(())


Patch = tuple[str, str, Callable[..., Any]]

#: Module suffix of a family -> (class, or "" for the module; attribute; what replaces it while tracing). Masks and
#: ALiBi tensors that a family still builds are dead code then, which the importer leaves out.
FAMILIES: dict[str, tuple[Patch, ...]] = {
    "bloom.modeling_bloom": (("BloomAttention", "forward", _bloom),),
    "mpt.modeling_mpt": (("MptAttention", "forward", _mpt), ("", "create_causal_mask", _unread_mask)),
    "falcon.modeling_falcon": (("FalconAttention", "forward", _falcon),),
    "gpt_neo.modeling_gpt_neo": (("GPTNeoSelfAttention", "_attn", _by_hand),),
    "gpt_neox_japanese.modeling_gpt_neox_japanese": (("GPTNeoXJapaneseAttention", "_attn", _by_hand),),
    "openai.modeling_openai": (("Attention", "_attn", _openai_gpt),),
    "xglm.modeling_xglm": (("XGLMAttention", "forward", _xglm),
                           ("XGLMSinusoidalPositionalEmbedding", "forward", _xglm_positions)),
    "minimax.modeling_minimax": (("MiniMaxLightningAttention", "forward", recurrent.lightning),),
    "recurrent_gemma.modeling_recurrent_gemma": (("RecurrentGemmaRglru", "_rnn_scan", recurrent.rg_lru),
                                                 ("RecurrentGemmaRecurrentBlock", "forward", recurrent.gemma_block)),
    "rwkv.modeling_rwkv": (("RwkvSelfAttention", "extract_key_value", recurrent.rwkv_inputs),
                           ("RwkvFeedForward", "forward", recurrent.rwkv_feed_forward),
                           ("RwkvModel", "_rescale_layers", recurrent.rwkv_as_stored)),
    "qwen3_5.modeling_qwen3_5": (("Qwen3_5TextRotaryEmbedding", "recomposition_frequencies", _text_only),),
    "qwen3_5_moe.modeling_qwen3_5_moe": (("Qwen3_5MoeTextRotaryEmbedding", "recomposition_frequencies", _text_only),),
}


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(NAME, _interface)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


@contextlib.contextmanager
def installed(model: Any) -> Iterator[None]:
    """Route the attention of a transformers model to `inferloom::attention`; everything is restored on exit."""
    _register()
    undo: list[tuple[Any, str, Any]] = []
    files = {type(m).__module__ for m in model.modules()}
    before = model.config._attn_implementation, model.config._experts_implementation
    try:
        for file in files:
            for attribute, new in recurrent.FUNCTIONS.items():
                if hasattr(sys.modules[file], attribute):
                    undo.append((sys.modules[file], attribute, getattr(sys.modules[file], attribute)))
                    setattr(sys.modules[file], attribute, new)
        for suffix, patches in FAMILIES.items():
            for name in files:
                if not name.endswith(suffix):
                    continue
                for owner_name, attribute, new in patches:
                    owner = getattr(sys.modules[name], owner_name) if owner_name else sys.modules[name]
                    undo.append((owner, attribute, vars(owner)[attribute]))
                    setattr(owner, attribute, new)
        for owner in {type(m) for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")}:
            undo.append((owner, "forward", vars(owner)["forward"]))
            owner.forward = _after_padding(owner.forward)
        _set_implementation(model, NAME, NAME)
        yield
    finally:
        for owner, attribute, old in reversed(undo):
            setattr(owner, attribute, old)
        _set_implementation(model, *before)


def _set_implementation(model: Any, attention: str | None, experts: str | None) -> None:
    """As `set_attn_implementation`, which refuses families that do not declare support for other back ends."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = attention
            config._experts_implementation_internal = experts


@contextlib.contextmanager
def sdpa_installed() -> Iterator[None]:
    """Route `F.scaled_dot_product_attention(..., is_causal=True)` to `inferloom::attention` while tracing."""
    with _Sdpa():
        yield


class _Sdpa(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
          is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """scaled_dot_product_attention of [heads, tokens, dim] or [1, heads, tokens, dim]."""
    if attn_mask is not None or not is_causal:
        raise UnsupportedError("scaled_dot_product_attention needs is_causal=True and no attn_mask; use "
                               "inferloom.compiler.frontends.hooks.attention for windows, sinks and ALiBi")
    if query.dim() not in (3, 4) or (query.dim() == 4 and query.shape[0] != 1):
        raise UnsupportedError(f"scaled_dot_product_attention of shape {tuple(query.shape)}: expected "
                               "[heads, tokens, dim] or [1, heads, tokens, dim]")
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        raise UnsupportedError("query and key differ in heads but enable_gqa is not set")
    q, k, v = (t if t.dim() == 4 else t.unsqueeze(0) for t in (query, key, value))
    out = _one_sequence(q, k, v, scale=scale).transpose(1, 2)
    return out if query.dim() == 4 else out.squeeze(0)
