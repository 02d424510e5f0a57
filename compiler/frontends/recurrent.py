"""Hooks of state-space and linear-attention layers: transformers' functions become one op each.

The functions that modeling files share by name are replaced by compositions of custom ops, each of which is one op of
ir/ops/recurrent.py; what surrounds the recurrence (softplus, norms, skips) is traced as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferloom.compiler.frontends.aten import Importer, Traced, lowers
from inferloom.ir.errors import UnsupportedError

_OPS = {
    "causal_conv1d": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_attention": "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta, bool delta) -> Tensor",
    "selective_scan": "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c) -> Tensor",
    "linear_recurrence": "(Tensor x, Tensor a) -> Tensor",
    "wkv": "(Tensor k, Tensor v, Tensor decay, Tensor bonus) -> Tensor",
}


def _define(name: str, schema: str, like: int) -> None:
    torch.library.define(f"inferloom::{name}", schema)
    torch.library.register_fake(f"inferloom::{name}", lambda *args: torch.empty_like(args[like], dtype=torch.float32))

    @lowers(f"inferloom.{name}.default")
    def lower(im: Importer, *args: Any) -> Traced:
        delta = {"delta": args[-1]} if name == "linear_attention" else {}
        tensors = [im.traced(a) if a is not None else None for a in (args[:-1] if delta else args)]
        values = [None if t is None else im.layouts.arrange(t, range(len(t.shape))) for t in tensors]
        made = im.emit(name, *values, slot=im.slots, **delta)
        im.slots += 1
        return Traced(made, im.result_shape, tuple(range(len(im.result_shape))))


for _name, _schema in _OPS.items():
    _define(_name, _schema, 2 if _name == "linear_attention" else 0)


def _only(where: str, kwargs: dict[str, Any], *harmless: str) -> None:
    for name, given in kwargs.items():
        if name not in harmless and given is not None and given is not False:
            raise UnsupportedError(f"{where} is given {name}, which inferloom does not know")


def conv1d(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
           **kwargs: Any) -> Tensor:
    """causal_conv1d_fn: x [1, channels, tokens], weight [channels, width]."""
    from transformers.activations import ACT2FN

    _only("causal_conv1d_fn", kwargs, "seq_idx", "position_embeddings")
    out = torch.ops.inferloom.causal_conv1d(hidden_states.squeeze(0).transpose(0, 1), weight.transpose(0, 1), bias)
    out = out.transpose(0, 1).unsqueeze(0)
    return out if activation is None else ACT2FN[activation](out)


def mamba2(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
           dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
           dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False, **kwargs: Any) -> Any:
    """mamba2_chunk_scan: x [1, tokens, heads, dim], dt [1, tokens, heads], B and C [1, tokens, groups, n]."""
    _only("mamba2_chunk_scan", kwargs | {"initial_states": initial_states}, "seq_idx")
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    if dt_limit != (0.0, float("inf")):
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x = hidden_states.squeeze(0)
    dt = dt.squeeze(0)
    out = torch.ops.inferloom.linear_attention(C.squeeze(0), B.squeeze(0), x * dt[..., None], A * dt, None, False)
    out = (out if D is None else out + x * D[..., None]).unsqueeze(0)
    return (out, None) if return_final_states else out


def mamba(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
          z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
          return_last_state: bool = False, use_mambapy: bool = False, use_associative_scan: bool = False,
          **kwargs: Any) -> Any:
    """mamba_selective_scan: x, dt, z [1, channels, tokens], A [channels, n], B and C [1, n, tokens]."""
    _only("mamba_selective_scan", kwargs)
    x, dt, b, c = (t.squeeze(0).transpose(0, 1) for t in (hidden_states, dt, B, C))
    dt = dt if delta_bias is None else dt + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    out = torch.ops.inferloom.selective_scan(x, dt, A.transpose(0, 1), b, c)
    out = out if D is None else out + x * D
    out = out.transpose(0, 1).unsqueeze(0)
    out = out if z is None else out * F.silu(z)
    return (out, None) if return_last_state else out


def delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
               initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
               **kwargs: Any) -> tuple[Tensor, None]:
    """torch_chunk_gated_delta_rule and chunk_kimi_delta_attention: q, k [1, tokens, groups, dk], v [1, tokens, heads, dv],
    beta [1, tokens, heads], g like beta, or with a last axis of dk."""
    _only("the gated delta rule", kwargs | {"initial_state": initial_state}, "cu_seqlens", "position_embeddings")
    q, k = query.squeeze(0), key.squeeze(0)
    if use_qk_l2norm_in_kernel:
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    out = torch.ops.inferloom.linear_attention(q * query.shape[-1] ** -0.5, k, value.squeeze(0), g.squeeze(0), beta.squeeze(0),
                                               True)
    return out.unsqueeze(0), None


def rg_lru(self: Any, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, recurrent_states: Tensor | None,
           acc_dtype: torch.dtype = torch.float32) -> tuple[Tensor, None]:
    """RecurrentGemma's `_rnn_scan`: x and gate [1, tokens, channels], reset where a sequence begins."""
    gate = recurrent_gate * ~reset
    return torch.ops.inferloom.linear_recurrence(hidden_states.squeeze(0), gate.squeeze(0)).unsqueeze(0), None


