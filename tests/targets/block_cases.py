"""Means of blocks of keys and scores of queries: bodies, and a check that code generators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from inferloom.ir.graph import Builder, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import RecurrentArrays
from inferloom.ir.types import DType, RecurrentType, cast_array
from tests.targets.attention_cases import BLOCK, COLUMNS, SEQS, TOKENS, Batch, Case, tensor
from tests.targets.single import Bodies, Body, layout

#: The blocks that a sequence completes in the step: none, one of a prompt's middle, all of a new one.
LENS, COUNTS = (70, 69, 64), (1, 21, 64)
CASES = {"f32": Case(), "bf16": Case(6, 2, 24, 24, DType.BF16), "odd": Case(3, 3, 6, 10)}


def _steps(b: Builder) -> list[Value]:
    i32 = DType.I32
    return [b.input("seq_starts", tensor(SEQS + 1, dtype=i32)), b.input("kv_lens", tensor(SEQS, dtype=i32))]


def _means(b: Builder, case: Case) -> Value:
    return b.input("means", RecurrentType(DType.F32, (case.kv_heads, case.k_dim)))


def bodies(case: Case) -> dict[str, Body]:
    def means(b: Builder) -> Sequence[Value]:
        held, state, steps = _means(b, case), b.input("state", case.state), _steps(b)
        tables = [b.input(name, tensor(SEQS, COLUMNS, dtype=DType.I32)) for name in ("block_tables", "own_tables")]
        return [b.emit("block_means", held, state, *steps, *tables)]

    def scores(b: Builder) -> Sequence[Value]:
        q = b.input("q", tensor(TOKENS, case.heads, case.k_dim, dtype=case.stored))
        held, steps = _means(b, case), _steps(b)
        own = b.input("own_tables", tensor(SEQS, COLUMNS, dtype=DType.I32))
        return [b.emit("block_scores", q, held, *steps, own, block=BLOCK)]

    return {"means": means, "scores": scores}


def check(kernels: Bodies, case: Case, pack: Callable[[KVArrays, int], np.ndarray],
          tiles: Callable[[np.ndarray], np.ndarray]) -> None:
    """Means of the blocks that are complete and of no others, and the scores of all tokens against them."""
    batch, rng = Batch(case, lens=LENS, counts=COUNTS), np.random.default_rng(1)
    pages = len(batch.tables.reshape(-1)) + 1
    own = rng.permutation(pages)[:batch.tables.size].astype(np.int32).reshape(batch.tables.shape)
    type = RecurrentType(DType.F32, (case.kv_heads, case.k_dim))
    held = RecurrentArrays(rng.standard_normal((pages, *type.shape)).astype(np.float32), type)
    inputs = {"q": batch.q, "seq_starts": batch.starts, "kv_lens": batch.lens, "block_tables": batch.tables, "own_tables": own}
    counts, more = {"tokens": len(batch.q), "seqs": len(LENS)}, {"q_tiles": tiles(batch.starts)}

    (state,) = (v for v in kernels.graphs["means"].inputs if v.name == "means")
    stride = layout(state).block_stride
    pool = np.zeros((pages, stride), np.uint8)
    pool[:, :held.data[0].nbytes] = held.data.reshape(pages, -1).view(np.uint8)
    memory = pool.reshape(-1).copy()
    keys = pack(batch.state, batch.state.type.bytes_per_block + 128)
    kernels.run("means", inputs | {"means": memory, "state": keys}, counts, more)
    (want,) = kernels.want("means", inputs | {"means": held, "state": batch.state})
    got = memory.reshape(pages, stride)[:, :held.data[0].nbytes].copy().view(np.float32).reshape(held.data.shape)
    np.testing.assert_allclose(got, want.data, rtol=1e-5, atol=1e-6)
    changed = {int(p) for p in np.flatnonzero((got != held.data).any((1, 2)))}
    assert changed == {int(own[1, 1]), *own[2, :2].tolist()}

    (scores,) = kernels.run("scores", inputs | {"means": pool.reshape(-1)}, counts, more)
    (wanted,) = kernels.want("scores", inputs | {"means": held})
    np.testing.assert_allclose(scores, cast_array(wanted, DType.F32), rtol=1e-5, atol=1e-5)
