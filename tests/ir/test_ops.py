"""Every op: its reference against an independent formulation, and the errors of its type rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.expr import Const, Load, Var, tanh
from inferloom.ir.graph import Builder
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import PAGED as PAGED_OP
from inferloom.ir.ops.recurrent import STATE_OF
from inferloom.ir.types import DType, StateType, Sym, TensorType

RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Y = RNG.standard_normal((3, 4)).astype(np.float32)
POS = np.abs(X) + np.float32(0.1)
QUERY = RNG.standard_normal((5, 4, 6)).astype(np.float32)
KEY, VALUE = (RNG.standard_normal((5, 2, n)).astype(np.float32) for n in (6, 3))
T = Sym("t", 8)


@dataclass(frozen=True, slots=True)
class Case:
    """Arrays that go in, attributes, and what must come out."""

    op: str
    arrays: tuple[Any, ...]
    want: Any
    attrs: dict[str, Any] = field(default_factory=dict)
    symbolic: bool = True


def each(f: Callable[..., float], *arrays: np.ndarray) -> np.ndarray:
    """Element by element, in Python floats."""
    return np.array([f(*map(float, row)) for row in zip(*(a.ravel() for a in arrays))]).reshape(arrays[0].shape)


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, score: Callable[..., float],
                      sinks: np.ndarray | None = None, offset: int = 0) -> np.ndarray:
    """Attention one (query, head) at a time in float64; `score(s, i, j, h)` is None where j is not seen."""
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    for i in range(len(q)):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            logits = {j: s for j in range(len(k))
                      if (s := score(float(np.dot(np.float64(q[i, h]), k[j, g])), i + offset, j, h)) is not None}
            total = sum(math.exp(s) for s in logits.values()) + (math.exp(sinks[h]) if sinks is not None else 0)
            out[i, h] = sum((math.exp(s) / total * v[j, g] for j, s in logits.items()), np.zeros(v.shape[2]))
    return out


def causal(s: float, i: int, j: int, h: int) -> float | None:
    return 0.5 * s if j <= i else None


SLOPES = np.array([0.5, 0.25, 0.125, 0.1], np.float32)
SINKS = np.array([0.3, -1.0, 2.0, 0.0], np.float32)
STATE = StateType(DType.F32, 2, 6, 3, 16)
SCORE, Q, K, H = Var("score"), Var("q_pos"), Var("k_pos"), Var("head")


def paged_state() -> tuple[KVArrays, np.ndarray, np.ndarray, np.ndarray]:
    """State of two sequences with lengths 20 and 5 in scattered blocks; their keys and values in order."""
    state = KVArrays.zeros(STATE, 6)
    table = np.array([[5, 2], [1, 0]], np.int32)
    keys, values = (RNG.standard_normal((25, 2, n)).astype(np.float32) for n in (6, 3))
    for i in range(25):
        sequence, position = (0, i) if i < 20 else (1, i - 20)
        slot = table[sequence][position // 16] * 16 + position % 16
        state.k[slot], state.v[slot] = keys[i], values[i]
    return state, table, keys, values


PAGED, TABLE, KEYS, VALUES = paged_state()
PAGED_QUERY = RNG.standard_normal((4, 4, 6)).astype(np.float32)  # last 3 tokens of the first, last 1 of the second


def windowed(s: float, i: int, j: int, h: int) -> float | None:
    return 4 * math.tanh(0.5 * s / 4) + SLOPES[h] * (j - i) if j <= i and i - j < 7 else None


FLEX = {"scale": 0.5, "score": tanh(SCORE / 4.0) * 4.0 + Load("t1", H) * (K - Q), "visible": (K <= Q) & (Q - K < 7),
        "first": Const(0), "sink": 0}


def naive_rotary(x: np.ndarray, angle: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotary as multiplication by a complex number."""
    half = angle.shape[1]
    out = np.array(x, np.float64)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle[:, None, i])
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


