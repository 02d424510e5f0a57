"""Attention as the targets' tests need it: variants with sizes, their kernel bodies, and ragged batches of state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inferloom.ir.expr import Const, Expr, Load, Var, call, maximum, select, tanh
from inferloom.ir.graph import Builder, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import LARGEST, Affine, DType, StateType, Sym, TensorType, cast_array, store_array

TOKENS = Sym("tokens", 64)
SEQS = Sym("seqs", 8)
COLUMNS, BLOCK = 4, 32
Q, K, SCORE, HEAD = Var("q_pos"), Var("k_pos"), Var("score"), Var("head")
PREFIX, DOCUMENT = Load("t2", Var("token")), Load("t3", Var("token"))
CAUSAL, START = K <= Q, Const(0)


@dataclass(frozen=True)
class Case:
    """A variant and the sizes it runs at. Table t0 holds one number a head, t1 one a position.

    Of each query token, t2 has the length of its sequence's prefix, t3 a position that is not after its own, and t4 for
    each key head its own block and two others.
    """

    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    dtype: DType = DType.F32
    computed: DType | None = None
    score: Expr = SCORE
    visible: Expr = CAUSAL
    first: Expr = START
    last: Expr = Q
    sink: int = -1
    chosen: int = -1
    latent: bool = False

    @property
    def stored(self) -> DType:
        """What queries and results are; the cache is in `dtype`."""
        return self.computed or (DType.BF16 if self.dtype in LARGEST else self.dtype)

    @property
    def state(self) -> StateType:
        return StateType(self.dtype, self.kv_heads, self.k_dim, self.v_dim, BLOCK, self.latent)


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
    "latent": Case(4, 1, 40, 32, latent=True), "latent_bf16": Case(12, 1, 96, 64, DType.BF16, latent=True),
    "latent_odd": Case(3, 1, 22, 12, DType.BF16, latent=True), "latent_all": Case(2, 2, 32, 32, latent=True),
    "prefix": Case(visible=K <= maximum(Q, PREFIX - 1), last=maximum(Q, PREFIX - 1)),
    "prefix_bf16": Case(visible=K <= maximum(Q, PREFIX - 1), last=maximum(Q, PREFIX - 1), dtype=DType.BF16, k_dim=32, v_dim=32),
    "chosen": Case(chosen=4), "chosen_bf16": Case(9, 3, 32, 32, DType.BF16, chosen=4),
    "documents": Case(visible=CAUSAL & (K >= DOCUMENT), first=DOCUMENT),
    "even_heads_see_all": Case(visible=CAUSAL & (call("eq", HEAD % 2, 0) | (Q - K < 3))),
}
#: Caches of another type than queries are, which not every target has.
KV_CASES = {
    "int8": Case(12, 2, 32, 32, DType.I8), "odd_int8": Case(3, 1, 10, 12, DType.I8),
    "chosen_int8": Case(dtype=DType.I8, chosen=4), "latent_int8": Case(4, 1, 48, 32, DType.I8, latent=True),
    "window_int8": Case(visible=WINDOW.visible, first=WINDOW.first, dtype=DType.I8),
    "fp8": Case(12, 2, 32, 32, DType.F8), "latent_fp8": Case(4, 1, 48, 32, DType.F8, latent=True),
    "int8_behind_f32": Case(dtype=DType.I8, computed=DType.F32), "bf16_behind_f32": Case(dtype=DType.BF16, computed=DType.F32),
}


def tensor(*shape: int | Sym | Affine, dtype: DType = DType.F32) -> TensorType:
    return TensorType(dtype, tuple(shape))


def body(case: Case, columns: int = COLUMNS) -> Callable[[Builder], Sequence[Value]]:
    def emit(b: Builder) -> Sequence[Value]:
        stored = case.stored
        i32 = DType.I32
        q = b.input("q", tensor(TOKENS, case.heads, case.k_dim, dtype=stored))
        state = b.input("state", case.state)
        steps = (b.input("seq_starts", tensor(Affine(SEQS, 1, 1), dtype=i32)),
                 b.input("kv_lens", tensor(SEQS, dtype=i32)), b.input("block_tables", tensor(SEQS, columns, dtype=i32)))
        tables = (b.input("t0", tensor(case.heads)), b.input("t1", tensor(columns * BLOCK)),
                  b.input("t2", tensor(TOKENS, dtype=i32)), b.input("t3", tensor(TOKENS, dtype=i32)),
                  b.input("t4", tensor(TOKENS, case.kv_heads, 3, dtype=i32)))
        out = b.emit("paged_attention", q, state, *steps, *tables, scale=case.k_dim**-0.5, score=case.score,
                     visible=case.visible, first=case.first, last=case.last, sink=case.sink, chosen=case.chosen)
        flat = b.emit("reshape", out, shape=(TOKENS, case.heads * case.v_dim))
        return [b.emit("cast", flat, dtype=stored)]

    return emit


class Batch:
    """Sequences with their state; by default one decodes, one is in the middle of its prompt, one is new."""

    def __init__(self, case: Case, columns: int = COLUMNS, lens: Sequence[int] = (70, 53, 18),
                 counts: Sequence[int] = (1, 21, 18)) -> None:
        rng = np.random.default_rng(0)
        blocks = len(lens) * columns + 1
        k, v = (store_array(rng.standard_normal((blocks * BLOCK, case.kv_heads, dim)).astype(np.float32), case.dtype)
                for dim in (case.k_dim, case.v_dim))
        self.state = KVArrays(k, k[..., :case.v_dim] if case.latent else v, case.state)
        self.starts = np.cumsum([0, *counts]).astype(np.int32)
        self.lens = np.array(lens, np.int32)
        self.tables = rng.permutation(blocks)[:len(lens) * columns].astype(np.int32).reshape(len(lens), columns)
        q = rng.standard_normal((sum(counts), case.heads, case.k_dim)).astype(np.float32)
        self.q = cast_array(q * 2, case.stored)
        positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lens, counts, strict=True)])
        # A prefix ends in a new sequence, or before what comes in this step.
        prefixes = [n - 3 if n == c else n - c + 1 for n, c in zip(lens, counts, strict=True)]
        self.extra = {"t0": rng.standard_normal(case.heads).astype(np.float32),
                      "t1": rng.standard_normal(columns * BLOCK).astype(np.float32),
                      "t2": np.repeat(prefixes, counts).astype(np.int32),
                      "t3": rng.integers(0, positions + 1).astype(np.int32)}
        self.extra["t4"] = rng.integers(0, columns, (len(positions), case.kv_heads, 3)).astype(np.int32)
        self.extra["t4"][:, :, 1] = positions[:, None] // BLOCK

    def inputs(self) -> dict[str, object]:
        return {"q": self.q, "seq_starts": self.starts, "kv_lens": self.lens,
                "block_tables": self.tables, **self.extra}

    def one(self, seq: int, token: int) -> dict[str, object]:
        """A single token of a sequence, as if nothing else were there."""
        row = self.starts[seq] + token
        length = self.lens[seq] - (self.starts[seq + 1] - row) + 1
        mine = {name: self.extra[name][row:row + 1] for name in ("t2", "t3", "t4")}
        return self.inputs() | mine | {"q": self.q[row:row + 1], "seq_starts": np.array([0, 1], np.int32),
                                "kv_lens": np.array([length], np.int32), "block_tables": self.tables[seq:seq + 1]}

    def spoil_blocks_that_nobody_chose(self, case: Case) -> None:
        """Fill them with NaN, which shows in the result if they are read."""
        for i, table in enumerate(self.tables):
            named = set(self.extra["t4"][self.starts[i]:self.starts[i + 1]].reshape(-1).tolist())
            for column in set(range(len(table))) - named:
                slots = slice(table[column] * BLOCK, (table[column] + 1) * BLOCK)
                self.state.k[slots] = self.state.v[slots] = np.nan