def gemma_block(self: Any, input_states: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The forward of RecurrentGemma's recurrent block."""
    x = self.linear_x(input_states).transpose(1, 2)
    x = conv1d(x, self.conv_1d.weight.squeeze(1), self.conv_1d.bias).transpose(1, 2)
    return self.linear_out(self.rg_lru(x, position_ids) * self.act_fn(self.linear_y(input_states))), None


def lightning(self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None,
              past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
    """The forward of MiniMax's lightning attention."""
    mixed = self.act_fn(self.qkv_proj(hidden_states)).squeeze(0).unflatten(1, (self.num_attention_heads, 3 * self.head_dim))
    q, k, v = mixed.split(self.head_dim, dim=2)
    decay = q[..., 0] * 0.0 - self.slope_rate.reshape(-1)  # one for each token, as others have it
    out = torch.ops.inferloom.linear_attention(q, k, v, decay, None, False)
    out = self.norm(out.flatten(1).unsqueeze(0))
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * out), None


def wkv(time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Any = None,
        return_state: bool = False) -> tuple[Tensor, None]:
    """rwkv_linear_attention: key and value [1, tokens, channels]."""
    out = torch.ops.inferloom.wkv(key.squeeze(0), value.squeeze(0), -torch.exp(time_decay), time_first)
    return out.unsqueeze(0), None


def _mixed(self: Any, hidden: Tensor, *names: str) -> list[Tensor]:
    """RWKV's token shift: each of `names` has its own mixture of a token and the one before it."""
    x = hidden.squeeze(0)
    ones = torch.ones(1, x.shape[1])
    before = torch.ops.inferloom.causal_conv1d(x, torch.cat([ones, ones * 0]), None).unsqueeze(0)
    return [hidden * mix + before * (1 - mix) for mix in (getattr(self, f"time_mix_{name}") for name in names)]


def rwkv_inputs(self: Any, hidden: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Tensor, None]:
    """RwkvSelfAttention.extract_key_value."""
    key, value, receptance = _mixed(self, hidden, "key", "value", "receptance")
    return torch.sigmoid(self.receptance(receptance)), self.key(key), self.value(value), None


def rwkv_feed_forward(self: Any, hidden: Tensor, state: Any = None) -> tuple[Tensor, None]:
    """The forward of RwkvFeedForward."""
    key, receptance = _mixed(self, hidden, "key", "receptance")
    return torch.sigmoid(self.receptance(receptance)) * self.value(torch.square(torch.relu(self.key(key)))), None


def rwkv_as_stored(self: Any) -> None:
    """RwkvModel._rescale_layers halves weights and activations together, to keep fp16 from overflowing: not here."""


#: Module-level functions of modeling files, by name.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": conv1d, "mamba2_chunk_scan": mamba2, "mamba_selective_scan": mamba,
    "torch_chunk_gated_delta_rule": delta_rule, "chunk_kimi_delta_attention": delta_rule,
    "rwkv_linear_attention": wkv,
}