ANGLE = RNG.uniform(-3, 3, (5, 2)).astype(np.float32)
COS, SIN = np.cos(ANGLE), np.sin(ANGLE)
W = RNG.standard_normal((6, 4)).astype(np.float32)
W4, B4, B6 = (RNG.standard_normal(n).astype(np.float32) for n in (4, 4, 6))
PACKED = np.zeros((2, 4, 4, 2), np.float32)  # n=6 in tiles of 4, k=4 padded to 8 in pairs
for _n in range(6):
    for _k in range(4):
        PACKED[_n // 4, _k // 2, _n % 4, _k % 2] = W[_n, _k]
IDS = np.array([5, 0, 5], np.int32)
EXPERTS, EXPERT_BIAS = (RNG.standard_normal(s).astype(np.float32) for s in ((3, 6, 4), (3, 6)))
CHOICE = np.array([[2, 0], [1, 1], [0, 2]], np.int32)
PACKED_EXPERTS = np.stack([np.pad(w, ((0, 2), (0, 4))).reshape(2, 4, 4, 2).transpose(0, 2, 1, 3) for w in EXPERTS])
CHOSEN = [[EXPERTS[e] @ np.float64(X[t]) + EXPERT_BIAS[e] for e in row] for t, row in enumerate(CHOICE)]
BODY = Builder("body")
_x = BODY.input("x", TensorType(DType.F32, (3, 4)))
BODY_GRAPH = BODY.finish([BODY.emit("neg", BODY.emit("add", _x, _x)), _x])


def erf(x: float) -> float:
    """Abramowitz & Stegun 7.1.5: the Taylor series, which math.erf is not."""
    terms = ((-1) ** n * x ** (2 * n + 1) / (math.factorial(n) * (2 * n + 1)) for n in range(40))
    return 2 / math.sqrt(math.pi) * sum(terms)


CASES = [
    Case("neg", (X,), each(lambda x: -x, X)), Case("abs", (X,), each(abs, X)), Case("exp", (X,), each(math.exp, X)),
    Case("floor", (X,), each(math.floor, X)),
    Case("log", (POS,), each(math.log, POS)), Case("sqrt", (POS,), each(math.sqrt, POS)),
    Case("rsqrt", (POS,), each(lambda x: x**-0.5, POS)), Case("tanh", (X,), each(math.tanh, X)),
    Case("sin", (X,), each(math.sin, X)), Case("cos", (X,), each(math.cos, X)), Case("erf", (X,), each(erf, X)),
    Case("relu", (X,), each(lambda x: x if x > 0 else 0, X)),
    Case("sigmoid", (X,), each(lambda x: 0.5 + 0.5 * math.tanh(x / 2), X)),
    Case("silu", (X,), each(lambda x: x * (0.5 + 0.5 * math.tanh(x / 2)), X)),
    Case("gelu", (X,), each(lambda x: x * (0.5 + 0.5 * erf(x / math.sqrt(2))), X)),
    Case("gelu", (X,), each(lambda x: x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))), X),
         {"approximate": "tanh"}),
    Case("add", (X, Y), each(lambda a, b: a + b, X, Y)), Case("sub", (X, Y), each(lambda a, b: a - b, X, Y)),
    Case("mul", (X, Y), each(lambda a, b: a * b, X, Y)), Case("div", (X, POS), each(lambda a, b: a / b, X, POS)),
    Case("maximum", (X, Y), each(max, X, Y)), Case("minimum", (X, Y), each(min, X, Y)),
    Case("pow", (POS, Y), each(lambda a, b: math.exp(b * math.log(a)), POS, Y)),
    Case("add", (X, W4), np.stack([r + W4 for r in X])), Case("mul", (X[:, :1], W4), np.outer(X[:, 0], W4)),
    Case("lt", (X, Y), np.array([[a < b for a, b in zip(*r)] for r in zip(X, Y)])),
    Case("le", (X, X), np.ones((3, 4), bool)), Case("eq", (X, np.where(X > 0, X, Y)), X > 0),
    Case("where", (X > 0, X, Y), each(lambda a, b: a if a > 0 else b, X, Y)),
    Case("cast", (X * 3,), np.trunc(X * 3), {"dtype": DType.I32}),
    Case("cast", (np.float32([[1 + 2**-9, 1 + 2**-8 * 1.5]]),), np.float32([[1, 1 + 2**-7]]), {"dtype": DType.BF16}),
    Case("iota", (), [0, 1, 2], {"size": 3}),
    Case("constant", (), 2.5, {"value": 2.5}), Case("constant", (), 3, {"value": 3, "dtype": DType.I32}),
    Case("reshape", (X,), [[[a, b], [c, d]] for a, b, c, d in X], {"shape": (3, 2, 2)}),
    Case("reshape", (X,), [[[a, b], [c, d]] for a, b, c, d in X], {"shape": (T, 2, 2)}),
    Case("permute", (QUERY,), np.einsum("abc->cab", QUERY), {"axes": (2, 0, 1)}),
    Case("slice", (QUERY,), [[h[1:6:2] for h in t] for t in QUERY], {"axis": 2, "start": 1, "stop": 6, "step": 2}),
    Case("slice", (X,), X @ np.eye(4)[:, 1:3], {"axis": 1, "start": 1, "stop": 3}),
    Case("concat", (X, Y, X[:, :2]), [[*a, *b, *a[:2]] for a, b in zip(X, Y)], {"axis": 1}),
    Case("expand", (X[:, None],), np.stack([X, X], 1), {"shape": (T, 2, 4)}),
    Case("expand", (W4,), np.tile(W4, (2, 1)), {"shape": (2, 4)}),
    Case("gather_rows", (X, np.array([2, 0, 2], np.int32)), [X[2], X[0], X[2]]),
    Case("sum", (QUERY,), [[sum(map(float, h)) for h in t] for t in QUERY], {"axes": (2,)}),
    Case("sum", (QUERY,), np.einsum("abc->a", np.float64(QUERY))[:, None, None], {"axes": (1, 2), "keepdims": True}),
    Case("mean", (X,), X.astype(np.float64) @ np.full(4, 0.25), {"axes": (1,)}),
    Case("max", (X,), [[max(r)] for r in X], {"axes": (1,), "keepdims": True}),
    Case("embedding", (IDS, W), np.eye(6)[IDS] @ W),
    Case("linear", (X, W), np.einsum("tk,nk->tn", np.float64(X), W)),
    Case("linear", (X, W, B6), np.float64(np.c_[X, np.ones(3)]) @ np.r_[W.T, B6[None]]),
    Case("packed_linear", (X, PACKED, B6), np.float64(X) @ W.T + B6, {"n": 6, "k": 4}),
    Case("packed_linear", (X, PACKED), np.float64(X) @ W.T, {"n": 6, "k": 4}),
    Case("packed_embedding", (IDS, PACKED), [W[5], W[0], W[5]], {"n": 6, "k": 4}),
    Case("pack_linear", (W,), PACKED, {"tile": 4, "pair": 2, "k_multiple": 8}, symbolic=False),
    Case("interleave", (W[:4], W[2:6]), [W[0], W[1], W[2], W[3], W[2], W[3], W[4], W[5]], {"group": 2}, symbolic=False),
    Case("topk", (np.float32([[1, 3, 3, 2], [4, -1, 0, 4]]),), ([[3, 3], [4, 4]], [[1, 2], [0, 3]]), {"k": 2}, symbolic=False),
    Case("take", (X, CHOICE), [[r[i] for i in row] for r, row in zip(X, CHOICE)]),
    Case("expert_linear", (X[:, None], EXPERTS, CHOICE, EXPERT_BIAS), CHOSEN, symbolic=False),
    Case("expert_linear", (np.stack([X, Y], 1), EXPERTS.transpose(0, 2, 1), CHOICE), [
        [EXPERTS[e] @ np.float64(x) for e, x in zip(row, xs)] for row, xs in zip(CHOICE, zip(X, Y))], {"transposed": True},
         symbolic=False),
    Case("pack_experts", (EXPERTS,), PACKED_EXPERTS, {"tile": 4, "pair": 2, "k_multiple": 8}, symbolic=False),
    Case("pack_experts", (EXPERTS.transpose(0, 2, 1),), PACKED_EXPERTS,
         {"tile": 4, "pair": 2, "k_multiple": 8, "transposed": True}, symbolic=False),
    Case("packed_expert_linear", (X[:, None], PACKED_EXPERTS, CHOICE, EXPERT_BIAS), CHOSEN, {"n": 6, "k": 4}, symbolic=False),
    Case("rms_norm", (X, W4), [r * W4 / math.sqrt(np.dot(np.float64(r), r) / 4 + 0.1) for r in X], {"eps": 0.1}),
    Case("rms_norm", (X * 1e-3,), [r * 1e-3 / math.sqrt(np.dot(np.float64(r), r) / 4e6 + 1e-5) for r in X],
         {"eps": 1e-5}),
    Case("layer_norm", (X, W4, B4), [(r - r.mean()) / math.sqrt(np.var(np.float64(r)) + 0.1) * W4 + B4 for r in X],
         {"eps": 0.1}),
    Case("layer_norm", (X, None, B4), [(r - r.mean()) / math.sqrt(np.var(np.float64(r)) + 0.1) + B4 for r in X],
         {"eps": 0.1}),
    Case("rotary", (QUERY, COS, SIN), naive_rotary(QUERY, ANGLE, False)),
    Case("rotary", (QUERY, COS, SIN), naive_rotary(QUERY, ANGLE, True), {"interleaved": True}),
    Case("attention", (QUERY, KEY, VALUE), softmax_attention(QUERY, KEY, VALUE, causal), {"scale": 0.5, "slot": 0}),
    Case("attention", (QUERY, KEY, VALUE, SINKS, SLOPES), softmax_attention(
        QUERY, KEY, VALUE,
        lambda s, i, j, h: 2 * math.tanh(0.5 * s / 2) + SLOPES[h] * (j - i) if 0 <= i - j < 3 else None, SINKS),
        {"scale": 0.5, "slot": 0, "window": 3, "softcap": 2.0}),
    Case("attention", (QUERY, KEY, VALUE), softmax_attention(
        QUERY, KEY, VALUE, lambda s, i, j, h: causal(s, i, j, h) if i // 2 == j // 2 else None),
        {"scale": 0.5, "slot": 0, "chunk": 2}),
    Case("attention", (QUERY, KEY, None), softmax_attention(QUERY, KEY, KEY[..., :4], causal),
         {"scale": 0.5, "slot": 0, "v_dim": 4}),
    Case("flex_attention", (QUERY, KEY, None, SINKS, SLOPES),
         softmax_attention(QUERY, KEY, KEY[..., :3], windowed, SINKS), FLEX | {"slot": 0, "v_dim": 3}),
    Case("flex_attention", (QUERY, KEY, VALUE, SINKS, SLOPES), softmax_attention(QUERY, KEY, VALUE, windowed, SINKS),
         FLEX | {"slot": 0}),
    Case("paged_attention", (PAGED_QUERY, PAGED, np.array([0, 3, 4], np.int32), np.array([20, 5], np.int32), TABLE,
                             SINKS, SLOPES),
         np.concatenate([softmax_attention(PAGED_QUERY[:3], KEYS[:20], VALUES[:20], windowed, SINKS, 17),
                         softmax_attention(PAGED_QUERY[3:], KEYS[20:], VALUES[20:], windowed, SINKS, 4)]), FLEX),
    Case("kernel", (X,), (-2 * X, X), {"kind": "row", "body": BODY_GRAPH}, symbolic=False),
]


