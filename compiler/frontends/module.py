"""The module front end: any `nn.Module` that maps (tokens, positions) to logits becomes a graph.

Attention is `F.scaled_dot_product_attention(..., is_causal=True)` on [heads, tokens, dim] (or with a leading batch
of one), or `hooks.attention` on [tokens, heads, dim], which also knows windows, soft-caps, sinks and ALiBi.
`models/plain.py` is an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from inferloom.compiler.frontends import hooks
from inferloom.compiler.frontends.aten import import_program
from inferloom.compiler.frontends.huggingface import ROWS, TOKENS, TracedModel, export, sources_of
from inferloom.compiler.frontends.weights import ArraySource
from inferloom.ir.errors import UnsupportedError


class _Step(nn.Module):
    """Runs the module on ids and positions i64[tokens] and picks the wanted rows of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.model(ids, positions)[rows]


def trace_module(module: nn.Module, *, vocab_size: int, max_model_len: int, name: str = "",
                 eos_token_ids: tuple[int, ...] = (), bos_token_id: int | None = None,
                 tokenizer_files: Mapping[str, Path] | None = None) -> TracedModel:
    """Trace `module(tokens i64[tokens], positions i64[tokens]) -> logits [tokens, vocab_size]`.

    The module runs as one sequence while it is traced; compiled, the tokens are a ragged batch, so it must mix
    tokens in attention only. It is traced in its eval mode, in float32; its weights are read from it as they are.
    Raises UnsupportedError for operators that are unknown, or results of another shape.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedError(f"expected an nn.Module, got {type(module).__name__}")
    if max_model_len < 1:
        raise UnsupportedError(f"max_model_len={max_model_len} must be at least 1")
    lower = [n for n, p in module.named_parameters() if p.dtype != torch.float32]
    if lower:
        raise UnsupportedError(f"modules are traced in float32; convert with .float() first: {', '.join(lower[:5])}")
    training = module.training
    ids = torch.zeros(7, dtype=torch.int64)
    try:
        with hooks.sdpa_installed():
            program = export(_Step(module).eval(), (ids, torch.arange(7), torch.zeros(3, dtype=torch.int64)), 0)
    finally:
        module.train(training)
    title = name or type(module).__name__
    sources = sources_of(module)
    imported = import_program(program, name=title, tokens=TOKENS, rows=ROWS, sources=sources, prefix="model.")
    out = imported.graph.outputs[0].type
    if getattr(out, "shape", None) != (ROWS, vocab_size):
        raise UnsupportedError(f"{title} must return logits [tokens, {vocab_size}]; its rows are {out}")
    arrays: dict[str, np.ndarray | Callable[[], np.ndarray]] = dict(imported.buffers)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for source in {p.source for p in imported.graph.params} - set(imported.buffers):
        arrays[source] = partial(_read, parameters[source])
    return TracedModel(imported.graph, ArraySource(arrays), title, type(module).__name__, vocab_size, max_model_len,
                       eos_token_ids, bos_token_id, dict(tokenizer_files or {}))


def _read(parameter: nn.Parameter) -> np.ndarray:
    return parameter.detach().cpu().numpy()
