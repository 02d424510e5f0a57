"""Recurrent ops: a ragged batch in pieces gives what each sequence gives as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.ops.recurrent import PAGED, STATE_OF, RecurrentArrays
from inferloom.ir.types import DType, RecurrentType, Sym, TensorType

RNG = np.random.default_rng(0)
TOKENS = 23


def rows(*shape: int) -> np.ndarray:
    return RNG.standard_normal((TOKENS, *shape)).astype(np.float32)


def test_causal_conv1d() -> None:
    x, weight, bias = rows(5), RNG.standard_normal((4, 5)).astype(np.float32), RNG.standard_normal(5).astype(np.float32)
    padded = np.concatenate([np.zeros((3, 5)), x])
    want = np.stack([(padded[t:t + 4] * weight).sum(0) + bias for t in range(TOKENS)])
    np.testing.assert_allclose(run("causal_conv1d", x, weight, bias), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("beta", [False, True])
def test_linear_attention_is_masked_attention_without_softmax(beta: bool, by_row: bool) -> None:
    """o_i = sum over j <= i of (q_i . exp(decay of j+1..i) k_j) beta_j v_j: no state, no recurrence."""
    q, k, v = rows(2, 6), rows(2, 6), rows(4, 3)
    decay, scale = -np.abs(rows(4, 6) if by_row else rows(4)), rows(4)
    total = np.cumsum(np.float64(decay if by_row else decay[..., None]), 0)
    want = np.zeros((TOKENS, 4, 3))
    for i in range(TOKENS):
        for j in range(i + 1):
            weight = np.exp(total[i] - total[j]) * k[j].repeat(2, 0)
            score = (q[i].repeat(2, 0) * weight).sum(1) * (scale[j] if beta else 1.0)
            want[i] += score[:, None] * v[j]
    got = run("linear_attention", q, k, v, decay, scale if beta else None, delta=False)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_delta_rule_overwrites_what_a_key_holds() -> None:
    """With unit keys, beta = 1 and no decay, the state answers a key with the last value stored under it."""
    q = np.zeros((4, 1, 3), np.float32)
    k = np.eye(3, dtype=np.float32)[[0, 1, 0, 1]][:, None]
    q[:, 0, 0] = 1
    v = RNG.standard_normal((4, 1, 2)).astype(np.float32)
    got = run("linear_attention", q, k, v, np.zeros((4, 1), np.float32), np.ones((4, 1), np.float32), delta=True)
    np.testing.assert_allclose(got[:, 0], v[[0, 0, 2, 2], 0], rtol=1e-5)


def test_selective_scan() -> None:
    """y_i = sum over j <= i of c_i . exp(a (dt of j+1..i)) b_j dt_j x_j."""
    x, dt, b, c = rows(5), np.abs(rows(5)), rows(3), rows(3)
    a = -np.abs(RNG.standard_normal((3, 5))).astype(np.float32)
    total, want = np.cumsum(np.float64(dt), 0), np.zeros((TOKENS, 5))
    for i in range(TOKENS):
        for j in range(i + 1):
            want[i] += (c[i][:, None] * np.exp(a * (total[i] - total[j])) * b[j][:, None]).sum(0) * dt[j] * x[j]
    np.testing.assert_allclose(run("selective_scan", x, dt, a, b, c), want, rtol=1e-4, atol=1e-4)


def test_linear_recurrence() -> None:
    x, a = rows(5), np.abs(rows(5)) * 0.5
    total = np.cumsum(np.log(np.float64(a)), 0)
    want = [(np.exp(total[i] - total[:i + 1]) * x[:i + 1]).sum(0) for i in range(TOKENS)]
    np.testing.assert_allclose(run("linear_recurrence", x, a), want, rtol=1e-4, atol=1e-4)


def test_wkv() -> None:
    k, v, bonus = rows(5), rows(5), RNG.standard_normal(5).astype(np.float32)
    decay = -np.abs(RNG.standard_normal(5)).astype(np.float32)
    want = np.zeros((TOKENS, 5))
    for i in range(TOKENS):
        weights = np.exp(np.float64([k[j] + (i - 1 - j) * decay if j < i else k[i] + bonus for j in range(i + 1)]))
        want[i] = (weights * v[:i + 1]).sum(0) / weights.sum(0)
    np.testing.assert_allclose(run("wkv", k, v, decay, bonus), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run("wkv", k - 500, v, decay, bonus), want, rtol=1e-3, atol=1e-4)


def run(op: str, *operands: np.ndarray | None, **attrs: object) -> np.ndarray:
    (out,) = ops.run_reference(op, operands, ops.get(op).check_attrs(attrs | {"slot": 0}))
    assert isinstance(out, np.ndarray)
    return out


OPERANDS: dict[str, tuple[tuple[np.ndarray | None, ...], dict[str, object]]] = {
    "causal_conv1d": ((rows(5), RNG.standard_normal((4, 5)).astype(np.float32), None), {}),
    "linear_attention": ((rows(2, 6), rows(2, 6), rows(4, 3), -np.abs(rows(4)), rows(4)), {"delta": True}),
    "selective_scan": ((rows(5), np.abs(rows(5)), -np.ones((3, 5), np.float32), rows(3), rows(3)), {}),
    "wkv": ((rows(5), rows(5), -np.ones(5, np.float32), np.ones(5, np.float32)), {}),
    "linear_recurrence": ((rows(5), np.abs(rows(5)) * 0.5), {}),
}


def test_every_recurrent_op_is_tested_here() -> None:
    assert OPERANDS.keys() == STATE_OF.keys()


@pytest.mark.parametrize("op", OPERANDS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_pieces_of_ragged_batches_give_the_whole(op: str, dtype: DType) -> None:
    """Three sequences in three steps; what a step does not write stays; a page written elsewhere is a copy."""
    operands, attrs = OPERANDS[op]
    types = [None if a is None else TensorType(DType.F32, a.shape) for a in operands]
    shape = STATE_OF[op](*types, **attrs).shape
    fixed = {i for i, a in enumerate(operands) if a is None or len(a) != TOKENS}
    first = (0, 9, 10)  # rows of the three sequences: 9, 1 and 6
    state = RecurrentArrays(np.random.default_rng(1).standard_normal((8, *shape)).astype(np.float32), RecurrentType(dtype, shape))
    done, made, pages = [0, 0, 0], [[], [], []], [5, 0, 3]  # type: ignore[var-annotated]
    for counts, written in (((4, 1, 1), (5, 2, 3)), ((2, 0, 3), (5, 2, 7)), ((3, 0, 2), (1, 2, 7))):
        who = [i for i in range(3) if counts[i]]
        at = np.concatenate([np.arange(counts[i]) + first[i] + done[i] for i in who])
        starts = np.cumsum([0, *(counts[i] for i in who)])
        lens = np.array([done[i] + counts[i] for i in who])
        before = state.data.copy()
        out, state = ops.run_reference(PAGED + op, [
            state, starts, lens, np.array([[pages[i], written[i]] for i in who]),
            *(a if i in fixed or a is None else a[at] for i, a in enumerate(operands))], ops.get(PAGED + op).check_attrs(attrs))
        kept = [p for p in range(8) if p not in [written[i] for i in who]]
        assert np.array_equal(state.data[kept], before[kept])
        for n, i in enumerate(who):
            made[i].append(out[starts[n]:starts[n + 1]])
            done[i], pages[i] = done[i] + counts[i], written[i]
    for i, parts in enumerate(made):
        own = slice(first[i], first[i] + done[i])
        want = run(op, *(a if j in fixed or a is None else a[own] for j, a in enumerate(operands)), **attrs)
        rtol, atol = (1e-5, 1e-6) if dtype is DType.F32 else (0.02, 0.1)
        np.testing.assert_allclose(np.concatenate(parts), want, rtol=rtol, atol=atol)


def test_state_must_fit() -> None:
    seqs, i32 = Sym("seqs", 4), DType.I32
    steps = [TensorType(i32, (seqs + 1,)), TensorType(i32, (seqs,)), TensorType(i32, (seqs, 2))]
    rows, weight = TensorType(DType.F32, (Sym("tokens", 8), 5)), TensorType(DType.F32, (4, 5))
    good = RecurrentType(DType.F32, (3, 5))
    attrs = ops.get(PAGED + "causal_conv1d").check_attrs({})
    assert ops.infer(PAGED + "causal_conv1d", [good, *steps, rows, weight], attrs) == (rows, good)
    with pytest.raises(VerifyError, match="the state must be rec<f32,3,5>, got rec<f32,4,5>"):
        ops.infer(PAGED + "causal_conv1d", [RecurrentType(DType.F32, (4, 5)), *steps, rows, weight], attrs)
    with pytest.raises(VerifyError, match="operand state must be state"):
        ops.infer(PAGED + "causal_conv1d", [rows, *steps, rows, weight], attrs)
