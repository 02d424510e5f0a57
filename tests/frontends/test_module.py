"""The module front end: plain definitions of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inferloom.compiler.frontends import hooks
from inferloom.compiler.frontends.module import trace_module
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.interpret import interpret
from inferloom.ir.verify import verify
from inferloom.models.plain import PlainConfig, PlainDecoder


def run(traced, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    params = {p.source: np.asarray(traced.weights.load(p.source), np.float32) for p in traced.graph.params}
    inputs = {"tokens": tokens, "positions": np.arange(len(tokens), dtype=np.int32), "logit_rows": rows}
    return interpret(traced.graph, inputs, params)[0]


@pytest.mark.parametrize("window", [0, 5])
def test_plain_decoder_matches_eager(window: int) -> None:
    torch.manual_seed(0)
    model = PlainDecoder(PlainConfig(vocab_size=131, window=window))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5) + (p.dim() == 1))
    traced = trace_module(model, vocab_size=131, max_model_len=64, eos_token_ids=(2,))
    verify(traced.graph, "model")
    assert traced.architecture == "PlainDecoder" and traced.vocab_size == 131 and model.training
    assert sum(p.source == "embed.weight" for p in traced.graph.params) == 1
    assert not any(p.source == "head.weight" for p in traced.graph.params), "the tied weight is one parameter"
    for length in (1, 5, 23):
        tokens = np.random.default_rng(length).integers(0, 131, length).astype(np.int32)
        with torch.no_grad():
            want = model(torch.from_numpy(tokens).long(), torch.arange(length)).numpy()
        rows = np.array([length - 1, 0], np.int32)
        assert np.abs(run(traced, tokens, rows) - want[rows]).max() <= 1e-4 * want.std()


class Mixes(nn.Module):
    """Mixes tokens outside of attention in two ways, neither of which a ragged batch may do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x.cumsum(0)
        y = x - self.embed(positions).mean(0, keepdim=True)
        return F.linear(y, self.embed.weight)


def test_all_unknown_operators_are_listed_with_place() -> None:
    with pytest.raises(UnsupportedError) as error:
        trace_module(Mixes(), vocab_size=11, max_model_len=8)
    text = str(error.value)
    assert "aten.cumsum.default" in text and "aten.mean.dim" in text and "reduction over the tokens" in text
    assert "test_module.py:" in text


class Masked(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.causal = causal

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)[None]
        mask = None if self.causal else torch.ones(1, 1, 1, dtype=torch.bool)
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=self.causal)
        return F.linear(x[0], self.embed.weight)


def test_masks_are_refused() -> None:
    trace_module(Masked(True), vocab_size=11, max_model_len=8)
    with pytest.raises(UnsupportedError, match="is_causal=True and no attn_mask"):
        trace_module(Masked(False), vocab_size=11, max_model_len=8)


def test_wrong_shape_and_dtype_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="must return logits"):
        trace_module(Masked(True), vocab_size=12, max_model_len=8)
    with pytest.raises(UnsupportedError, match="float32"):
        trace_module(Masked(True).bfloat16(), vocab_size=11, max_model_len=8)
    with pytest.raises(UnsupportedError, match="max_model_len"):
        trace_module(Masked(True), vocab_size=11, max_model_len=0)
    with pytest.raises(UnsupportedError, match="nn.Module"):
        trace_module(lambda x: x, vocab_size=11, max_model_len=8)  # type: ignore[arg-type]


def test_attention_function_matches_torch() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, h, 16, generator=g) for h in (4, 2, 2))
    want = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    assert torch.allclose(hooks.attention(q, k, v), want.transpose(0, 1), atol=1e-5)
    assert not torch.allclose(hooks.attention(q, k, v, window=3), want.transpose(0, 1), atol=1e-2)
