"""The attention kernel against its NumPy reference: variants, groupings and head sizes, whole and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from inferloom.ir.expr import Const, Expr, Load, Var, call, maximum, select, tanh
from inferloom.ir.graph import Builder, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import Affine, DType, StateType, Sym, cast_array
from tests.targets.tvm.bodies import TOKENS, Body, Kernels, tensor, to_bf16
from tests.targets.tvm.harness import aligned

SEQS = Sym("seqs", 8)
COLUMNS, BLOCK = 4, 32
Q, K, SCORE, HEAD = Var("q_pos"), Var("k_pos"), Var("score"), Var("head")
CAUSAL, START = K <= Q, Const(0)


@dataclass(frozen=True)
class Case:
    """A variant and the sizes it runs at. Table t0 holds one number a head, t1 one a position."""

    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    dtype: DType = DType.F32
    score: Expr = SCORE
    visible: Expr = CAUSAL
    first: Expr = START
    sink: int = -1


WINDOW = Case(visible=CAUSAL & (Q - K < 5), first=maximum(Q - 4, 0))
CASES = {
    "causal": Case(), "bf16": Case(dtype=DType.BF16, k_dim=32, v_dim=32), "one_head": Case(1, 1, 8, 8),
    "odd": Case(3, 3, 6, 10), "odd_bf16": Case(3, 1, 24, 12, DType.BF16), "wide": Case(2, 1, 128, 64),
    "many_queries_of_one_key": Case(19, 1), "group_of_eight": Case(16, 2, dtype=DType.BF16),
    "window": WINDOW, "unclamped_window": Case(visible=WINDOW.visible, first=Q - 4),
    "chunked": Case(visible=CAUSAL & call("eq", Q // 8, K // 8), first=Q // 8 * 8),
    "softcap": Case(score=tanh(SCORE / 0.7) * 0.7), "sinks": Case(sink=0), "sinks_window": Case(
        visible=WINDOW.visible, first=WINDOW.first, sink=0),
    "alibi": Case(3, 1, score=SCORE + Load("t0", HEAD) * (K - Q)),
    "distance": Case(score=SCORE + Load("t1", call("abs", Q - K)) / (1 + call("abs", K - Q))),
    "strided": Case(visible=CAUSAL & (call("eq", (Q - K) % 3, 0) | (Q - K < 2))),
    "selected": Case(score=select(call("not", call("lt", HEAD, 2)), SCORE * 2, call("neg", call("exp", SCORE)))),
    "minus_infinity": Case(score=select(call("lt", K + 3, Q), float("-inf"), SCORE)),
    "select_mixed": Case(score=SCORE + select(call("lt", K, 4), 1, 0.25)),
    "even_heads_see_all": Case(visible=CAUSAL & (call("eq", HEAD % 2, 0) | (Q - K < 3))),
}
#: An attention kernel takes LLVM seconds.
QUICK = {"causal", "bf16", "odd_bf16", "many_queries_of_one_key", "unclamped_window", "alibi", "sinks_window"}


def body(case: Case) -> Body:
    def emit(b: Builder) -> Sequence[Value]:
        stored = DType.BF16 if case.dtype is DType.BF16 else DType.F32
        i32 = DType.I32
        q = b.input("q", tensor(TOKENS, case.heads, case.k_dim, dtype=stored))
        state = b.input("state", StateType(case.dtype, case.kv_heads, case.k_dim, case.v_dim, BLOCK))
        steps = (b.input("seq_starts", tensor(Affine(SEQS, 1, 1), dtype=i32)),
                 b.input("kv_lens", tensor(SEQS, dtype=i32)), b.input("block_tables", tensor(SEQS, COLUMNS, dtype=i32)))
        tables = (b.input("t0", tensor(case.heads)), b.input("t1", tensor(COLUMNS * BLOCK)))
        out = b.emit("paged_attention", q, state, *steps, *tables, scale=case.k_dim**-0.5, score=case.score,
                     visible=case.visible, first=case.first, sink=case.sink)
        flat = b.emit("reshape", out, shape=(TOKENS, case.heads * case.v_dim))
        return [b.emit("cast", flat, dtype=stored)]

    return emit


def pack(held: KVArrays, stride: int) -> np.ndarray:
    """The pool's bytes for arrays of state; block b begins at b * stride."""
    t = held.type
    pair = 2 if t.dtype is DType.BF16 else 1
    tiles = (len(held.k) // t.block_tokens, t.block_tokens // 16, 16, t.heads)
    k = held.k.reshape(*tiles, t.k_dim // pair, pair).transpose(0, 3, 1, 4, 2, 5).reshape(tiles[0], t.heads, tiles[1], -1)
    v = held.v.reshape(*tiles, t.v_dim).transpose(0, 3, 1, 2, 4).reshape(tiles[0], t.heads, tiles[1], -1)
    data = np.concatenate([k, v], -1)
    stored = to_bf16(data) if t.dtype is DType.BF16 else np.ascontiguousarray(data, np.float32)
    pool = aligned(tiles[0] * stride)
    pool.reshape(tiles[0], stride)[:, :t.bytes_per_block] = stored.reshape(tiles[0], -1).view(np.uint8)
    return pool


class Batch:
    """Three sequences: one decoding, one in the middle of its prompt, one new."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        type = StateType(case.dtype, case.kv_heads, case.k_dim, case.v_dim, BLOCK)
        blocks = 3 * COLUMNS + 1
        self.state = KVArrays(
            cast_array(rng.standard_normal((blocks * BLOCK, case.kv_heads, case.k_dim)).astype(np.float32), case.dtype),
            cast_array(rng.standard_normal((blocks * BLOCK, case.kv_heads, case.v_dim)).astype(np.float32), case.dtype),
            type)
        self.pool = pack(self.state, type.bytes_per_block + 128)
        counts = [1, 21, 18]
        self.starts = np.cumsum([0, *counts]).astype(np.int32)
        self.lens = np.array([70, 53, 18], np.int32)
        self.tables = rng.permutation(blocks)[:3 * COLUMNS].astype(np.int32).reshape(3, COLUMNS)
        q = rng.standard_normal((sum(counts), case.heads, case.k_dim)).astype(np.float32)
        self.q = cast_array(q * 2, case.dtype)
        self.extra = {"t0": rng.standard_normal(case.heads).astype(np.float32),
                      "t1": rng.standard_normal(COLUMNS * BLOCK).astype(np.float32)}

    def inputs(self) -> dict[str, object]:
        return {"q": self.q, "state": self.pool, "seq_starts": self.starts, "kv_lens": self.lens,
                "block_tables": self.tables, **self.extra}

    def one(self, seq: int, token: int) -> dict[str, object]:
        """A single token of a sequence, as if nothing else were there."""
        row = self.starts[seq] + token
        length = self.lens[seq] - (self.starts[seq + 1] - row) + 1
        return self.inputs() | {"q": self.q[row:row + 1], "seq_starts": np.array([0, 1], np.int32),
                                "kv_lens": np.array([length], np.int32), "block_tables": self.tables[seq:seq + 1]}


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
    inputs = batch.inputs()
    counts = {"tokens": len(batch.q), "seqs": 3}
    (got,) = kernels.run(name, inputs, counts, {"q_tiles": tiles(batch.starts)})
    (want,) = kernels.want(name, inputs | {"state": batch.state})
    relative = 2.0**-7 if case.dtype is DType.BF16 else 1e-5
    assert np.abs(got - want).max() <= relative * np.abs(want).max()
    for seq, token in ((0, 0), (1, 0), (1, 7), (1, 20), (2, 17)):
        alone = kernels.run(name, batch.one(seq, token), {"tokens": 1, "seqs": 1},
                            {"q_tiles": np.array([[0, 0, 1]], np.int32)})
        assert np.array_equal(alone[0][0], got[batch.starts[seq] + token])


def test_query_heads_are_split() -> None:
    """A chunk for each key head, and for every eight query heads that share one."""
    mult = {name: compiled(name).infos[name].grid.mult for name in ("causal", "many_queries_of_one_key")}
    assert mult == {"causal": 2, "many_queries_of_one_key": 3}
