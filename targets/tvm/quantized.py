"""Matmul by quantised weights: matmul.py's schedule with products of integers.

Weights are unsigned (a value plus 128, or a nibble: a value plus 8) and activations signed, which is what one instruction
multiplies and adds four at a time; what the shift adds to a sum, the shift times the sum of the activations, is taken off
where the sum starts. Sums over integers are exact, so with one scale a row nothing depends on their order. Groups have a
sum each, and these are added up in f32, in order, in one accumulator lane: a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.types import TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, f32, lane_of, number, opaque, scratch, splat, store, wide
from inferloom.targets.tvm.integers import PairProducts, products
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.matmul import PANEL, TILE, UNROLL, Column, Matmul, for_blocks, lower_as
from inferloom.targets.tvm.rows import row_dim, storage

Expr = Any
OP = "packed_quantized_linear"
#: Steps from the weights that a single row is multiplied by to those that are prefetched: 8 KiB.
AHEAD = 32
#: What is added to a value to make it unsigned.
SHIFT = {"int8": 128, "int4": 8}


def lower(source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "matmul" kernel over a quantised weight, its grid, and its arguments as operand-then-result numbers."""
    return lower_as(_Quantized, source, isa)


class _Quantized(Matmul):
    def __init__(self, body: Graph, source: KernelSource, isa: CpuIsa) -> None:
        self.body, self.layouts, self.isa = body, source.layouts, isa
        (self.node,) = (n for n in body.nodes if n.op == OP)
        x, scale, sums, packed, scales, offsets, bias = (*self.node.operands, None, None)[:7]
        self.n, self.k, self.group = (int(str(self.node.attrs[name])) for name in ("n", "k", "group"))
        format = str(self.node.attrs["format"])
        if scale is None or format not in SHIFT:
            raise UnsupportedError(f"{self.node.loc}: the CPU target has no kernel of {format} weights and int8 activations; "
                                   "leave activations as floats")
        self.shift, self.products = SHIFT[format], products(isa, format == "int4")
        self.x, self.packed, self.scales, self.sums = (body.inputs.index(_value(v)) for v in (x, packed, scales, sums))
        self.scale, self.offsets, self.added = scale, offsets, bias
        self.tiles, self.steps, *_ = (int(str(d)) for d in _type(packed).shape)
        self.per_step = 8 if format == "int4" else 4
        self.dim = row_dim([v.type for v in body.outputs])
        self.signature: list[tuple[int | str, str]] = [
            (i, "int32" if i in (self.x, self.packed) else storage(v)) for i, v in enumerate(body.inputs)]
        self.signature += [(len(body.inputs) + i, storage(v)) for i, v in enumerate(body.outputs)]
        self.ldx, self.lds = self.layouts[self.x].ld // 4, self.layouts[self.sums].ld
        self.count = -(-self.k // self.per_step)

    def emit(self, views: list[Expr], dims: Expr, tile: Expr) -> None:
        rows = bind(dims[self.dim])
        panel = scratch(PANEL * TILE, "float32" if self.group else "int32")
        unit = max(LANES, self.group // self.per_step)
        slices = max(1, -(-self.count // self.isa.k_slice))
        depth = -(-self.count // slices // unit) * unit
        block = _Block(self, views, panel, bind(wide(tile) * (self.steps * TILE)), tile, depth)
        most = self.products.rows
        with T.serial(0, (rows + (PANEL - 1)) // PANEL) as p:
            first = bind(p * PANEL)
            here = bind(T.min(T.int32(PANEL), rows - first))
            with T.If(T.EQ(here, 1)):
                with T.Then():
                    block.single(first)
                with T.Else():
                    with T.serial(0, here) as r:
                        start = number(0.0, LANES) if self.group else splat(self.unshifted(views, bind(first + r)), LANES)
                        with T.serial(0, TILE // LANES) as v:
                            store(panel, start, r * TILE + v * LANES, LANES)
                    with T.serial(0, -(-self.count // depth)) as s:
                        begin = bind(s * depth)
                        steps = bind(T.min(T.int32(depth), self.count - begin))
                        for_blocks(here, most, lambda row, count, nth, of: block.emit(
                            first, row, count, begin, steps, nth, of), 2 if most > 2 else 1)
            with T.serial(0, here) as r:
                self._epilogue(views, panel, tile, r, bind(first + r))

    def unshifted(self, views: list[Expr], row: Expr) -> Expr:
        """Where the sum of a row without groups starts, so that it ends as if the weights had not been shifted."""
        return bind(views[self.sums][row * self.lds] * T.int32(-self.shift))

    def _sums(self, panel: Expr, env: dict[Value, Column], r: Expr) -> Column:
        bias = env[self.added] if self.added is not None else None
        channel, x_scale = env[self.body.inputs[self.scales]], env[self.scale]
        offset = env[self.offsets] if self.offsets is not None and not self.group else None
        x_sum = env[self.body.inputs[self.sums]]

        def load(row: Expr, column: tuple[Expr, Expr], lanes: int) -> Expr:
            y = panel[lane_of(r * TILE + column[0], lanes)]
            if not self.group:
                y = bind(T.cast(y, f32(lanes)) * channel.load(row, column, lanes))
                if offset is not None:
                    y = y + T.cast(x_sum.load(row, column, lanes), f32(lanes)) * offset.load(row, column, lanes)
            y = bind(y * x_scale.load(row, column, lanes))
            return y if bias is None else bind(y + bias.load(row, column, lanes))

        return Column(load)


class _Block:
    """The micro-kernel: a few rows by the columns of a tile, over a slice of k."""

    def __init__(self, of: _Quantized, views: list[Expr], panel: Expr, weights: Expr, tile: Expr, depth: int) -> None:
        self.of, self.views, self.panel, self.weights, self.tile, self.depth = of, views, panel, weights, tile, depth
        self.x, self.w = views[of.x], views[of.packed]
        self.words = scratch(of.products.rows * 2 * depth, "int32") if of.products.splits else None

    def emit(self, first: Expr, row: Expr, rows: int, begin: Expr, steps: Expr, nth: Expr, of: Expr) -> None:
        """Add `steps` steps from `begin` to the sums of one block, the `nth` `of` some: those from `row` of the panel on."""
        width, row = self.of.products.width(rows), bind(row)
        self.rows, self.begin, self.nth, self.blocks = rows, begin, nth, of
        self.xs = [bind((first + row + m) * self.of.ldx + begin * (1 if self.words is not None else self.of.products.words))
                   for m in range(rows)]
        if self.words is not None:
            self._split(steps)
        with T.serial(0, TILE // LANES // width) as part:
            ints, at = _Cells(rows, width), bind(part * width)
            if self.of.group:
                self._groups(ints, first + row, row, at, steps)
            else:
                for cell in ints.all():
                    ints[cell] = self.panel[self._place(row, at, cell)]
                self._turns(steps // UNROLL, UNROLL, width, at, lambda i: self._some(ints, bind(i * UNROLL), UNROLL, at))
                with T.serial(0, steps % UNROLL) as i:
                    self._some(ints, bind(steps // UNROLL * UNROLL + i), 1, at)
                for cell in ints.all():
                    T.buffer_store(self.panel, ints[cell], [self._place(row, at, cell)])

    def single(self, first: Expr) -> None:
        """The sums of one row that is alone: all columns of a step side by side, so that weights are read in the order in
        which they lie, and from one tile on to the next."""
        of, width = self.of, self.of.products.width(1)
        parts = [_Cells(1, width) for _ in range(TILE // LANES // width)]
        self.rows, start = 1, None if of.group else splat(of.unshifted(self.views, first), LANES)
        for part, ints in enumerate(parts):
            for m, v in ints.all():
                if start is None:
                    T.buffer_store(self.panel, number(0.0, LANES), [self._place(T.int32(0), part * width, (m, v))])
                else:
                    ints[m, v] = start
        size = of.group // of.per_step if of.group else UNROLL

        def slice(begin: Expr, steps: int) -> None:
            self.begin = begin
            self.xs = [bind(first * of.ldx + begin * (1 if self.words is not None else of.products.words))]
            if self.words is not None:
                self._split(T.int32(steps))

            def some(k: Expr, count: int) -> None:
                base = bind(self.weights + wide((begin + k + AHEAD) * TILE))
                for line in range(count * (TILE // LANES)):
                    T.evaluate(T.call_extern("void", "inferloom_prefetch", T.address_of(self.w[base + line * LANES])))
                for part, ints in enumerate(parts):
                    if of.group:
                        self._group(ints, first, T.int32(0), T.int32(part * width), bind(k // size))
                    else:
                        self._some(ints, k, count, T.int32(part * width))

            with T.serial(0, steps // size) as i:
                some(bind(i * size), size)
            if steps % size:
                with T.serial(0, steps % size) as i:
                    some(bind(steps // size * size + i), 1)

        with T.serial(0, of.count // self.depth) as s:
            slice(bind(s * self.depth), self.depth)
        if of.count % self.depth:
            slice(T.int32(of.count // self.depth * self.depth), of.count % self.depth)
        if not of.group:
            for part, ints in enumerate(parts):
                for cell in ints.all():
                    T.buffer_store(self.panel, ints[cell], [self._place(T.int32(0), T.int32(part * width), cell)])

    def _turns(self, count: Expr, size: int, width: int, at: Expr, work: Callable[[Expr], None]) -> None:
        """Do `work(i)` for i below `count`, each of `size` steps. Every block prefetches its part of the next slice's weights:
        few rows would otherwise wait for each, and with many of them memory is read all the time."""
        turns = opaque(count // self.blocks)
        with T.serial(0, turns) as turn:
            step = self.begin + self.depth + (turn * self.blocks + self.nth) * size
            base = bind(self.weights + wide(step * TILE + at * LANES))
            for u in range(size):
                for v in range(width):
                    place = T.address_of(self.w[base + (u * TILE + v * LANES)])
                    T.evaluate(T.call_extern("void", "inferloom_prefetch", place))
            with T.serial(0, self.blocks) as i:
                work(bind(turn * self.blocks + i))
        with T.serial(0, count - turns * self.blocks) as i:
            work(bind(turns * self.blocks + i))

    def _place(self, row: Expr, at: Expr, cell: tuple[int, int]) -> Expr:
        return T.ramp((row + cell[0]) * TILE + (at + cell[1]) * LANES, 1, LANES)

    def _split(self, steps: Expr) -> None:
        """Activations as the chip multiplies them: a row's even words, then its odd ones."""
        with T.serial(0, (steps + (LANES - 1)) // LANES) as i:
            for m in range(self.rows):
                for part, word in enumerate(PairProducts.split(bind(self.x[T.ramp(self.xs[m] + i * LANES, 1, LANES)]))):
                    store(self.words, word, (2 * m + part) * self.depth + i * LANES, LANES)

    def _word(self, m: int, k: Expr, u: int, part: int) -> Expr:
        """The word of row m's activations for step k + u."""
        if self.words is not None:
            return self.words[k + ((2 * m + part) * self.depth + u)]
        words = self.of.products.words
        return self.x[self.xs[m] + (k * words + (u * words + part))]

    def _some(self, ints: _Cells, k: Expr, steps: int, at: Expr) -> None:
        """Add the products of a few steps of the slice, as many as may be added up before `finish`."""
        made, products = _Cells(ints.rows, ints.width), self.of.products
        for cell in made.all():
            made[cell] = products.start(ints[cell])
        base = bind(self.weights + wide((self.begin + k) * TILE + at * LANES))
        for u in range(steps):
            raw = [bind(self.w[T.ramp(base + (u * TILE + v * LANES), 1, LANES)]) for v in range(made.width)]
            factors = [products.factors(r) for r in raw]
            for part in range(products.words):
                for m in range(self.rows):
                    x = bind(splat(self._word(m, k, u, part), LANES))
                    for v in range(made.width):
                        made[m, v] = products.add(made[m, v], factors[v][part], x)
        for cell in made.all():
            ints[cell] = products.finish(ints[cell], made[cell])

    def _groups(self, ints: _Cells, at_x: Expr, row: Expr, at: Expr, steps: Expr) -> None:
        """Add the groups of the slice, each summed as integers, to the sums in the panel."""
        each = self.of.group // self.of.per_step
        self._turns(steps // each, each, ints.width, at, lambda i: self._group(ints, at_x, row, at, i))

    def _group(self, ints: _Cells, at_x: Expr, row: Expr, at: Expr, i: Expr) -> None:
        """Add the slice's group i."""
        of, views = self.of, self.views
        each, groups = of.group // of.per_step, of.k // of.group
        g = bind(self.begin // each + i)
        sums = [bind(views[of.sums][(at_x + m) * of.lds + g]) for m in range(self.rows)]
        for m, v in ints.all():
            ints[m, v] = splat(sums[m] * T.int32(-of.shift), LANES)
        with T.serial(0, each // UNROLL) as part:
            self._some(ints, bind(i * each + part * UNROLL), UNROLL, at)
        place = bind(wide(self.tile) * (groups * TILE) + wide(g * TILE + at * LANES))
        scales = [_widened(views[of.scales], place + v * LANES) for v in range(ints.width)]
        offsets = [_widened(views[of.body.inputs.index(of.offsets)], place + v * LANES)
                   for v in range(ints.width)] if of.offsets is not None else []
        for m, v in ints.all():
            made = vmath.fma(T.cast(ints[m, v], f32(LANES)), scales[v], self.panel[self._place(row, at, (m, v))], LANES)
            if offsets:
                made = vmath.fma(splat(T.cast(sums[m], "float32"), LANES), offsets[v], made, LANES)
            T.buffer_store(self.panel, made, [self._place(row, at, (m, v))])


class _Cells:
    """Vectors of a block's integer sums, in registers: [row, vector]."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self._buffer = scratch(rows * width * LANES, "int32")

    def all(self) -> list[tuple[int, int]]:
        return [(m, v) for m in range(self.rows) for v in range(self.width)]

    def _at(self, cell: tuple[int, int]) -> Expr:
        return T.ramp((cell[0] * self.width + cell[1]) * LANES, 1, LANES)

    def __getitem__(self, cell: tuple[int, int]) -> Expr:
        return self._buffer[self._at(cell)]

    def __setitem__(self, cell: tuple[int, int], value: Expr) -> None:
        T.buffer_store(self._buffer, value, [self._at(cell)])


def _widened(view: Expr, place: Expr) -> Expr:
    return bind(vmath.f16_to_f32(view[T.ramp(place, 1, LANES)], LANES))


def _type(value: Value | None) -> TensorType:
    if value is None or not isinstance(value.type, TensorType):
        raise TypeError(value)
    return value.type


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
