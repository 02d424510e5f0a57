"""The attention kernel against its NumPy reference: variants, groupings and head sizes, whole and token by token."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import DType
from tests.targets.attention_cases import CASES, Batch, body
from tests.targets.single import STORED, aligned
from tests.targets.tvm.bodies import Kernels

#: An attention kernel takes LLVM seconds.
QUICK = {"causal", "bf16", "odd_bf16", "many_queries_of_one_key", "unclamped_window", "alibi", "sinks_window", "chosen",
         "documents", "prefix"}


def pack(held: KVArrays, stride: int) -> np.ndarray:
    """The pool's bytes for arrays of state; block b begins at b * stride."""
    t = held.type
    pair = 2 if t.dtype is DType.BF16 else 1
    tiles = (len(held.k) // t.block_tokens, t.block_tokens // 16, 16, t.heads)
    k = held.k.reshape(*tiles, t.k_dim // pair, pair).transpose(0, 3, 1, 4, 2, 5).reshape(tiles[0], t.heads, tiles[1], -1)
    v = held.v.reshape(*tiles, t.v_dim).transpose(0, 3, 1, 2, 4).reshape(tiles[0], t.heads, tiles[1], -1)
    data = np.concatenate([k, v], -1)
    if t.latent:
        data = held.k.reshape(*tiles, t.k_dim).transpose(0, 3, 1, 2, 4)
    stored = np.ascontiguousarray(data.astype(STORED[t.dtype]))
    pool = aligned(tiles[0] * stride)
    pool.reshape(tiles[0], stride)[:, :t.bytes_per_block] = stored.reshape(tiles[0], -1).view(np.uint8)
    return pool


def tiles(starts: np.ndarray) -> np.ndarray:
    return np.array([(s, t, min(16, starts[s + 1] - t)) for s in range(len(starts) - 1)
                     for t in range(starts[s], starts[s + 1], 16)], np.int32)


@cache
def compiled(name: str) -> Kernels:
    return Kernels("attention", {name: body(CASES[name])})


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_matches_reference_and_tokens_are_independent(name: str) -> None:
    kernels = compiled(name)
    case, batch = CASES[name], Batch(CASES[name])
    pool = {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)}
    inputs = batch.inputs() | pool
    counts = {"tokens": len(batch.q), "seqs": 3}
    (got,) = kernels.run(name, inputs, counts, {"q_tiles": tiles(batch.starts)})
    (want,) = kernels.want(name, inputs | {"state": batch.state})
    relative = 2.0**-7 if case.dtype is DType.BF16 else 1e-5
    assert np.abs(got - want).max() <= relative * np.abs(want).max()
    for seq, token in ((0, 0), (1, 0), (1, 7), (1, 20), (2, 17)):
        alone = kernels.run(name, batch.one(seq, token) | pool, {"tokens": 1, "seqs": 1},
                            {"q_tiles": np.array([[0, 0, 1]], np.int32)})
        assert np.array_equal(alone[0][0], got[batch.starts[seq] + token])


def test_query_heads_are_split() -> None:
    """A chunk for each key head, and for every eight query heads that share one."""
    mult = {name: compiled(name).infos[name].grid.mult for name in ("causal", "many_queries_of_one_key")}
    assert mult == {"causal": 2, "many_queries_of_one_key": 3}


def test_blocks_that_nobody_chose_are_not_read() -> None:
    case, batch = CASES["chosen"], Batch(CASES["chosen"])
    counts, more = {"tokens": len(batch.q), "seqs": 3}, {"q_tiles": tiles(batch.starts)}
    stride = batch.state.type.bytes_per_block + 128
    (want,) = compiled("chosen").run("chosen", batch.inputs() | {"state": pack(batch.state, stride)}, counts, more)
    batch.spoil_blocks_that_nobody_chose(case)
    (got,) = compiled("chosen").run("chosen", batch.inputs() | {"state": pack(batch.state, stride)}, counts, more)
    assert np.array_equal(got, want)