def type_of(value: Any, symbolic: bool) -> Any:
    if value is None or isinstance(value, KVArrays):
        return None if value is None else value.type
    dtype = {"f": DType.F32, "i": DType.I32, "b": DType.BOOL}[value.dtype.kind]
    shape = value.shape
    if symbolic and shape and shape[0] in (len(X), len(QUERY), len(PAGED_QUERY)) and value.ndim > 1:
        shape = (T, *shape[1:])
    return TensorType(dtype, shape)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_reference(case: Case) -> None:
    declared = ops.get(case.op)
    attrs = declared.check_attrs(case.attrs)
    got = ops.run_reference(case.op, case.arrays, attrs)
    wants = case.want if isinstance(case.want, tuple) else (case.want,)
    for have, want in zip(got, wants, strict=True):
        # The reference itself may be as far off as an implementation, no more.
        np.testing.assert_allclose(np.float64(have), np.float64(want), rtol=max(declared.tolerance.rtol, 1e-6),
                                   atol=max(declared.tolerance.atol, 0))


@pytest.mark.parametrize("case", [c for c in CASES if c.op not in ("embedding", "packed_embedding", "gather_rows")],
                         ids=lambda c: c.op)
def test_type_rule_agrees_with_reference(case: Case) -> None:
    attrs = ops.get(case.op).check_attrs(case.attrs)
    static = any(isinstance(a, tuple) and T in a for a in case.attrs.values())
    symbolic = case.symbolic and case.op not in ("paged_attention", "cast", "where") and (
        static or not any(isinstance(a, tuple) for a in case.attrs.values()))
    types = ops.infer(case.op, [type_of(a, symbolic) for a in case.arrays], attrs)
    for made, array in zip(types, ops.run_reference(case.op, case.arrays, attrs), strict=True):
        assert isinstance(made, TensorType)
        shape = tuple(n if isinstance(d, Sym) else d for d, n in zip(made.shape, array.shape, strict=True))
        assert shape == array.shape
        assert array.dtype == made.dtype.numpy


