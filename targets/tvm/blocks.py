"""Means of blocks of keys, and how well queries meet them: a chunk is one key head of a sequence, or of a tile of tokens."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.ops.sparse import NEVER, OWN
from inferloom.ir.types import DType, RecurrentType, StateType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, kernel, lane_of, number, scratch, splat, store, vectors, wide
from inferloom.targets.tvm.kvlayout import KEYS, KvLayout
from inferloom.targets.tvm.rows import storage
from inferloom.targets.tvm.rowvalue import tree

Expr = Any
SEQS, Q_TILES = 1, 3


def lower(source: KernelSource) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "blocks" kernel, its grid, and its arguments."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    (node,) = body.nodes
    made = _Means(source, body, node) if node.op == "block_means" else _Scores(source, body, node)
    return (kernel(source.symbol, made.signature, made.emit), Grid(made.dim, 1, made.means.shape[0]),
            tuple(a for a, _ in made.signature))


class _Blocks:
    """What both kernels read: `at` are the places of the node's operands among the kernel's."""

    def __init__(self, source: KernelSource, body: Graph, node: Node, means: int) -> None:
        self.node, self.operands = node, [_value(v) for v in node.operands]
        self.at = [body.inputs.index(v) for v in self.operands]
        type, tables = self.operands[means].type, self.operands[-1].type
        if not isinstance(type, RecurrentType) or not isinstance(tables, TensorType):
            raise TypeError(node)
        self.means, self.columns = type, int(str(tables.shape[1]))
        self.layouts = [source.layouts[i] for i in self.at]
        self.apart = self.layouts[means].block_stride // 4

    def mean(self, page: Expr, head: Expr) -> Expr:
        """Where a block's mean begins."""
        return bind(wide(page) * self.apart + wide(head * self.means.shape[1]))


class _Means(_Blocks):
    dim = SEQS

    def __init__(self, source: KernelSource, body: Graph, node: Node) -> None:
        super().__init__(source, body, node, 0)
        state = self.operands[1].type
        if not isinstance(state, StateType) or state.latent:
            raise UnsupportedError(f"{node.loc}: means of keys that are values too")
        self.state, self.pair = state, 2 if state.dtype is DType.BF16 else 1
        self.stride = self.layouts[1].block_stride // state.dtype.itemsize
        self.layout = KvLayout(state)
        types = ["float32", "int32" if self.pair == 2 else storage(self.operands[1]), *["int32"] * 4]
        self.signature: list[tuple[int | str, str]] = list(zip(self.at, types, strict=True))
        if state.scales:
            self.signature.append((self.at[1], "float32"))

    def emit(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        means, keys, starts, lens, tables, own, *scales = views
        state, size = self.state, self.state.block_tokens
        seq, head = bind(chunk // state.heads), bind(chunk % state.heads)
        length = bind(lens[seq])
        first = bind((length - starts[seq + 1] + starts[seq]) // size)
        with T.serial(0, length // size - first) as i:
            place = bind(seq * self.columns + first + i)
            tile_size = self.layout.tile // state.dtype.itemsize
            page = bind(wide(tables[place]) * self.stride + wide(head * (self.layout.tiles * tile_size)))
            target = self.mean(own[place], head)
            with T.serial(0, state.k_dim // self.pair) as d:
                sums = [scratch(LANES) for _ in range(self.pair)]
                for each in sums:
                    store(each, number(0.0, LANES), T.int32(0), LANES)
                with T.serial(0, size // KEYS) as tile:
                    first = bind(page + wide(tile * tile_size))
                    raw = bind(keys[T.ramp(first // self.pair + wide(d * KEYS), 1, KEYS)])
                    if state.scales:
                        raw = vmath.from_8_bits(raw, state.dtype, KEYS)
                        raw = bind(raw * scales[0][T.ramp((first + self.layout.key_scales) // 4, 1, KEYS)])
                    for each, x in zip(sums, self._floats(raw), strict=True):
                        store(each, each[lane_of(T.int32(0), LANES)] + x, T.int32(0), LANES)
                for j, each in enumerate(sums):
                    total = tree([each[lane] for lane in range(LANES)], lambda a, b: a + b)
                    store(means, total * T.float32(1 / size), target + wide(d * self.pair + j), 1)

    def _floats(self, raw: Expr) -> list[Expr]:
        """An element of 16 keys, or two of bf16, which lie side by side."""
        if self.pair == 1:
            return [raw]
        low = T.shift_left(raw, splat(T.int32(16), LANES))
        return [T.reinterpret("float32x16", x) for x in (low, T.bitwise_and(raw, splat(T.int32(-65536), LANES)))]


class _Scores(_Blocks):
    dim = Q_TILES

    def __init__(self, source: KernelSource, body: Graph, node: Node) -> None:
        super().__init__(source, body, node, 1)
        q, (out,) = self.operands[0], body.outputs
        if not isinstance(q.type, TensorType):
            raise TypeError(q)
        self.narrow, self.group = q.type.dtype is DType.BF16, int(str(q.type.shape[1])) // self.means.shape[0]
        self.block = int(str(node.attrs["block"]))
        types = [storage(q), "float32", *["int32"] * 3]
        self.signature: list[tuple[int | str, str]] = list(zip(self.at, types, strict=True))
        self.signature += [(len(body.inputs), storage(out)), ("q_tiles", "int32")]
        self.ldo = source.layouts[len(body.inputs)].ld

    def emit(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        q, means, starts, lens, own, out, tiles = views
        heads, dk = self.means.shape
        lanes = vectors(dk)
        tile, head = bind(chunk // heads), bind(chunk % heads)
        seq, first, count = (bind(tiles[tile * 3 + i]) for i in range(3))
        shared = scratch(dk)
        with T.serial(first, first + count) as token:
            block = bind((lens[seq] - starts[seq + 1] + token) // self.block)
            with T.serial(0, dk // lanes) as v:
                d = bind(v * lanes)
                parts = []
                for i in range(self.group):
                    raw = q[lane_of(token * self.layouts[0].ld + (head * self.group + i) * dk + d, lanes)]
                    parts.append(vmath.bf16_to_f32(raw, lanes) if self.narrow else raw)
                store(shared, tree(parts, lambda a, b: a + b), d, lanes)
            row = bind(token * self.ldo + head * self.columns)
            with T.serial(0, self.columns) as b:
                with T.If(b < block):
                    with T.Then():
                        at = self.mean(own[seq * self.columns + b], head)
                        acc = scratch(lanes)
                        store(acc, number(0.0, lanes), T.int32(0), lanes)
                        with T.serial(0, dk // lanes) as v:
                            x, y = shared[lane_of(v * lanes, lanes)], means[lane_of(at + wide(v * lanes), lanes)]
                            store(acc, vmath.fma(x, y, acc[lane_of(T.int32(0), lanes)], lanes), T.int32(0), lanes)
                        store(out, tree([acc[i] for i in range(lanes)], lambda a, b: a + b), row + b, 1)
                    with T.Else():
                        store(out, T.Select(T.EQ(b, block), T.float32(OWN), T.float32(NEVER)), row + b, 1)


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
