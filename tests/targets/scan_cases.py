"""Recurrent kernels: bodies, and a check of a ragged batch that code generators share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Value
from inferloom.ir.ops.recurrent import PAGED, STATE_OF, RecurrentArrays
from inferloom.ir.types import DType, Sym, TensorType, cast_array
from tests.targets.single import TOKENS, Bodies, Body, layout, tensor

SEQS = Sym("seqs", 8)
PAGES = 9
#: Tokens of each sequence in the step, tokens before it, and the pages that are read and written.
COUNTS, DONE, READ_WRITE = (5, 1, 9, 3), (0, 7, 30, 2), ((8, 2), (4, 4), (3, 7), (0, 5))


def recurrent(op: str, *operands: tuple[object, ...] | None, dtype: DType = DType.F32, weights: tuple[int, ...] = (),
              **attrs: object) -> Body:
    """A body of one op: a shape without rows for `weights`, with rows for the other operands."""

    def emit(b: Builder) -> Sequence[Value]:
        values: list[Value | None] = []
        for i, shape in enumerate(operands):
            if shape is None:
                values.append(None)
            elif i in weights:
                values.append(b.input(f"x{i}", tensor(*shape)))
            else:
                # What scales the state stays float32, as `dt` and `decay` of models do.
                narrow = DType.F32 if op != "causal_conv1d" and i in (1, 3, 4) and op != "linear_attention" else dtype
                values.append(b.input(f"x{i}", tensor(TOKENS, *shape, dtype=narrow)))
        state = b.input("state", STATE_OF[op](*(v.type if v is not None else None for v in values), **attrs))
        steps = [b.input("seq_starts", TensorType(DType.I32, (SEQS + 1,))), b.input("kv_lens", TensorType(DType.I32, (SEQS,))),
                 b.input("pages", TensorType(DType.I32, (SEQS, 2)))]
        return b.emit_node(PAGED + op, [state, *steps, *values], attrs).results

    return emit


BODIES: dict[str, Body] = {
    "conv": recurrent("causal_conv1d", (40,), (4, 40), (40,), weights=(1, 2)),
    "conv_odd": recurrent("causal_conv1d", (150,), (3, 150), weights=(1,)),
    "conv_bf16": recurrent("causal_conv1d", (64,), (4, 64), dtype=DType.BF16, weights=(1,)),
    "ssd": recurrent("linear_attention", (2, 16), (2, 16), (4, 24), (4,), delta=False),
    "ssd_bf16": recurrent("linear_attention", (1, 32), (1, 32), (4, 16), (4,), dtype=DType.BF16, delta=False),
    "delta": recurrent("linear_attention", (2, 12), (2, 12), (4, 10), (4,), (4,), delta=True),
    "delta_rows": recurrent("linear_attention", (3, 16), (3, 16), (3, 80), (3, 16), (3,), delta=True),
    "beta": recurrent("linear_attention", (2, 128), (2, 128), (2, 64), (2,), (2,), delta=False),
    "selective": recurrent("selective_scan", (96,), (96,), (16, 96), (16,), (16,), weights=(2,)),
    "selective_odd": recurrent("selective_scan", (133,), (133,), (6, 133), (6,), (6,), weights=(2,)),
    "wkv": recurrent("wkv", (96,), (96,), (96,), (96,), weights=(2, 3)),
    "wkv_odd": recurrent("wkv", (7,), (7,), (7,), (7,), weights=(2, 3)),
    "linear": recurrent("linear_recurrence", (96,), (96,)),
    "linear_odd": recurrent("linear_recurrence", (7,), (7,)),
}


def check(kernels: Bodies, name: str, counts: Sequence[int] = COUNTS, exact: bool = True) -> None:
    """A ragged batch against the reference, state and all; then the same tokens in two steps: bit for bit if `exact`."""
    made, rng = kernels.graphs[name], np.random.default_rng(3)
    (node,) = made.nodes
    (state,) = (v for v in made.inputs if v.name == "state")
    stride = layout(state).block_stride
    # Products of matrices round their operands.
    rounding = 0.0 if exact or made.inputs[0].type.dtype is DType.F32 else ops.BF16_RELATIVE
    starts = np.cumsum([0, *counts]).astype(np.int32)
    rows: dict[str, np.ndarray] = {}
    for i, value in enumerate(node.operands[4:]):
        if value is None:
            continue
        assert isinstance(value.type, TensorType)
        shape = [d if isinstance(d, int) else int(starts[-1]) for d in value.type.shape]
        x = rng.standard_normal(shape).astype(np.float32) * 0.5
        scales = {"paged_linear_attention": {3}, "paged_selective_scan": {1, 2}, "paged_linear_recurrence": {1}, "paged_wkv": {2}}
        if i in scales.get(node.op, ()):
            x = np.abs(x) if node.op == "paged_selective_scan" and i == 1 else -np.abs(x)
        if node.op == "paged_linear_attention" and i in (0, 1):
            x /= np.sqrt(shape[-1])
        if node.op == "paged_wkv" and i == 0:
            x *= 60  # weights that overflow unless the largest is taken out
        rows[value.name] = cast_array(x, value.type.dtype).astype(np.float32)
    before = rng.standard_normal((PAGES, *state.type.shape)).astype(np.float32)  # type: ignore[union-attr]

    def pool() -> np.ndarray:
        made = np.zeros((PAGES, stride), np.uint8)
        made[:, :before[0].nbytes] = before.reshape(PAGES, -1).view(np.uint8)
        return made.reshape(-1)

    def held(memory: np.ndarray) -> np.ndarray:
        assert not memory.reshape(PAGES, stride)[:, before[0].nbytes:].any(), "written into another layer's state"
        return memory.reshape(PAGES, stride)[:, :before[0].nbytes].copy().view(np.float32).reshape(before.shape)

    def near(got: np.ndarray, want: np.ndarray) -> None:
        tolerance = ops.get(node.op).tolerance
        np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol + rounding * np.abs(want).max())

    def step(memory: np.ndarray, first: Sequence[int], last: Sequence[int], pages: Sequence[tuple[int, int]]) -> np.ndarray:
        who = [np.arange(starts[i] + a, starts[i] + b) for i, (a, b) in enumerate(zip(first, last))]
        at = np.concatenate(who)
        weights = {v.name for v in made.inputs if isinstance(v.type, TensorType) and isinstance(v.type.shape[0], int)}
        inputs = {k: x if k in weights else x[at] for k, x in rows.items()} | {
            "seq_starts": np.cumsum([0, *map(len, who)]).astype(np.int32),
            "kv_lens": np.array([d + b for d, b in zip(DONE, last)], np.int32),
            "pages": np.array(pages, np.int32), "state": memory}
        (got,) = kernels.run(name, inputs, {"tokens": len(at), "seqs": len(who)})
        if first == [0] * len(counts) and last == list(counts):
            want, after = kernels.want(name, inputs | {"state": RecurrentArrays(before, state.type)})
            near(got, want)
            near(held(memory), after.data)
        return got

    memory, half = pool(), [-(-n // 3) for n in counts]
    whole = step(memory, [0] * len(counts), list(counts), READ_WRITE)
    again = pool()
    one = step(again, [0] * len(counts), half, READ_WRITE)
    two = step(again, half, list(counts), [(w, w) for _, w in READ_WRITE])
    parts, sizes = [], [n - h for n, h in zip(counts, half)]
    for i in range(len(counts)):
        a, b = sum(half[:i]), sum(sizes[:i])
        parts += [one[a:a + half[i]], two[b:b + sizes[i]]]
    for got, want in ((held(again), held(memory)), (np.concatenate(parts), whole)):
        if exact:
            assert np.array_equal(got, want)
        else:
            near(got, want)