def test_kv_write_stores_and_keeps_the_old_state() -> None:
    state = KVArrays.zeros(StateType(DType.BF16, 2, 6, 3, 16), 2)
    slots = np.array([31, 0, 7, 8, 30], np.int32)
    (made,) = ops.run_reference("kv_write", [state, KEY, VALUE, slots], {})
    assert not state.k.any() and not state.v.any()
    for i, slot in enumerate(slots):
        np.testing.assert_allclose(made.k[slot], KEY[i], rtol=2**-8)
        np.testing.assert_allclose(made.v[slot], VALUE[i], rtol=2**-8)
    assert (made.k[1:7] == 0).all() and (made.k[slots].view(np.uint32) & 0xFFFF == 0).all()


def test_every_op_is_tested_here() -> None:
    # test_recurrent.py and test_sparse.py have those with states of their own, test_quant.py those of quantised layers.
    elsewhere = {"kv_write", "block_means", "block_scores", *STATE_OF, *(PAGED_OP + name for name in STATE_OF)}
    elsewhere |= {name for name, op in ops.all_ops().items() if op.infer.__module__.endswith(".quant")}
    assert set(ops.all_ops()) == {c.op for c in CASES} | elsewhere


NAMES = {"t": T}


def parse_type(text: str) -> Any:
    """`f32:t,4` as a tensor, `_` as an absent operand, `kv` as state of 2 heads of 6 and 3."""
    if text in ("_", "kv"):
        return None if text == "_" else STATE
    dtype, _, dims = text.partition(":")
    return TensorType(DType(dtype), tuple(NAMES[d] if d in NAMES else int(d) for d in dims.split(",") if d))


