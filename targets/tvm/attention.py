"""Paged attention for mixed prefill and decode, with the variant's scalar expressions inlined.

A chunk is one tile of up to 16 query tokens of a sequence, for one key-value head and up to 8 of the query heads
that share it. Within it, a few query rows (tokens x query heads) walk over the 16-token tiles of the cache together,
with an online softmax a row.
Tiles are visited in order from the first that any of the rows may see; a masked key has probability exactly 0 and
leaves a row's sums as they were, bit for bit, so results do not depend on tiling, chunking or batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir import expr as scalar
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.ops.attention import Q_POS
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import (
    LANES,
    bind,
    f32,
    kernel,
    lane_of,
    number,
    scratch,
    splat,
    store,
    typed,
    vectors,
    wide,
)
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.rows import storage
from inferloom.targets.tvm.rowvalue import tree

Expr = Any
KEYS = 16
MAX_ROWS = 8
LOWEST = -1e30


def lower(source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of an "attention" kernel, its grid, and its arguments (the step input q_tiles by name)."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    made = _Attention(body, source, isa)
    fn = kernel(source.symbol, made.signature, made.emit, isa.llvm)
    return fn, Grid(3, 1, made.state.heads * made.parts), tuple(a for a, _ in made.signature)


class _Attention:
    def __init__(self, body: Graph, source: KernelSource, isa: CpuIsa) -> None:
        self.isa = isa
        (self.node,) = (n for n in body.nodes if n.op == "paged_attention")
        for node in body.nodes:
            if node.op not in ("paged_attention", "reshape", "cast"):
                raise UnsupportedError(f"{node.loc}: {node.op} cannot follow attention in one kernel")
        q, state, starts, lens, tables, *extra = (_value(v) for v in self.node.operands)
        if not isinstance(state.type, StateType) or not isinstance(q.type, TensorType):
            raise TypeError(state)
        self.state, self.q_type = state.type, q.type
        self.heads = int(str(q.type.shape[1]))
        self.group = self.heads // self.state.heads
        #: Query heads of one key-value head are worked on in `parts` of `size`.
        self.parts = -(-self.group // MAX_ROWS)
        self.size = -(-self.group // self.parts)
        self.pair = 2 if self.state.dtype is DType.BF16 else 1
        if self.state.k_dim % self.pair:
            raise UnsupportedError(f"{self.node.loc}: a bf16 cache needs an even head size, not {self.state.k_dim}")
        inputs = [body.inputs.index(v) for v in (q, state, starts, lens, tables, *extra)]
        (self.out,) = body.outputs
        types = ["int32" if self.pair == 2 else "float32", "uint16" if self.pair == 2 else "float32",
                 "int32", "int32", "int32", *(storage(v) for v in extra)]
        self.signature: list[tuple[int | str, str]] = list(zip(inputs, types, strict=True))
        self.signature += [(len(body.inputs), storage(self.out)), ("q_tiles", "int32")]
        if self.pair == 2:  # keys are read as pairs, values as single elements
            self.signature.append((inputs[1], "int32"))
        self.ldq = source.layouts[inputs[0]].ld // self.pair
        self.ldo = source.layouts[len(body.inputs)].ld
        self.columns = int(str(tables.type.shape[1])) if isinstance(tables.type, TensorType) else 0
        self.stride = source.layouts[inputs[1]].block_stride // self.state.dtype.itemsize
        self.extra = len(extra)
        self.chosen = int(str(self.node.attrs["chosen"]))
        if self.chosen >= 0:
            table = extra[self.chosen]
            #: Elements between rows of the table of chosen blocks, and blocks that a key head chooses.
            self.choices = source.layouts[body.inputs.index(table)].ld, int(str(table.type.shape[2]))  # type: ignore[union-attr]
        self.tokens = max(1, MAX_ROWS // self.size)

    def emit(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        self.q, self.pool, starts, self.lens, self.tables = views[:5]
        self.extras, self.result, tiles = views[5:5 + self.extra], views[5 + self.extra], views[6 + self.extra]
        self.keys = views[7 + self.extra] if self.pair == 2 else self.pool
        mult = self.state.heads * self.parts
        work, head, part = bind(chunk // mult), bind(chunk % mult // self.parts), chunk % self.parts
        # The last part may stick out of the group: it repeats the last head, which writes the same values again.
        q_heads = [bind(head * self.group + T.min(part * self.size + i, T.int32(self.group - 1)))
                   for i in range(self.size)]
        seq, first, count = (bind(tiles[work * 3 + i]) for i in range(3))
        position = bind(self.lens[seq] - starts[seq + 1] + first)  # of the tile's first token
        with T.serial(0, (count + (self.tokens - 1)) // self.tokens) as block:
            self._rows(seq, head, q_heads, first, position, bind(block * self.tokens), count)

    def _rows(self, seq: Expr, head: Expr, q_heads: list[Expr], first: Expr, position: Expr, begin: Expr,
              count: Expr) -> None:
        """Attention of `tokens` tokens from `begin` of the tile, for the query heads `q_heads`."""
        state, size = self.state, self.size
        rows = self.tokens * size
        dv, dk = state.v_dim, state.k_dim // self.pair
        lanes = vectors(dv)
        out, top, total = scratch(rows * dv), scratch(rows), scratch(rows * LANES)
        probs, decay = scratch(rows * KEYS), scratch(rows)
        if self.chosen >= 0:
            self.named = scratch(self.tokens, "int32")
        # A block that sticks out of the tile repeats its last token, which writes the same values again.
        offsets = [bind(T.min(begin + t, count - 1)) for t in range(self.tokens)]
        where = [{"q_pos": bind(position + o), "token": bind(first + o)} for o in offsets]
        sink = int(str(self.node.attrs["sink"]))
        for r in range(rows):
            start = self.extras[sink][q_heads[r % size]] if sink >= 0 else T.float32(LOWEST)
            store(top, start, T.int32(r), 1)
            store(total, number(0.0, LANES), T.int32(r * LANES), LANES)
            if sink >= 0:
                store(total, T.float32(1.0), T.int32(r * LANES), 1)
        with T.serial(0, rows * dv // lanes) as i:
            store(out, number(0.0, lanes), i * lanes, lanes)
        lowest = bind(T.max(tree([self._scalar("first", w) for w in where], T.min), T.int32(0)) // KEYS)
        last = where[-1]["q_pos"]
        if self._expr("last") != Q_POS:
            last = T.min(tree([self._scalar("last", w) for w in where], T.max), self.lens[seq] - 1)
        highest = bind(last // KEYS + 1)
        with T.serial(0, highest - lowest) as step:
            tile = bind(lowest + step)
            per_block = state.block_tokens // KEYS
            page = bind(tile // per_block)

            def walk() -> None:
                blockid = bind(self.tables[seq * self.columns + page])
                base = bind(wide(blockid) * self.stride
                            + wide((head * per_block + tile % per_block) * (KEYS * state.per_token)))
                self._scores(rows, dk, base, q_heads, where, tile, top, total, probs, decay)
                values = base if state.latent else bind(base + KEYS * state.k_dim)
                self._values(rows, dv, lanes, values, probs, decay, out)

            if self.chosen < 0:
                walk()
            else:
                self._choose(head, page, where)
                with T.If(tree([self.named[t] for t in range(self.tokens)], T.max) > 0):
                    with T.Then():
                        walk()
        for r in range(rows):
            token = where[r // size]["token"]
            parts = [total[r * LANES + i] for i in range(LANES)]
            inverse = bind(T.float32(1.0) / tree(parts, lambda a, b: a + b))
            target = bind(token * self.ldo + q_heads[r % size] * dv)
            with T.serial(0, dv // lanes) as i:
                y = out[lane_of(r * dv + i * lanes, lanes)] * splat(inverse, lanes)
                if isinstance(self.out.type, TensorType) and self.out.type.dtype is DType.BF16:
                    y = vmath.f32_to_bf16(y, lanes)
                store(self.result, y, target + i * lanes, lanes)

    def _choose(self, head: Expr, page: Expr, where: list[dict[str, Expr]]) -> None:
        """Set `named` to 1 for each token that has chosen the page, else to 0."""
        ld, count = self.choices
        for t, each in enumerate(where):
            store(self.named, T.int32(0), T.int32(t), 1)
            with T.serial(0, count) as j:
                place = self.extras[self.chosen][each["token"] * ld + head * count + j]
                store(self.named, T.max(self.named[t], T.Select(T.EQ(place, page), T.int32(1), T.int32(0))), T.int32(t), 1)

    def _scores(self, rows: int, dk: int, base: Expr, q_heads: list[Expr], where: list[dict[str, Expr]], tile: Expr,
                top: Expr, total: Expr, probs: Expr, decay: Expr) -> None:
        """Scores of one tile of keys for all rows, and the step of their online softmax."""
        acc = scratch(rows * KEYS)
        keys = bind(base // self.pair)
        queries = [bind(where[r // self.size]["token"] * self.ldq + q_heads[r % self.size] * dk)
                   for r in range(rows)]
        (self._by_row if self.state.latent else self._by_column)(rows, dk, keys, queries, acc)
        scale = float(str(self.node.attrs["scale"]))
        k_pos = bind(T.ramp(tile * KEYS, 1, KEYS))
        for r in range(rows):
            env = {"score": bind(acc[lane_of(T.int32(r * KEYS), KEYS)] * number(scale, KEYS)), "k_pos": k_pos,
                   "head": q_heads[r % self.size], **where[r // self.size]}
            seen = self._vector("visible", env)
            if self.chosen >= 0:
                seen = T.And(seen, splat(self.named[r // self.size], KEYS) > splat(T.int32(0), KEYS))
            score = bind(T.Select(seen, _float(self._vector("score", env), KEYS), number(LOWEST, KEYS)))
            lowered = scratch(KEYS)
            store(lowered, score, T.int32(0), KEYS)
            old = bind(top[r])
            new = bind(T.max(old, tree([lowered[i] for i in range(KEYS)], T.max)))
            shrink = bind(vmath.exp(old - new, 1))
            p = bind(T.Select(seen, vmath.exp(score - splat(new, KEYS), KEYS), number(0.0, KEYS)))
            at = T.int32(r * LANES)
            store(total, total[lane_of(at, LANES)] * splat(shrink, LANES) + p, at, LANES)
            store(top, new, T.int32(r), 1)
            store(decay, shrink, T.int32(r), 1)
            store(probs, p, T.int32(r * KEYS), KEYS)

    def _by_row(self, rows: int, dk: int, keys: Expr, queries: list[Expr], acc: Expr) -> None:
        """acc = products with keys that lie one after the other, so that they can be values too."""
        lanes = vectors(dk)
        with T.serial(0, KEYS) as j:
            sums = scratch(rows * lanes)
            for r in range(rows):
                store(sums, number(0.0, lanes), T.int32(r * lanes), lanes)
            with T.serial(0, dk // lanes) as v:
                d = bind(v * lanes)
                k = bind(self.keys[lane_of(keys + wide(j * dk + d), lanes)])
                for r in range(rows):
                    q, made = self.q[lane_of(queries[r] + d, lanes)], sums[lane_of(T.int32(r * lanes), lanes)]
                    made = self.isa.dot_pair(made, q, k, lanes) if self.pair == 2 else vmath.fma(q, k, made, lanes)
                    store(sums, made, T.int32(r * lanes), lanes)
            for r in range(rows):
                total = tree([sums[r * lanes + i] for i in range(lanes)], lambda a, b: a + b)
                store(acc, total, r * KEYS + j, 1)

    def _by_column(self, rows: int, dk: int, keys: Expr, queries: list[Expr], acc: Expr) -> None:
        """acc = products with keys of which the same element of 16 lies side by side."""
        for r in range(rows):
            store(acc, number(0.0, KEYS), T.int32(r * KEYS), KEYS)
        unroll = gcd(dk, 4)
        with T.serial(0, dk // unroll) as d4:
            for u in range(unroll):
                d = d4 * unroll + u
                k = bind(self.keys[T.ramp(keys + wide(d * KEYS), 1, KEYS)])
                for r in range(rows):
                    q = splat(self.q[queries[r] + d], KEYS)
                    made = acc[lane_of(T.int32(r * KEYS), KEYS)]
                    made = self.isa.dot_pair(made, q, k) if self.pair == 2 else vmath.fma(q, k, made, KEYS)
                    store(acc, made, T.int32(r * KEYS), KEYS)

    def _values(self, rows: int, dv: int, lanes: int, base: Expr, probs: Expr, decay: Expr, out: Expr) -> None:
        """out = out * decay + probs @ values of one tile, with a column block of all rows in registers."""
        apart = self.state.k_dim if self.state.latent else dv
        with T.serial(0, dv // lanes) as c:
            column = bind(c * lanes)
            acc = scratch(rows * lanes)
            for r in range(rows):
                x = out[lane_of(r * dv + column, lanes)] * splat(decay[r], lanes)
                store(acc, x, T.int32(r * lanes), lanes)
            for j in range(KEYS):
                raw = self.pool[lane_of(base + wide(column + j * apart), lanes)]
                v = bind(vmath.bf16_to_f32(raw, lanes) if self.pair == 2 else raw)
                for r in range(rows):
                    at = T.int32(r * lanes)
                    store(acc, vmath.fma(splat(probs[r * KEYS + j], lanes), v, acc[lane_of(at, lanes)], lanes), at, lanes)
            for r in range(rows):
                store(out, acc[lane_of(T.int32(r * lanes), lanes)], r * dv + column, lanes)

    # -- scalar expressions

    def _expr(self, name: str) -> scalar.Expr:
        made = self.node.attrs[name]
        if not isinstance(made, scalar.Expr):
            raise TypeError(made)
        return made

    def _scalar(self, name: str, env: Mapping[str, Expr]) -> Expr:
        return emit_expr(self._expr(name), env, self.extras, 1)

    def _vector(self, name: str, env: Mapping[str, Expr]) -> Expr:
        return emit_expr(self._expr(name), env, self.extras, KEYS)


def _float(x: Expr, lanes: int) -> Expr:
    """Integers as floats, hidden from TVM's analysis, which fails on products of such floats."""
    return bind(T.reinterpret(f32(lanes), T.reinterpret(typed("int32", lanes), T.cast(x, f32(lanes)))))


