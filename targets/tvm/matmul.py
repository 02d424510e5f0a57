"""Matmul with packed weights: one kernel for any number of rows, from decode to prefill.

A chunk is one tile of 64 columns over all rows. Rows are worked on in blocks of `rows` that stay in registers
while the tile's weights stream past; long k is cut so that a slice of the tile stays in cache while many row
blocks use it. Every output element is summed over k in order, in one accumulator lane, whatever the number of
rows, so a row's bits do not depend on its batch. Sums pass through a small panel on the stack, from which the
epilogue reads them row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import DType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import pointwise, vmath
from inferloom.targets.tvm.emit import LANES, bind, kernel, lane_of, number, opaque, scratch, splat, store, wide
from inferloom.targets.tvm.isa import CpuIsa, high_half, low_half
from inferloom.targets.tvm.rows import row_dim, storage

Expr = Any
TILE = 64
#: Rows of a panel: its sums take 96 * 64 * 4 bytes, half of a common L1 cache.
PANEL = 96
UNROLL = 4


def lower(source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "matmul" kernel, its grid, and its arguments as operand-then-result numbers."""
    return lower_as(Matmul, source, isa)


def lower_as(program: type[Matmul], source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """As `lower`, with the program that multiplies by the weight as it is stored."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    made = program(body, source, isa)
    fn = kernel(source.symbol, made.signature, made.emit, isa.llvm)
    return fn, Grid(-1, 1, made.tiles), tuple(a for a, _ in made.signature)


@dataclass(frozen=True, slots=True)
class Column:
    """An epilogue value: `load(row, (column within the tile, column of the output), lanes)`.

    `half` values have 32 columns a tile: they come from one of two interleaved weights.
    """

    load: Callable[[Expr, tuple[Expr, Expr], int], Expr]
    half: bool = False


def for_blocks(rows: Expr, most: int, emit: Callable[[Expr, int, Expr, Expr], None], fewest: int = 1) -> None:
    """Cut `rows` into blocks of at most `most`, as even as can be: `emit(first row, rows, number, blocks)` for each.

    `fewest`: what no block falls below: 2, where there are more rows than one and blocks of more than two.
    """
    many = opaque(T.max(T.int32(1), (rows + (most - 1)) // most))
    least, larger = opaque(rows // many), opaque(rows % many)  # rows of a block, blocks that have one more
    for count in range(fewest, most + 1):
        more = T.EQ(least, count - 1)
        here = opaque(T.Select(more, larger, T.Select(T.EQ(least, count), many - larger, T.int32(0))))
        before = opaque(T.Select(more, T.int32(0), larger))
        with T.serial(0, here) as b:
            emit(opaque(before * (count + 1) + b * count), count, opaque(before + b), many)


class Blocks:
    """The micro-kernel: blocks of rows that stay in registers, over `steps` of k with weights in tiles of 64 columns.

    A step is `pair` elements of k. x has them in one 32-bit number, or, where `wide`, as so many floats.
    """

    isa: CpuIsa
    pair: int
    wide: bool

    @property
    def stride(self) -> int:
        """Elements of x in a step."""
        return self.pair if self.wide else 1

    @property
    def halved(self) -> bool:
        """Whether pairs of bf16 weights are multiplied as floats, one after the other."""
        return self.wide and self.pair == 2

    @property
    def most(self) -> int:
        """Rows of the largest block. Halves of weights, beside the weights, take the registers of one."""
        return max(1, self.isa.rows - (1 if self.halved else 0))

    def _blocks(self, x: Expr, w: Expr, panel: Expr, weights: Expr, place: Callable[[Expr, int], list[Expr]], rows: Expr,
                begin: Expr, steps: Expr, ahead: int = 0) -> None:
        """Add `steps` steps from `begin` to the sums of `rows` rows, in blocks as even as can be.

        `place(row, count)`: where `count` rows of x begin. Weights `ahead` steps further are prefetched (0: none), by
        each block its part, so that memory is read all the time.
        """
        for_blocks(rows, self.most, lambda row, count, nth, of: self._block(
            x, w, panel, weights, place(row, count), row, begin, steps, ahead, nth, of))

    def _block(self, x: Expr, w: Expr, panel: Expr, weights: Expr, xs: list[Expr], row: Expr, begin: Expr, steps: Expr,
               ahead: int, nth: Expr, of: Expr) -> None:
        """One block, the `nth` `of` some: rows of x at `xs`, their sums from `row` of the panel on."""
        count, width = len(xs), 1
        while width < TILE // LANES and 2 * width * count <= self.most * self.isa.vectors:
            width *= 2  # fewer rows leave registers for more columns
        if count == 1 and width == TILE // LANES:
            ahead = 0  # one stream, in order: what the processor prefetches by itself is better
        acc = scratch(count * width * LANES)

        def cell(m: int, v: int) -> Expr:
            return T.ramp((m * width + v) * LANES, 1, LANES)

        with T.serial(0, TILE // LANES // width) as group:
            column = bind(group * (width * LANES))
            base = bind(weights + wide(begin * TILE + column))
            cells = [(m, v) for m in range(count) for v in range(width)]

            def sums(m: int, v: int) -> Expr:
                return T.ramp((row + m) * TILE + column + v * LANES, 1, LANES)

            def add(k: Expr, times: int) -> None:
                """Steps k to k + `times`."""
                at = bind(base + wide(k * TILE))
                rows = [bind(start + k * self.stride) for start in xs]
                for u in range(times):
                    ws = [bind(w[T.ramp(at + (u * TILE + v * LANES), 1, LANES)]) for v in range(width)]
                    for part, factors in enumerate(self._factors(ws)):
                        for m in range(count):
                            xv = bind(splat(x[rows[m] + (u * self.stride + part)], LANES))
                            for v in range(width):
                                T.buffer_store(acc, self._multiply(acc[cell(m, v)], xv, factors[v]), [cell(m, v)])

            def fetch(k: Expr) -> None:
                at = bind(base + wide((ahead + k) * TILE))
                for u in range(UNROLL):
                    for v in range(width):
                        T.evaluate(T.call_extern("void", "inferloom_prefetch", T.address_of(w[at + (u * TILE + v * LANES)])))

            for m, v in cells:
                T.buffer_store(acc, panel[sums(m, v)], [cell(m, v)])
            turns = opaque(steps // UNROLL // of)
            with T.serial(0, turns) as turn:
                if ahead:
                    fetch((turn * of + nth) * UNROLL)
                with T.serial(0, of) as i:
                    add(bind((turn * of + i) * UNROLL), UNROLL)
            with T.serial(0, steps - turns * of * UNROLL) as k:
                add(bind(turns * of * UNROLL + k), 1)
            for m, v in cells:
                T.buffer_store(panel, acc[cell(m, v)], [sums(m, v)])

    def _factors(self, ws: list[Expr]) -> list[list[Expr]]:
        """What a step's elements of x are multiplied by, each in turn."""
        return [[bind(half(w)) for w in ws] for half in (low_half, high_half)] if self.halved else [ws]

    def _multiply(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        return vmath.fma(x, w, acc, LANES) if self.wide else self.isa.dot_pair(acc, x, w)


class Matmul(Blocks):
    def __init__(self, body: Graph, source: KernelSource, isa: CpuIsa) -> None:
        self.body, self.layouts, self.isa = body, source.layouts, isa
        (self.node,) = (n for n in body.nodes if n.op == "packed_linear")
        x, packed, *bias = self.node.operands
        self.n, self.k = int(str(self.node.attrs["n"])), int(str(self.node.attrs["k"]))
        self.x, self.packed, self.bias = body.inputs.index(_value(x)), body.inputs.index(_value(packed)), bias
        packed_type = _value(packed).type
        if not isinstance(packed_type, TensorType):
            raise TypeError(packed)
        self.tiles, self.steps, _, self.pair = (int(str(d)) for d in packed_type.shape)
        if self.k % self.pair:
            raise UnsupportedError(f"{self.node.loc}: a bf16 matmul needs an even inner dimension, not {self.k}")
        self.dim = row_dim([v.type for v in body.outputs])
        self.wide = is_wide(_value(x))
        # Pairs are read as 32 bits.
        pairs = {self.packed} if self.wide else {self.x, self.packed}
        self.signature: list[tuple[int | str, str]] = [
            (i, "int32" if self.pair == 2 and i in pairs else storage(v)) for i, v in enumerate(body.inputs)]
        self.signature += [(len(body.inputs) + i, storage(v)) for i, v in enumerate(body.outputs)]
        self.ldx = self.layouts[self.x].ld * self.stride // self.pair
        self.count = self.k // self.pair

    def emit(self, views: list[Expr], dims: Expr, tile: Expr) -> None:
        rows = bind(dims[self.dim])
        panel = scratch(PANEL * TILE)
        x, w = views[self.x], views[self.packed]
        weights = bind(wide(tile) * (self.steps * TILE))
        slices = max(1, -(-self.count // self.isa.k_slice))
        depth = -(-self.count // slices // UNROLL) * UNROLL
        with T.serial(0, (rows + (PANEL - 1)) // PANEL) as p:
            first = bind(p * PANEL)
            here = bind(T.min(T.int32(PANEL), rows - first))
            with T.serial(0, here * (TILE // LANES)) as i:
                store(panel, number(0.0, LANES), i * LANES, LANES)
            with T.serial(0, -(-self.count // depth)) as s:
                begin = bind(s * depth)
                steps = bind(T.min(T.int32(depth), self.count - begin))

                def place(row: Expr, count: int) -> list[Expr]:
                    start = bind((first + row) * self.ldx + begin * self.stride)
                    return [start + m * self.ldx for m in range(count)]

                self._blocks(x, w, panel, weights, place, here, begin, steps, depth)
            with T.serial(0, here) as r:
                self._epilogue(views, panel, tile, r, bind(first + r))

    # -- epilogue

    def _epilogue(self, views: list[Expr], panel: Expr, tile: Expr, r: Expr, row: Expr) -> None:
        env: dict[Value, Column] = {}
        for i, value in enumerate(self.body.inputs):
            if i not in (self.x, self.packed):
                env[value] = self._operand(value, views[i], self.layouts[i].ld, tile)
        for node in self.body.nodes:
            if node is self.node:
                env[node.result] = self._sums(panel, env, r)
            elif node.op == "reshape":
                env[node.result] = env[_value(node.operands[0])]
            elif node.op == "slice":
                env[node.result] = self._half(env[_value(node.operands[0])], int(str(node.attrs["start"])), tile)
            elif pointwise.supported(node.op):
                env[node.result] = self._pointwise(node, env)
            else:
                raise UnsupportedError(f"{node.loc}: {node.op} cannot follow a matmul in one kernel")
        for i, value in enumerate(self.body.outputs, len(self.body.inputs)):
            column = env[value]
            self._store(value, column, views[i], self.layouts[i].ld, tile, row, 2 if column.half else 1)

    def _sums(self, panel: Expr, env: dict[Value, Column], r: Expr) -> Column:
        bias = env[self.bias[0]] if self.bias and self.bias[0] is not None else None

        def load(row: Expr, column: tuple[Expr, Expr], lanes: int) -> Expr:
            y = panel[lane_of(r * TILE + column[0], lanes)]
            return bind(y if bias is None else y + bias.load(row, column, lanes))

        return Column(load)

    def _half(self, x: Column, which: int, tile: Expr) -> Column:
        """Columns of one half: groups of 32 within the tile. What x reads by column has both halves."""

        def load(row: Expr, column: tuple[Expr, Expr], lanes: int) -> Expr:
            inside, _ = column
            full = inside + which * (TILE // 2)
            return x.load(row, (full, tile * TILE + full), lanes)

        return Column(load, half=True)

    def _operand(self, value: Value, view: Expr, ld: int, tile: Expr) -> Column:
        shape = value.type.shape if isinstance(value.type, TensorType) else ()
        has_rows = bool(shape) and not isinstance(shape[0], int)
        narrow = isinstance(value.type, TensorType) and value.type.dtype is DType.BF16
        size = prod(int(str(d)) for d in (shape[1:] if has_rows else shape))

        def load(row: Expr, column: tuple[Expr, Expr], lanes: int) -> Expr:
            _, absolute = column
            if size == 1:
                raw = splat(view[row * ld if has_rows else 0], lanes)
            else:
                raw = view[lane_of(absolute + (row * ld if has_rows else 0), lanes)]
            return vmath.bf16_to_f32(raw, lanes) if narrow else raw

        return Column(load)

    def _pointwise(self, node: Node, env: dict[Value, Column]) -> Column:
        operands = [env[_value(v)] for v in node.operands]

        def load(row: Expr, column: tuple[Expr, Expr], lanes: int) -> Expr:
            return pointwise.emit(node, [o.load(row, column, lanes) for o in operands], lanes)

        return Column(load, half=any(o.half for o in operands))

    def _store(self, value: Value, source: Column, view: Expr, ld: int, tile: Expr, row: Expr, parts: int) -> None:
        if not isinstance(value.type, TensorType):
            raise TypeError(value)
        width, total = TILE // parts, self.n // parts
        base = bind(tile * width)
        narrow = value.type.dtype is DType.BF16

        def put(column: Expr, lanes: int) -> None:
            x = source.load(row, (column, base + column), lanes)
            store(view, vmath.f32_to_bf16(x, lanes) if narrow else x, row * ld + base + column, lanes)

        def whole() -> None:
            with T.serial(0, width // LANES) as v:
                put(v * LANES, LANES)

        if total % width == 0:
            whole()
            return
        # The last tile is partly padding, which has no room in the output.
        with T.If(base + width <= total):
            with T.Then():
                whole()
            with T.Else():
                with T.serial(0, total - base) as c:
                    put(c, 1)


def is_wide(x: Value) -> bool:
    """Whether what is multiplied with a weight is float32, whatever the weight is."""
    return isinstance(x.type, TensorType) and x.type.dtype is DType.F32


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
