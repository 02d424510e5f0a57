"""A plain definition of a decoder for the module front end: grouped-query attention, rotary positions, SwiGLU.

    model = PlainDecoder(PlainConfig(vocab_size=1000))
    traced = trace_module(model, vocab_size=1000, max_model_len=256)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferloom.compiler.frontends.hooks import attention


@dataclass(frozen=True, slots=True)
class PlainConfig:
    """Sizes of a decoder; `window` > 0 lets each token see that many, itself included."""

    vocab_size: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    inner: int = 128
    rope_theta: float = 10000.0
    eps: float = 1e-6
    window: int = 0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [tokens, heads, dim] by cos, sin [tokens, dim/2] (Su et al. 2021, halves)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class PlainLayer(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm, both added to the stream [tokens, width]."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        kv = config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.width, config.eps)
        self.qkv = nn.Linear(config.width, config.width + 2 * kv, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.RMSNorm(config.width, config.eps)
        self.gate_up = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (c.heads + 2 * c.kv_heads, c.head_dim))
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if c.window:
            mixed = attention(q, k, v, window=c.window)
        else:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
        x = x + self.out(mixed.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainDecoder(nn.Module):
    """`model(tokens i64[tokens], positions i64[tokens]) -> logits [tokens, vocab]`, embeddings tied."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta ** -steps, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None] * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))