def _is_float(x: Expr) -> bool:
    return str(x.dtype if hasattr(x, "dtype") else x.ty.dtype).startswith("float")


_ARITHMETIC = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "min": T.min,
               "max": T.max}
_COMPARISON = {"lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "eq": T.EQ}


def emit_expr(e: scalar.Expr, env: Mapping[str, Expr], tables: list[Expr], lanes: int) -> Expr:
    """A scalar expression for `lanes` keys. Positions are int32, scores float32; mixed operands become float32.

    In `env`, `score` and `k_pos` have `lanes` lanes, the others are the same for all keys.
    """
    if isinstance(e, scalar.Const):
        return splat(T.float32(e.value) if isinstance(e.value, float) else T.int32(e.value), lanes)
    if isinstance(e, (scalar.Var, scalar.Load)) and lanes > 1 and not e.variables() & {"score", "k_pos"}:
        return bind(splat(emit_expr(e, env, tables, 1), lanes))
    if isinstance(e, scalar.Var):
        return env[e.name]
    if isinstance(e, scalar.Load):
        return bind(tables[int(e.table[1:])][emit_expr(e.index, env, tables, lanes)])
    if not isinstance(e, scalar.Call):
        raise TypeError(e)
    args = [emit_expr(a, env, tables, lanes) for a in e.args]
    name = e.function
    numbers = args[1:] if name == "select" else args
    if name in ("div", "exp", "tanh") or len({_is_float(a) for a in numbers}) > 1:
        numbers = [a if _is_float(a) else _float(a, lanes) for a in numbers]
        args = [*args[:len(args) - len(numbers)], *numbers]
    if name in _COMPARISON:  # TVM cannot name a vector of booleans
        return _COMPARISON[name](*args)
    if name in _ARITHMETIC:
        return bind(_ARITHMETIC[name](*args))
    if name == "div":
        return bind(args[0] / args[1])
    if name == "idiv":
        return bind(T.floordiv(*args))
    if name == "mod":
        return bind(T.floormod(*args))
    if name == "and":
        return T.And(*args)
    if name == "or":
        return T.Or(*args)
    if name == "not":
        return T.Not(*args)
    if name == "neg":
        zero = number(0.0, lanes) if _is_float(args[0]) else splat(T.int32(0), lanes)
        return bind(zero - args[0])
    if name == "select":
        return bind(T.Select(*args))
    if name == "abs" and not _is_float(args[0]):
        return bind(T.max(args[0], splat(T.int32(0), lanes) - args[0]))
    if name in ("exp", "tanh", "abs"):
        return {"exp": vmath.exp, "tanh": vmath.tanh, "abs": vmath.absolute}[name](args[0], lanes)
    raise UnsupportedError(f"the CPU target cannot lower the scalar function {name} yet")


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
