"""Models without weights."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig

from inferloom.compiler.frontends.skeleton import LARGE, build_skeleton


def test_experts_of_any_size_take_no_memory() -> None:
    """A layer's experts are one parameter: half a terabyte here."""
    config = Qwen3MoeConfig(vocab_size=97, hidden_size=4096, moe_intermediate_size=4096, num_experts=4096, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = build_skeleton(config)
    largest = max(p.numel() for p in model.parameters())
    assert largest == 4096 * 2 * 4096 * 4096 > LARGE
    assert not any(b.is_meta for b in model.buffers())
    assert not torch.empty(LARGE + 1, dtype=torch.int8).is_meta  # only while a model is made
