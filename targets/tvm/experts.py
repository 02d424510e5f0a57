"""Linear layers by expert, with packed weights: a chunk is one tile of 64 columns of every expert.

A chunk goes from expert to expert, collects the rows (a token's choice each) that want it, and works on them in blocks
as matmul.py does. So an expert's weights are read once for all its rows, and those of experts that nobody chose are not
read at all. Each output element is summed over k in order, in one accumulator lane: a row's bits do not depend on which
others want the same expert.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Value
from inferloom.ir.types import DType, TensorType
from inferloom.targets.base import Grid, KernelSource, expert_linear_of
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, kernel, lane_of, number, scratch, store, wide
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.matmul import PANEL, TILE, Blocks, is_wide
from inferloom.targets.tvm.rows import storage
from inferloom.targets.tvm.unpacked import Unpacked

Expr = Any


def lower(source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of an "experts" kernel, its grid, and its arguments as operand-then-result numbers."""
    quantized = expert_linear_of(source)[1].op == "packed_quantized_expert_linear"
    made = _Quantized(source, isa) if quantized else _Experts(source, isa)
    fn = kernel(source.symbol, made.signature, made.emit, isa.llvm)
    return fn, Grid(-1, 1, made.tiles), tuple(a for a, _ in made.signature)


class _Experts(Blocks):
    def __init__(self, source: KernelSource, isa: CpuIsa) -> None:
        body, node = expert_linear_of(source)
        x, packed, choice, *bias = node.operands
        self.n, k = int(str(node.attrs["n"])), int(str(node.attrs["k"]))
        self.experts, self.tiles, self.steps, _, self.pair = (int(str(d)) for d in _type(packed).shape)
        if k % self.pair:
            raise UnsupportedError(f"{node.loc}: a bf16 matmul needs an even inner dimension, not {k}")
        self.isa, self.count = isa, k // self.pair
        self.choices = int(str(_type(choice).shape[1]))
        self.wide = is_wide(_value(x))
        self.inner = self.count * self.stride if _type(x).shape[1] != 1 else 0
        (self.output,) = body.outputs
        places = [body.inputs.index(v) for v in (x, packed, choice, *bias) if v is not None]
        self.bias = len(places) > 3
        self.ldx, self.ldc = source.layouts[places[0]].ld * self.stride // self.pair, source.layouts[places[2]].ld
        self.ldo = source.layouts[len(body.inputs)].ld
        pairs = places[1:2] if self.wide else places[:2]
        self.signature: list[tuple[int | str, str]] = [
            (i, "int32" if self.pair == 2 and i in pairs else storage(body.inputs[i])) for i in places]
        self.signature.append((len(body.inputs), storage(self.output)))

    def emit(self, views: list[Expr], dims: Expr, tile: Expr) -> None:
        choice = views[2]
        panel, rows, found = scratch(PANEL * TILE), scratch(PANEL, "int32"), scratch(1, "int32")
        with T.serial(0, self.experts) as e:
            T.buffer_store(found, T.int32(0), [0])
            with T.serial(0, dims[0]) as t:
                with T.serial(0, self.choices) as j:
                    with T.If(choice[t * self.ldc + j] == e):
                        with T.Then():
                            T.buffer_store(rows, t * self.choices + j, [found[0]])
                            T.buffer_store(found, found[0] + 1, [0])
                with T.If(T.Or(found[0] > PANEL - self.choices, t == dims[0] - 1)):
                    with T.Then():
                        self._flush(views, panel, rows, bind(found[0]), e, tile)
                        T.buffer_store(found, T.int32(0), [0])

    def _flush(self, views: list[Expr], panel: Expr, rows: Expr, here: Expr, e: Expr, tile: Expr) -> None:
        """Work on the rows that were collected for an expert."""
        x, w = views[0], views[1]
        weights = bind((wide(e) * self.tiles + tile) * (self.steps * TILE))
        with T.serial(0, here * (TILE // LANES)) as i:
            store(panel, number(0.0, LANES), i * LANES, LANES)
        self._blocks(x, w, panel, weights, lambda row, count: self._places(rows, row, count), here, T.int32(0),
                     T.int32(self.count))
        with T.serial(0, here) as r:
            self._store(views, panel, bind(rows[r]), r, e, tile)

    def _places(self, rows: Expr, first: Expr, count: int) -> list[Expr]:
        """Where collected rows lie in x."""
        return [bind(rows[first + m] // self.choices * self.ldx + rows[first + m] % self.choices * self.inner)
                for m in range(count)]

    def _store(self, views: list[Expr], panel: Expr, row: Expr, r: Expr, e: Expr, tile: Expr) -> None:
        out, base = views[-1], bind(tile * TILE)
        place = bind(row // self.choices * self.ldo + row % self.choices * self.n + base)
        narrow = _type(self.output).dtype is DType.BF16

        def put(column: Expr, lanes: int) -> None:
            y = panel[lane_of(r * TILE + column, lanes)]
            if self.bias:
                y = y + views[3][lane_of(e * self.n + base + column, lanes)]
            store(out, vmath.f32_to_bf16(bind(y), lanes) if narrow else y, place + column, lanes)

        def whole() -> None:
            with T.serial(0, TILE // LANES) as v:
                put(v * LANES, LANES)

        if self.n % TILE == 0:
            whole()
            return
        with T.If(base + TILE <= self.n):
            with T.Then():
                whole()
            with T.Else():
                with T.serial(0, self.n - base) as c:
                    put(c, 1)


class _Quantized(Unpacked, _Experts):
    """Weights of few bits by float32 activations, as weight_only.py multiplies them."""

    def __init__(self, source: KernelSource, isa: CpuIsa) -> None:
        body, node = expert_linear_of(source)
        x, packed, scales, offsets, choice, *bias = node.operands
        if not is_wide(_value(x)):
            raise UnsupportedError(f"{node.loc}: the CPU target multiplies quantised experts by float32 activations, not by "
                                   f"{_type(x)}; cast them")
        self.isa, self.n = isa, int(str(node.attrs["n"]))
        tiles, self.steps, *_ = (int(str(d)) for d in _type(packed).shape)
        self.experts, self.tiles = tiles * TILE // self.n, self.n // TILE
        self.choices = int(str(_type(choice).shape[1]))
        (self.output,) = body.outputs
        used = [v for v in (x, packed, choice, *bias) if v is not None]
        self.bias, self.x, self.packed, self.scales = len(used) > 3, 0, 1, len(used)
        self.offsets = None if offsets is None else len(used) + 1
        self.stored(node, tiles * TILE)
        self.inner = self.k if _type(x).shape[1] != 1 else 0
        places = [body.inputs.index(v) for v in (*used, scales, offsets) if v is not None]
        self.ldx, self.ldc = source.layouts[places[0]].ld, source.layouts[places[2]].ld
        self.ldo = source.layouts[len(body.inputs)].ld
        self.signature = [(i, "int32" if i == places[1] else storage(body.inputs[i])) for i in places]
        self.signature.append((len(body.inputs), storage(self.output)))

    def _flush(self, views: list[Expr], panel: Expr, rows: Expr, here: Expr, e: Expr, tile: Expr) -> None:
        at = bind(e * self.tiles + tile)
        self.multiply(views, panel, bind(wide(at) * (self.steps * TILE)), at,
                      lambda row, count: self._places(rows, row, count), here)
        if not self.whole:
            with T.serial(0, TILE // LANES) as v:
                scale = bind(views[self.scales][T.ramp(at * TILE + v * LANES, 1, LANES)])
                with T.serial(0, here) as r:
                    place = T.ramp(r * TILE + v * LANES, 1, LANES)
                    T.buffer_store(panel, panel[place] * scale, [place])
        with T.serial(0, here) as r:
            self._store(views, panel, bind(rows[r]), r, e, tile)


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value


def _type(value: Value | None) -> TensorType:
    if value is None or not isinstance(value.type, TensorType):
        raise TypeError(value)
    return value.type
