"""The passes from lower-attention down keep a graph's meaning, whole and in chunks, in fp32 and bf16."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from inferloom.compiler.passes import group_kernels, lower_attention, lower_precision, pack_weights, page_state
from inferloom.compiler.plan import Rows, plan_memory
from inferloom.compiler.report import Report
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph
from inferloom.ir.interpret import interpret
from inferloom.ir.types import DType, StateType, Sym, TensorType
from tests.compiler.graphs import paged_inputs, random_params, tiny_llama

BLOCK = 16


def lowered(graph: Graph, dtype: DType, inputs: DType | None = None) -> Graph:
    report = Report()
    packing = pack_weights.Packing(64, 32, {DType.F32: 1, DType.BF16: 2})
    for step in (lower_attention.run, partial(lower_precision.run, dtype=dtype, inputs=inputs),
                 partial(page_state.run, dtype=dtype, block_tokens=BLOCK, seqs=4, blocks_per_seq=4),
                 partial(pack_weights.run, packing=packing), group_kernels.run):
        graph = step(graph, report)
    return graph


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype,inputs,tolerance", [(DType.F32, None, 1e-4), (DType.BF16, None, 5e-2),
                                                    (DType.BF16, DType.F32, 5e-2)])
def test_lowering_keeps_meaning(tied: bool, dtype: DType, inputs: DType | None, tolerance: float) -> None:
    graph = tiny_llama(tied=tied, window=5)
    params = random_params(graph)
    ids = np.random.default_rng(1).integers(0, 131, 23)
    rows = np.array([0, 7, 22])
    (want,) = interpret(graph, {"tokens": ids, "positions": np.arange(23), "logit_rows": rows}, params)
    low = lowered(graph, dtype, inputs)
    got, *_ = interpret(low, paged_inputs(low, ids, 0, None, BLOCK, rows), params)
    assert np.abs(got - want).max() <= tolerance * want.std()
    names = [v.name for v in low.inputs if isinstance(v.type, StateType)]
    state, last = None, None
    for begin, end in ((0, 9), (9, 10), (10, 23)):
        inputs = paged_inputs(low, ids[begin:end], begin, state, BLOCK, np.array([end - begin - 1]))
        last, *new = interpret(low, inputs, params)
        state = dict(zip(names, new, strict=True))
    assert np.abs(last - want[2]).max() <= tolerance * want.std()


def test_linear_layers_read_what_the_target_wants() -> None:
    for inputs in (DType.BF16, DType.F32):
        bodies = [n.attrs["body"] for n in lowered(tiny_llama(), DType.BF16, inputs).nodes if n.op == "kernel"]
        linear = [n for body in bodies if isinstance(body, Graph) for n in body.nodes if n.op == "packed_linear"]
        types = [(x.type.dtype, w.type.dtype) for x, w, *_ in (n.operands for n in linear)]  # type: ignore[union-attr]
        assert len(types) > 4 and set(types) == {(inputs, DType.BF16)}


def test_kernels_per_layer() -> None:
    """One kernel each for: norm, qkv, rotary + cache write, attention, output + residual, norm, gate-up, down."""
    counts = [sum(n.op == "kernel" for n in lowered(tiny_llama(layers=n), DType.BF16).nodes) for n in (1, 2, 3)]
    assert counts[1] - counts[0] == counts[2] - counts[1] == 8


def test_plan_never_overlaps_live_values() -> None:
    graph = lowered(tiny_llama(layers=3), DType.F32)
    plan = plan_memory(graph, Rows(64, 4096))
    last: dict[object, int] = {v: len(plan.kernels) for v in graph.outputs}
    for i, node in enumerate(plan.kernels):
        last.update({v: i for v in node.operands if last.get(v, -1) < i})
    spans = []
    for i, node in enumerate(plan.kernels):
        for value in node.results:
            place = plan.places[value]
            if place.space == "workspace":
                size = value.type.shape[0].bound * place.ld * value.type.dtype.itemsize  # type: ignore[union-attr]
                spans.append((i, last.get(value, i), place.offset, place.offset + size))
                assert place.offset % 64 == 0 and place.offset + size <= plan.workspace
    for a in spans:
        for b in spans:
            if a is not b and a[0] <= b[1] and b[0] <= a[1]:
                assert a[3] <= b[2] or b[3] <= a[2]


def test_unknown_variant_is_refused() -> None:
    b = Builder("g")
    q = b.input("q", TensorType(DType.F32, (Sym("tokens", 4), 1, 8)))
    graph = b.finish([b.emit("attention", q, q, q, scale=1.0, slot=0, variant="mystery")])
    with pytest.raises(UnsupportedError, match="mystery"):
        lower_attention.run(graph, Report())
