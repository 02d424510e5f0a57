"""Recurrent ops: a ragged batch in pieces gives what each sequence gives as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.expr import Var, tanh
from inferloom.ir.ops.recurrent import PAGED, RecurrentArrays
from inferloom.ir.types import DType, RecurrentType, Sym, TensorType


def test_causal_conv1d() -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((23, 5), (5, 4), (5,)))
    attrs = ops.get("causal_conv1d").check_attrs({"slot": 0, "activation": tanh(Var("x"))})
    padded = np.concatenate([np.zeros((3, 5)), x])
    want = np.stack([(padded[t:t + 4] * weight.T).sum(0) + bias for t in range(23)])
    (got,) = ops.run_reference("causal_conv1d", [x, weight, bias], attrs)
    np.testing.assert_allclose(got, np.tanh(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_pieces_of_ragged_batches_give_the_whole(dtype: DType) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, 4)).astype(np.float32)
    sequences = [rng.standard_normal((n, 5)).astype(np.float32) for n in (9, 1, 6)]
    attrs = ops.get(PAGED + "causal_conv1d").check_attrs({})
    state = RecurrentArrays(rng.standard_normal((8, 3, 5)).astype(np.float32), RecurrentType(dtype, (3, 5)))
    done, made, pages = [0, 0, 0], [[], [], []], [5, 0, 3]
    for counts, written in (((4, 1, 1), (5, 2, 3)), ((2, 0, 3), (5, 2, 7)), ((3, 0, 2), (1, 2, 7))):
        who = [i for i in range(3) if counts[i]]
        rows = np.concatenate([sequences[i][done[i]:done[i] + counts[i]] for i in who])
        starts = np.cumsum([0, *(counts[i] for i in who)])
        lens = np.array([done[i] + counts[i] for i in who])
        before = state.data.copy()
        out, state = ops.run_reference(PAGED + "causal_conv1d", [
            state, starts, lens, np.array([[pages[i], written[i]] for i in who]), rows, weight, None], attrs)
        kept = [p for p in range(8) if p not in [written[i] for i in who]]
        assert np.array_equal(state.data[kept], before[kept])
        for n, i in enumerate(who):
            made[i].append(out[starts[n]:starts[n + 1]])
            done[i], pages[i] = done[i] + counts[i], written[i]
    whole = ops.get("causal_conv1d").check_attrs({"slot": 0})
    for sequence, parts in zip(sequences, made):
        (want,) = ops.run_reference("causal_conv1d", [sequence, weight, None], whole)
        np.testing.assert_allclose(np.concatenate(parts), want, atol=1e-6 if dtype is DType.F32 else 0.05)


def test_state_must_fit() -> None:
    seqs, i32 = Sym("seqs", 4), DType.I32
    steps = [TensorType(i32, (seqs + 1,)), TensorType(i32, (seqs,)), TensorType(i32, (seqs, 2))]
    rows, weight = TensorType(DType.F32, (Sym("tokens", 8), 5)), TensorType(DType.F32, (5, 4))
    good = RecurrentType(DType.F32, (3, 5))
    attrs = ops.get(PAGED + "causal_conv1d").check_attrs({})
    assert ops.infer(PAGED + "causal_conv1d", [good, *steps, rows, weight], attrs) == (rows, good)
    with pytest.raises(VerifyError, match="the state must be rec<f32,3,5>, got rec<f32,4,5>"):
        ops.infer(PAGED + "causal_conv1d", [RecurrentType(DType.F32, (4, 5)), *steps, rows, weight], attrs)
    with pytest.raises(VerifyError, match="operand state must be state"):
        ops.infer(PAGED + "causal_conv1d", [rows, *steps, rows, weight], attrs)
