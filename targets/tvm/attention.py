"""Paged attention for mixed prefill and decode, with the variant's scalar expressions inlined.

A chunk is one tile of up to 16 query tokens of a sequence, for one key-value head and up to 8 of the query heads that
share it. Its rows (tokens x query heads) walk together over tiles of keys that begin at multiples of the tile's size:
a tile is brought into a form that the products take (attention_tiles.py), then every few rows meet it with their sums
in registers, with an online softmax a row.
Tiles are visited in order from the first that any of the rows may see; a masked key has probability exactly 0 and
leaves a row's sums as they were, bit for bit, so results do not depend on tiling, chunking or batch. Values of keys
that no row sees are not read: what lies there may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.ops.attention import Q_POS
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.attention_integers import key_tiles, llvm
from inferloom.targets.tvm.emit import LANES, bind, kernel, lane_of, number, scratch, splat, store, vectors, wide
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.kvlayout import KEYS
from inferloom.targets.tvm.rows import storage
from inferloom.targets.tvm.rowvalue import tree
from inferloom.targets.tvm.scalars import as_float, attr_expr, emit_expr

Expr = Any
MAX_HEADS = 8
#: Query tokens of a tile.
Q_TILE = 16
#: Floats of a pass's sums: what the rows of a chunk keep should stay in the second level of cache.
SUMS = 16384
#: A row that has seen no key yet, and a key that is not seen: the difference makes its probability 0.
LOWEST, MASKED = -1e30, -2e30


def lower(source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of an "attention" kernel, its grid, and its arguments (the step input q_tiles by name)."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    made = _Attention(body, source, isa)
    fn = kernel(source.symbol, made.signature, made.emit, isa.llvm + llvm(isa))
    return fn, Grid(3, 1, made.state.heads * made.parts), tuple(a for a, _ in made.signature)


class _Attention:
    def __init__(self, body: Graph, source: KernelSource, isa: CpuIsa) -> None:
        (self.node,) = (n for n in body.nodes if n.op == "paged_attention")
        for node in body.nodes:
            if node.op not in ("paged_attention", "reshape", "cast"):
                raise UnsupportedError(f"{node.loc}: {node.op} cannot follow attention in one kernel")
        q, state, starts, lens, tables, *extra = (_value(v) for v in self.node.operands)
        if not isinstance(state.type, StateType) or not isinstance(q.type, TensorType):
            raise TypeError(state)
        self.state = state.type
        self.heads = int(str(q.type.shape[1]))
        self.group = self.heads // self.state.heads
        #: Query heads of one key-value head are worked on in `parts` of `size`.
        self.parts = -(-self.group // MAX_HEADS)
        self.size = -(-self.group // self.parts)
        self.chosen = int(str(self.node.attrs["chosen"]))
        self.tiles = key_tiles(self.state, q.type.dtype, isa, self.node.loc, self.chosen >= 0)
        self.subs, self.keys = self.tiles.subs, self.tiles.subs * KEYS
        inputs = [body.inputs.index(v) for v in (q, state, starts, lens, tables, *extra)]
        (self.out,) = body.outputs
        first, *more = self.tiles.views
        types = [self.tiles.query, first, "int32", "int32", "int32", *(storage(v) for v in extra)]
        self.signature: list[tuple[int | str, str]] = list(zip(inputs, types, strict=True))
        self.signature += [(len(body.inputs), storage(self.out)), ("q_tiles", "int32"), *((inputs[1], view) for view in more)]
        self.ldq = source.layouts[inputs[0]].ld
        self.ldo = source.layouts[len(body.inputs)].ld
        self.columns = int(str(tables.type.shape[1])) if isinstance(tables.type, TensorType) else 0
        self.stride = source.layouts[inputs[1]].block_stride // self.state.dtype.itemsize
        self.extra = len(extra)
        if self.chosen >= 0:
            table = extra[self.chosen]
            #: Elements between rows of the table of chosen blocks, and blocks that a key head chooses.
            self.choices = source.layouts[body.inputs.index(table)].ld, int(str(table.type.shape[2]))  # type: ignore[union-attr]
        self.tokens = max(1, min(Q_TILE, SUMS // (self.size * self.state.v_dim)))
        self.block = _block_rows(self.size)

    def emit(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        self.q, pool, starts, self.lens, self.tables = views[:5]
        self.extras, self.result, tiles = views[5:5 + self.extra], views[5 + self.extra], views[6 + self.extra]
        self.tiles.bind([pool, *views[7 + self.extra:]])
        mult = self.state.heads * self.parts
        work, self.head, part = bind(chunk // mult), bind(chunk % mult // self.parts), bind(chunk % self.parts)
        self.part = part
        self.seq, first, count = (bind(tiles[work * 3 + i]) for i in range(3))
        position = bind(self.lens[self.seq] - starts[self.seq + 1] + first)  # of the tile's first token
        with T.serial(0, (count + (self.tokens - 1)) // self.tokens) as number:
            begin = bind(number * self.tokens)
            self._pass(bind(first + begin), bind(position + begin), bind(T.min(T.int32(self.tokens), count - begin)))

    def _pass(self, first: Expr, position: Expr, count: Expr) -> None:
        """Attention of `count` tokens from number `first` of the step, the first at `position` of its sequence."""
        self.first, self.position, most = first, position, self.tokens * self.size
        dv, lanes = self.state.v_dim, vectors(self.state.v_dim)
        rows = bind(count * self.size)
        self.queries = scratch(most * self.tiles.words, self.tiles.held)
        self.sums, self.top, self.total = scratch(most * dv), scratch(most), scratch(most * LANES)
        self.tiles.begin(most)
        self.firsts, self.lasts = scratch(self.tokens, "int32"), scratch(self.tokens, "int32")
        if self.chosen >= 0:
            self.named = scratch(self.tokens, "int32")
        with T.serial(0, rows) as r:
            self._start(r)
        ends = scratch(2, "int32")
        length = bind(self.lens[self.seq])
        store(ends, length, T.int32(0), 1)
        store(ends, T.int32(0), T.int32(1), 1)
        with T.serial(0, count) as t:
            where = {"q_pos": bind(position + t), "token": bind(first + t)}
            low = bind(T.max(self._scalar("first", where), T.int32(0)))
            high = bind(T.min(self._scalar("last", where), length - 1))
            store(self.firsts, low, t, 1)
            store(self.lasts, high, t, 1)
            store(ends, T.min(ends[0], low), T.int32(0), 1)
            store(ends, T.max(ends[1], high), T.int32(1), 1)
        lowest, highest = bind(ends[0]), bind(ends[1])
        begin = bind(lowest // self.keys)
        with T.serial(0, highest // self.keys + 1 - begin) as number:
            start = bind((begin + number) * self.keys)
            if self.chosen < 0:
                self._tile(start, lowest, highest, rows)
            else:
                with T.If(self._choose(start // self.state.block_tokens, count) > 0):
                    with T.Then():
                        self._tile(start, lowest, highest, rows)
        with T.serial(0, rows) as r:
            inverse = bind(T.float32(1.0) / self.tiles.sum16(self.total[lane_of(r * LANES, LANES)]))
            target = bind((first + r // self.size) * self.ldo + self._q_head(r) * dv)
            with T.serial(0, dv // lanes) as i:
                y = self.sums[lane_of(r * dv + i * lanes, lanes)] * splat(inverse, lanes)
                if isinstance(self.out.type, TensorType) and self.out.type.dtype is DType.BF16:
                    y = vmath.f32_to_bf16(y, lanes)
                store(self.result, y, target + i * lanes, lanes)

    def _q_head(self, row: Expr) -> Expr:
        """The last part may stick out of the group: it repeats the last head, which writes the same values again."""
        inside = T.min(self.part * self.size + row % self.size, T.int32(self.group - 1))
        return bind(self.head * self.group + inside)

    def _start(self, r: Expr) -> None:
        """A row's query in the form that the products take, and sums of nothing (of the sink alone)."""
        head, dv = self._q_head(r), self.state.v_dim
        self.tiles.take_query(self.q, bind((self.first + r // self.size) * self.ldq + head * self.state.k_dim),
                              self.queries, r)
        sink, lanes = int(str(self.node.attrs["sink"])), vectors(dv)
        store(self.top, self.extras[sink][head] if sink >= 0 else T.float32(LOWEST), r, 1)
        store(self.total, number(0.0, LANES), r * LANES, LANES)
        if sink >= 0:
            store(self.total, T.float32(1.0), r * LANES, 1)
        with T.serial(0, dv // lanes) as i:
            store(self.sums, number(0.0, lanes), r * dv + i * lanes, lanes)

    def _choose(self, page: Expr, count: Expr) -> Expr:
        """Set `named` to 1 for each token that has chosen the page, else to 0; whether any has."""
        ld, most = self.choices
        any_of = scratch(1, "int32")
        store(any_of, T.int32(0), T.int32(0), 1)
        with T.serial(0, count) as t:
            store(self.named, T.int32(0), t, 1)
            with T.serial(0, most) as j:
                place = self.extras[self.chosen][(self.first + t) * ld + self.head * most + j]
                store(self.named, T.max(self.named[t], T.Select(T.EQ(place, page), T.int32(1), T.int32(0))), t, 1)
            store(any_of, T.max(any_of[0], self.named[t]), T.int32(0), 1)
        return any_of[0]

    def _tile(self, start: Expr, lowest: Expr, highest: Expr, rows: Expr) -> None:
        """All rows meet the keys from `start` on."""
        for s in range(self.subs):
            store(self.tiles.bases, self._place(start + s * KEYS, lowest, highest), T.int32(s), 1)
            store(self.tiles.after, self._place(start + self.keys + s * KEYS, lowest, highest), T.int32(s), 1)
        low = bind(T.max(lowest - start, T.int32(0)) // 2 * 2)
        high = bind(T.min(highest + 1 - start, T.int32(self.keys)))

        def many() -> None:
            self.tiles.stage(low, high)
            step = self.block
            with T.serial(0, rows // step) as b:
                self._meet(bind(b * step), step, start, low, high)
            for tail in sorted({n * self.size % step for n in range(1, self.tokens + 1)} - {0}):
                with T.If(T.EQ(rows % step, tail)):
                    with T.Then():
                        self._meet(bind(rows - tail), tail, start, low, high)

        if not self.tiles.direct:
            many()
            return
        with T.If(T.EQ(rows, self.size)):
            with T.Then():  # of a single token's rows, each block widens what it reads by itself
                for row in range(0, self.size, self.block):
                    self._meet(T.int32(row), min(self.block, self.size - row), start, low, high, direct=True)
            with T.Else():
                many()

    def _place(self, key: Expr, lowest: Expr, highest: Expr) -> Expr:
        """The byte offset of the 16 keys from `key` on; of keys out of what rows see, that of others that they see."""
        size, layout = self.state.block_tokens, self.tiles.layout
        key = bind(T.max(T.min(key, highest), lowest))
        block = bind(self.tables[self.seq * self.columns + key // size])
        place = (self.head * layout.tiles + key % size // KEYS) * layout.tile
        return wide(block) * (self.stride * self.state.dtype.itemsize) + wide(place)

    def _meet(self, row: Expr, count: int, start: Expr, low: Expr, high: Expr, direct: bool = False) -> None:
        """`count` rows from `row` on meet the tile, staged or (direct) in the cache, unless none of them sees any of it."""
        tokens = [bind((row + m) // self.size) for m in range(count)]
        earliest = tree([self.firsts[t] for t in tokens], T.min)
        latest = tree([self.lasts[t] for t in tokens], T.max)
        with T.If(T.And(earliest < start + self.keys, latest >= start)):
            with T.Then():
                scores, decay = scratch(count * self.keys), scratch(LANES)
                self.tiles.scores(self.queries, row, count, scores, high, direct)
                room = self.tiles.room(count)
                probs = scores if room is None else room
                # In three steps, so that no row waits for the exponential of another.
                store(decay, number(0.0, LANES), T.int32(0), LANES)
                with T.serial(0, count) as m:
                    self._highest(bind(row + m), m, start, scores, decay)
                store(decay, vmath.exp_below(bind(decay[lane_of(T.int32(0), LANES)]), LANES), T.int32(0), LANES)
                with T.serial(0, count) as m:
                    self._weigh(bind(row + m), m, scores, probs, decay)
                self.tiles.values(self.sums, row, count, probs, decay, low, high, direct)

    def _highest(self, r: Expr, m: Expr, start: Expr, scores: Expr, change: Expr) -> None:
        """What the products of one row make of it, over them; the highest so far, and by how much it has risen, as `change`."""
        token = bind(r // self.size)
        where = {"q_pos": bind(self.position + token), "token": bind(self.first + token), "head": self._q_head(r)}
        lowered = []
        for s in range(self.subs):
            k_pos = bind(T.ramp(start + s * KEYS, 1, KEYS))
            raw = scores[lane_of(m * self.keys + s * KEYS, KEYS)]
            env = {"score": bind(self.tiles.scaled(raw, s, float(str(self.node.attrs["scale"])))), "k_pos": k_pos, **where}
            seen = self._vector("visible", env)
            if attr_expr(self.node, "last") != Q_POS:
                seen = T.And(seen, k_pos <= splat(self.lasts[token], KEYS))
            if self.chosen >= 0:
                seen = T.And(seen, splat(self.named[token], KEYS) > splat(T.int32(0), KEYS))
            lowered.append(bind(T.Select(seen, as_float(self._vector("score", env), KEYS), number(MASKED, KEYS))))
        for s, x in enumerate(lowered):
            store(scores, x, m * self.keys + s * KEYS, KEYS)
        old = bind(self.top[r])
        new = bind(T.max(old, self.tiles.max16(tree(lowered, lambda a, b: bind(T.max(a, b))))))
        store(self.top, new, r, 1)
        store(change, old - new, m, 1)

    def _weigh(self, r: Expr, m: Expr, scores: Expr, probs: Expr, decay: Expr) -> None:
        """Probabilities of one row against the highest so far; `decay` is what that makes of sums so far."""
        top = bind(splat(self.top[r], KEYS))
        p = [vmath.exp_below(scores[lane_of(m * self.keys + s * KEYS, KEYS)] - top, KEYS) for s in range(self.subs)]
        total = self.total[lane_of(r * LANES, LANES)] * splat(decay[m], LANES)
        store(self.total, total + tree(p, lambda a, b: a + b), r * LANES, LANES)
        self.tiles.keep(p, probs, m)

    # -- scalar expressions

    def _scalar(self, name: str, env: Mapping[str, Expr]) -> Expr:
        return emit_expr(attr_expr(self.node, name), env, self.extras, 1)

    def _vector(self, name: str, env: Mapping[str, Expr]) -> Expr:
        return emit_expr(attr_expr(self.node, name), env, self.extras, KEYS)


def _block_rows(size: int) -> int:
    """Rows whose sums are in registers at once: a token's `size` rows should fill such blocks."""
    return 6 if 6 % size == 0 else -(-size // -(-size // 6))


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
