"""A small model of attention layers alone, as a front end would hand it to the compiler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferloom.checks.proofs import ENDS, PREFIX, facts_of
from inferloom.compiler.frontends.huggingface import TracedModel
from inferloom.compiler.frontends.weights import ArraySource
from inferloom.compiler.passes import lower_attention
from inferloom.compiler.plugins import Plugin
from inferloom.compiler.report import Report
from inferloom.ir.graph import Builder, Graph
from inferloom.ir.interpret import interpret
from inferloom.ir.types import DType, Sym, TensorType
from inferloom.runtime.facts import Facts

VOCAB, LAYERS = 97, 2


def attention_model(heads: int = 4, kv_heads: int = 2, dim: int = 16, longest: int = 160) -> TracedModel:
    """Embeddings, two layers of attention with random weights, logits: [tokens, 97]."""
    b, rng = Builder("attention"), np.random.default_rng(0)
    hidden = heads * dim
    tokens, rows = Sym("tokens", 1), Sym("rows", 1)
    ids, _, wanted = (b.input(name, TensorType(DType.I32, (size,))) for name, size in (
        ("tokens", tokens), ("positions", tokens), ("logit_rows", rows)))
    arrays: dict[str, np.ndarray] = {}

    def weight(name: str, n: int, k: int):  # type: ignore[no-untyped-def]
        arrays[name] = (rng.standard_normal((n, k)) * (1.5 / k**0.5)).astype(np.float32)
        return b.param(name, TensorType(DType.F32, (n, k)))

    x = b.emit("embedding", ids, weight("embed", VOCAB, hidden))
    for i in range(LAYERS):
        q, k, v = (b.emit("reshape", b.emit("linear", x, weight(f"{i}.{part}", count * dim, hidden)), shape=(tokens, count, dim))
                   for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        o = b.emit("attention", q, k, v, scale=dim**-0.5, slot=i, loc=f"layer {i}")
        o = b.emit("reshape", o, shape=(tokens, hidden))
        x = b.emit("add", x, b.emit("linear", o, weight(f"{i}.o", hidden, hidden)))
    graph = b.finish([b.emit("linear", b.emit("gather_rows", x, wanted), weight("head", VOCAB, hidden), name="logits")])
    return TracedModel(graph, ArraySource(arrays), "attention", "attention", VOCAB, longest, (), None, {})


def meaning(model: TracedModel, plugins: Sequence[Plugin]) -> Graph:
    """The model-level graph as the passes leave it, its attention spelled out."""
    graph, report = model.graph, Report()
    for plugin in plugins:
        graph = plugin.run(graph, report) if plugin.run is not None else graph
    return lower_attention.run(graph, report, [p.variant for p in plugins if p.variant is not None])


def reference(model: TracedModel, plugins: Sequence[Plugin], ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] of one sequence by the dense NumPy references of the ops."""
    graph, at = meaning(model, plugins), np.arange(len(ids), dtype=np.int32)
    facts = facts_of(graph)
    told = dict(zip(facts, Facts(facts, PREFIX, ENDS).of(ids.tolist(), 0, len(ids)), strict=True))
    params = {p.source: model.weights.load(p.source) for p in graph.params}
    (logits,) = interpret(graph, {"tokens": ids, "positions": at, "logit_rows": at, **told}, params)
    return np.asarray(logits)
