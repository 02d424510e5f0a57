"""Importing a whole ONNX graph: every operator that the logits depend on, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.compiler.frontends.aten import tidy
from inferloom.compiler.frontends.layout import Traced, natural_axes
from inferloom.compiler.frontends.onnx import arithmetic, layers, microsoft, moves  # noqa: F401  (fill LOWERINGS)
from inferloom.compiler.frontends.onnx.file import OnnxGraph, live_ops
from inferloom.compiler.frontends.onnx.importer import POISON, ROWS, TOKENS, Cache, Importer, OnnxLayouts, show
from inferloom.compiler.frontends.onnx.structure import Sample, Structure
from inferloom.ir.errors import UnsupportedError, VerifyError
from inferloom.ir.graph import Builder, Graph, Value
from inferloom.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """A graph, where its parameters come from, and what limits it."""

    graph: Graph
    sources: dict[str, Callable[[], np.ndarray] | np.ndarray]
    vocab_size: int
    #: Most tokens of a sequence, by the tables that positions index.
    most_positions: int | None


def import_graph(graph: OnnxGraph, structure: Structure, output: str, name: str, max_len: int) -> Imported:
    """Import all that `output` (logits [1, tokens, vocab]) depends on. UnsupportedError lists all that cannot be."""
    builder = Builder(name)
    im = Importer(graph, structure, builder, OnnxLayouts(builder), max_len)
    for label, sym in (("tokens", TOKENS), ("positions", TOKENS), ("logit_rows", ROWS)):
        builder.input(label, TensorType(DType.I32, (sym,)))
    shape = structure.shapes[structure.roles.tokens]
    im.env[structure.roles.tokens] = Traced(builder.inputs[0], shape, natural_axes(shape))
    im.env |= {cache: Cache(cache) for cache in structure.roles.caches}
    problems: dict[str, None] = {}
    for op in live_ops(graph, output):
        if any(hasattr(a, "node") for a in op.attrs.values()):
            raise UnsupportedError(f"{op} has branches or loops, which are not supported; export the decoder without them (of a "
                                   "merged decoder, take the one with past_key_values)")
        if op.key in ("Shape", "Size") or not structure.content.intersection(op.inputs):
            continue
        if any(im.env.get(i) is POISON for i in op.inputs):
            made: tuple[Any, ...] = (POISON,) * len(op.outputs)
        else:
            try:
                made = im.lower(op)
            except (UnsupportedError, VerifyError) as error:
                problems[f"{op}: {error}"] = None
                made = (POISON,) * len(op.outputs)
        for result, value in zip(op.outputs, made):
            im.env[result] = value
            if hasattr(value, "shape"):
                structure.shapes[result] = value.shape
    if problems:
        listed = list(problems)
        more = f"\n  ... and {len(listed) - 20} more" if len(listed) > 20 else ""
        raise UnsupportedError(f"{name} cannot be imported (docs/onnx.md says what can):\n  " + "\n  ".join(listed[:20]) + more)
    try:
        return _finish(im, output)
    except VerifyError as error:
        raise UnsupportedError(f"{name}: {error}") from None


def _finish(im: Importer, output: str) -> Imported:
    logits = im.need(output)
    if len([d for d in logits.shape if d != 1]) != 2 or logits.shape[-1] == TOKENS or TOKENS not in logits.shape:
        raise UnsupportedError(f"output {output!r} must be logits [batch, tokens, vocabulary] of all tokens; it is "
                               f"{show(logits.shape)}")
    value = im.layouts.arrange(logits, (logits.shape.index(TOKENS), len(logits.shape) - 1))
    vocab = int(str(logits.shape[-1]))
    for table, rows in im.token_rows.items():
        if rows < vocab:
            raise UnsupportedError(f"the embedding table {table!r} has {rows} rows, fewer than the {vocab} logits")
    graph = tidy(_only_rows(im.builder, value))
    sources: dict[str, Any] = {p.source: im.sources.get(p.source, im.buffers.get(p.source)) for p in graph.params}
    return Imported(graph, sources, vocab, min(im.position_rows.values(), default=None))


_BY_ROW = frozenset({"linear", "add", "sub", "mul", "div", "tanh", "cast", "rms_norm", "layer_norm", "reshape"})


def _only_rows(builder: Builder, logits: Value) -> Graph:
    """The graph with the rows of its logits picked as early as possible, before the output projection."""
    made_by = {v: n for n in builder.nodes for v in n.results}
    chain, at = [], logits
    while at in made_by and made_by[at].op in _BY_ROW:
        varying = [v for v in made_by[at].operands if v is not None and TOKENS in getattr(v.type, "shape", ())]
        if len(varying) != 1:
            break
        chain.append((made_by[at], varying[0]))
        at = varying[0]
    picked = builder.emit("gather_rows", at, builder.inputs[2])
    for node, source in reversed(chain):
        attrs: dict[str, Any] = dict(node.attrs)
        if "shape" in attrs:
            attrs["shape"] = tuple(ROWS if d is TOKENS else d for d in attrs["shape"])
        operands = [picked if v is source else v for v in node.operands]
        picked = builder.emit(node.op, *operands, loc=node.loc, **attrs)
    return builder.finish([picked])


def samples(has_caches: bool, max_len: int) -> tuple[Sample, ...]:
    """Lengths at which shapes and tables are compared: short ones, and the longest."""
    if has_caches:
        return Sample(0, 7), Sample(5, 3), Sample(13, 2), Sample(0, 11), Sample(max(max_len - 3, 17), 3)
    return Sample(0, 7), Sample(0, 11), Sample(0, max(max_len, 17))