REFUSED = [
    ("neg", "i32:4", {}, "needs floats"), ("add", "f32:4 f32:3", {}, "do not broadcast at axis 0"),
    ("add", "f32:4 i32:4", {}, "element types differ.*insert a cast"), ("lt", "f32:t f32:4", {}, "do not broadcast"),
    ("where", "f32:4 f32:4 f32:4", {}, "condition must be bool"), ("where", "bool:4 f32:4 i32:4", {}, "differ"),
    ("gelu", "f32:4", {"approximate": "quick"}, "neither 'none' nor 'tanh'"),
    ("add", "f32:4 f32:4 f32:4", {}, "takes 2 to 2 operands, got 3"), ("add", "f32:4 _", {}, "operand y is required"),
    ("add", "f32:4 kv", {}, "operand y must be a tensor"), ("kv_write", "f32:4 f32:4 f32:4 i32:4", {}, "must be state"),
    ("reshape", "f32:4", {"shape": (2, 3)}, "sizes differ"), ("reshape", "f32:t,4", {"shape": (4,)}, "sizes differ"),
    ("reshape", "f32:t,4", {"shape": (4, T)}, "symbolic dims must lead"),
    ("permute", "f32:2,3", {"axes": (0, 0)}, "not a permutation"),
    ("slice", "f32:4", {"axis": 1, "start": 0, "stop": 1}, "axis 1 is outside"),
    ("slice", "f32:t", {"axis": 0, "start": 0, "stop": 1}, "slice needs a static dim, got t"),
    ("slice", "f32:4", {"axis": 0, "start": 2, "stop": 5}, "is not inside 0..4"),
    ("slice", "f32:4", {"axis": 0, "start": 2, "stop": 2}, "is not inside"),
    ("slice", "f32:4", {"axis": 0, "start": 0, "stop": 2, "step": 0}, "is not inside"),
    ("concat", "", {"axis": 0}, "at least one operand"),
    ("concat", "f32:t,4 f32:t,4", {"axis": 0}, "concat needs a static dim"),
    ("concat", "f32:2,4 f32:3,4", {"axis": 1}, "does not join"),
    ("concat", "f32:2 i32:2", {"axis": 0}, "does not join"),
    ("concat", "f32:2 f32:2,1", {"axis": 0}, "does not join"),
    ("expand", "f32:2,3", {"shape": (3,)}, "cannot expand to rank 1"),
    ("expand", "f32:2", {"shape": (3,)}, "cannot expand"),
    ("expand", "f32:1", {"shape": (T, 1)}, "a symbolic dim must be the operand's own"),
    ("gather_rows", "f32:t,4 f32:2", {}, "rows must be i32"),
    ("sum", "f32:t,4", {"axes": (0,)}, "reduction needs a static"),
    ("max", "f32:4", {"axes": (-1,)}, "axis -1 is outside"), ("mean", "f32:4", {"axes": (1,)}, "axis 1 is outside"),
    ("embedding", "f32:t f32:6,4", {}, "needs i32 ids"), ("embedding", "i32:t f32:6", {}, "needs i32 ids"),
    ("linear", "f32:t,4 f32:6,5", {}, "last dim of x"), ("linear", "bf16:t,4 f32:6,4", {}, "insert a cast"),
    ("linear", "f32:t,4 f32:4", {}, "last dim of x"), ("linear", "f32:t,4 f32:6,4 f32:4", {}, "one element per row"),
    ("rms_norm", "f32:t,4 f32:5", {"eps": 1.0}, "must match the trailing dims"),
    ("layer_norm", "f32:t,4 _ f32:5", {"eps": 1.0}, "must match the trailing dims"),
    ("rotary", "f32:t,8 f32:t,2 f32:t,2", {}, "needs x"), ("rotary", "f32:t,2,8 f32:t,2 f32:t,3", {}, "needs x"),
    ("rotary", "f32:t,2,8 f32: f32:", {}, "needs x"),
    ("rotary", "f32:t,2,8 f32:t,5 f32:t,5", {}, "at most dim/2"),
    ("rotary", "f32:t,2,8 f32:3,4 f32:3,4", {}, "same tokens"),
    ("pack_linear", "f32:t,4", {"tile": 4, "pair": 1, "k_multiple": 1}, "must be static"),
    ("pack_linear", "f32:4", {"tile": 4, "pair": 1, "k_multiple": 1}, "must be static"),
    ("pack_linear", "f32:4,4", {"tile": 0, "pair": 1, "k_multiple": 1}, "must be positive"),
    ("pack_linear", "f32:4,4", {"tile": 4, "pair": 2, "k_multiple": 3}, "a multiple of pair"),
    ("packed_linear", "f32:t,4 f32:6,4", {"n": 6, "k": 4}, "packed by pack_linear"),
    ("packed_linear", "f32:t,4 f32:2,4,4,2", {"n": 9, "k": 4}, "does not hold"),
    ("packed_linear", "f32:t,4 f32:2,4,4,2", {"n": 4, "k": 4}, "does not hold"),
    ("packed_linear", "f32:t,5 f32:2,4,4,2", {"n": 6, "k": 4}, "x must have k columns"),
    ("packed_linear", "bf16:t,4 f32:2,4,4,2", {"n": 6, "k": 4}, "element type"),
    ("packed_linear", "f32:t,4 f32:2,4,4,2 f32:5", {"n": 6, "k": 4}, "bias must have n"),
    ("packed_embedding", "f32:t f32:2,4,4,2", {"n": 6, "k": 4}, "ids must be i32"),
    ("packed_embedding", "i32:t f32:2,4,4", {"n": 6, "k": 4}, "packed by pack_linear"),
    ("interleave", "f32:4 f32:6", {"group": 2}, "must be equal"),
    ("interleave", "f32:3 f32:3", {"group": 2}, "multiple of 2"),
    ("interleave", "f32:4 f32:4", {"group": 0}, "multiple of 0"),
    ("attention", "f32:t,4,6 f32:t,2,5 f32:t,2,3", {"scale": 1.0, "slot": 0}, r"q must be \[tokens, heads, 5\]"),
    ("attention", "f32:t,3,6 f32:t,2,6 f32:t,2,3", {"scale": 1.0, "slot": 0}, "3 query heads do not share 2"),
    ("attention", "f32:t,4,6 f32:t,2,6 f32:t,1,3", {"scale": 1.0, "slot": 0}, "equal tokens and heads"),
    ("attention", "f32:t,4,6 f32:t,2,6 _", {"scale": 1.0, "slot": 0}, "v_dim must be between 1 and 6, got 0"),
    ("attention", "f32:t,4,6 f32:t,2,6 f32:t,2,3", {"scale": 1.0, "slot": 0, "v_dim": 3}, "v_dim is for no v"),
    ("kv_write", "kv f32:t,2,6 _ i32:t", {}, "do not fit the state"), ("iota", "", {"size": 0}, "must be positive"),
    ("flex_attention", "f32:t,4,6 f32:t,2,6 f32:t,1,3", FLEX | {"slot": 0}, "equal tokens and heads"),
    ("flex_attention", "f32:t,4,6 f32:t,2,6 f32:t,2,3", FLEX | {"slot": 0}, "sink=0 names no table"),
    ("paged_attention", "f32:t,4,6 kv i32:3 i32:2 i32:2,4", FLEX, "sink=0 names no table"),
    ("paged_attention", "f32:t,4,5 kv i32:3 i32:2 i32:2,4", FLEX, "q must be"),
    ("paged_attention", "f32:t,4,6 kv f32:3 i32:2 i32:2,4 f32:4", FLEX, "must be i32"),
    ("paged_attention", "f32:t,4,6 kv i32:3 i32:2 i32:2 f32:4", FLEX, "must be i32"),
    ("kv_write", "kv f32:t,2,5 f32:t,2,3 i32:t", {}, "do not fit the state"),
    ("kv_write", "kv f32:t,2,6 f32:t,2,3 f32:t", {}, "slots must be i32"),
    ("topk", "f32:t,4", {"k": 5}, "at least k=5"), ("topk", "i32:t,4", {"k": 1}, "needs f32"),
    ("take", "f32:t,4 f32:t,2", {}, "places must be i32"), ("take", "f32:t,4 i32:4,2", {}, "equal x in all dims but"),
    ("expert_linear", "f32:t,1,4 f32:3,6,5 i32:t,2", {}, "last dim of x"),
    ("expert_linear", "bf16:t,1,4 f32:3,6,4 i32:t,2", {}, "insert a cast"),
    ("expert_linear", "f32:t,4 f32:3,6,4 i32:t,2", {}, "last dim of x"),
    ("expert_linear", "f32:t,3,4 f32:3,6,4 i32:t,2", {}, "1 or 2 rows a token, got 3"),
    ("expert_linear", "f32:t,1,4 f32:3,6,4 f32:t,2", {}, "choice i32"),
    ("expert_linear", "f32:t,1,4 f32:3,6,4 i32:t,2 f32:6", {}, "bias must be"),
    ("pack_experts", "f32:6,4", {"tile": 4, "pair": 1, "k_multiple": 1}, "must be static"),
    ("pack_experts", "f32:3,6,4", {"tile": 4, "pair": 2, "k_multiple": 3}, "a multiple of pair"),
    ("packed_expert_linear", "f32:t,1,5 f32:3,2,4,4,2 i32:t,2", {"n": 6, "k": 4}, "x must be"),
    ("kernel", "f32:3,4", {"kind": "magic", "body": BODY_GRAPH}, "unknown kind of kernel 'magic'"),
    ("kernel", "f32:3,5", {"kind": "row", "body": BODY_GRAPH}, "do not match the body's inputs"),
]


@pytest.mark.parametrize("name,types,attrs,message", REFUSED, ids=[f"{r[0]}: {r[3]}" for r in REFUSED])
def test_type_rule_refuses(name: str, types: str, attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=f"^{name} .*{message}"):
        ops.infer(name, [parse_type(t) for t in types.split()], ops.get(name).check_attrs(attrs))


def test_type_rules_only_raise_verify_errors() -> None:
    """Whatever types come in, a rule gives types or a VerifyError."""
    rng = np.random.default_rng(0)
    dims, dtypes = [0, 1, 2, 4, 8, T], list(DType)

    def random_type() -> Any:
        if rng.random() < 0.1:
            return STATE
        shape = tuple(dims[i] for i in rng.integers(6, size=rng.integers(5)))
        return TensorType(dtypes[rng.integers(len(dtypes))], shape)

    for case in CASES:
        attrs = ops.get(case.op).check_attrs(case.attrs)
        for _ in range(200):
            operands = [random_type() for _ in range(rng.integers(5))]
            try:
                ops.infer(case.op, operands, attrs)
            except VerifyError:
                pass
