"""Choosing blocks of keys: by hand, and over paged state against one whole sequence."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import RecurrentArrays
from inferloom.ir.ops.sparse import NEVER, OWN, chosen_blocks
from inferloom.ir.types import DType, RecurrentType, StateType, TensorType

BLOCK, HEADS, DIM = 16, 2, 6
STATE, MEANS = StateType(DType.F32, HEADS, DIM, DIM, BLOCK), RecurrentType(DType.F32, (HEADS, DIM))


def test_chosen_blocks_by_hand() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((70, 4, DIM)).astype(np.float32), rng.standard_normal((70, HEADS, DIM)).astype(np.float32)
    chosen = chosen_blocks(q, k, np.arange(70), BLOCK, 2)
    for token in range(70):
        for head in range(HEADS):
            own = token // BLOCK
            query = q[token, 2 * head:2 * head + 2].sum(0)
            met = {b: float(query @ k[b * BLOCK:(b + 1) * BLOCK, head].mean(0)) for b in range(own)}
            best = {own, *sorted(met, key=lambda b: -met[b])[:2]}
            seen = {int(j) // BLOCK for j in np.flatnonzero(chosen[token, head, :(own + 1) * BLOCK])}
            assert seen == best


def test_paged_against_whole() -> None:
    """In two steps over blocks that lie anywhere, the same blocks are chosen as in one sequence."""
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((70, 4, DIM)).astype(np.float32), rng.standard_normal((70, HEADS, DIM)).astype(np.float32)
    tables, own = (rng.permutation(9)[:5].astype(np.int32)[None] for _ in range(2))
    means, places = RecurrentArrays(rng.standard_normal((9, HEADS, DIM)).astype(np.float32), MEANS), []
    for begin, end in ((0, 37), (37, 70)):
        state = KVArrays.zeros(STATE, 9)
        at = np.arange(end)
        state.k[tables[0][at // BLOCK] * BLOCK + at % BLOCK] = k[:end]
        step = (np.array([0, end - begin], np.int32), np.array([end], np.int32))
        (means,) = ops.run_reference("block_means", [means, state, *step, tables, own], {})
        (scores,) = ops.run_reference("block_scores", [q[begin:end], means, *step, own], {"block": BLOCK})
        assert (scores[0, :, begin // BLOCK] == OWN).all() and (scores[0, :, begin // BLOCK + 1:] == NEVER).all()
        places.append(ops.run_reference("topk", [scores], {"k": 3})[1])
    named = (np.concatenate(places)[..., None] == np.arange(70) // BLOCK).any(2)
    visible = np.arange(70)[None, None] <= np.arange(70)[:, None, None]
    assert np.array_equal(named & visible, chosen_blocks(q, k, np.arange(70), BLOCK, 2) & visible)


def test_what_does_not_fit() -> None:
    i32 = [TensorType(DType.I32, shape) for shape in ((3,), (2,), (2, 4), (2, 4))]
    with pytest.raises(VerifyError, match=r"means must be \[2, 6\]"):
        ops.infer("block_means", [RecurrentType(DType.F32, (2, 5)), STATE, *i32], {})
    with pytest.raises(VerifyError, match="q must be"):
        ops.infer("block_scores", [TensorType(DType.F32, (7, 3, DIM)), MEANS, *i32[:3]], {"block": BLOCK})
