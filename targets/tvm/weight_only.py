"""Matmul by weights of few bits and float32 activations: matmul.py's schedule over weights that are unpacked to float32."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.targets.base import Grid, KernelSource, matmul_of
from inferloom.targets.tvm.emit import bind, lane_of, scratch, wide
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.matmul import PANEL, TILE, Column, Matmul, is_wide, lower_as
from inferloom.targets.tvm.rows import row_dim, storage
from inferloom.targets.tvm.unpacked import Unpacked

Expr = Any


def lower(source: KernelSource, isa: CpuIsa) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "matmul" kernel over a quantised weight and floats, its grid, and its arguments."""
    return lower_as(_WeightOnly, source, isa)


class _WeightOnly(Unpacked, Matmul):
    def __init__(self, body: Graph, source: KernelSource, isa: CpuIsa) -> None:
        self.body, self.layouts, self.isa, self.node = body, source.layouts, isa, matmul_of(source)
        x, _, _, packed, scales, offsets, bias = (*self.node.operands, None, None)[:7]
        if not is_wide(_value(x)):
            raise UnsupportedError(f"{self.node.loc}: the CPU target multiplies quantised weights by float32 activations, not by "
                                   f"{_value(x).type}; cast them")
        self.x, self.packed, self.scales = (body.inputs.index(_value(v)) for v in (x, packed, scales))
        self.offsets = None if offsets is None else body.inputs.index(offsets)
        self.added, self.n = bias, int(str(self.node.attrs["n"]))
        self.stored(self.node, self.n)
        self.tiles, self.steps, *_ = (int(str(d)) for d in _value(packed).type.shape)  # type: ignore[union-attr]
        self.dim = row_dim([v.type for v in body.outputs])
        self.signature: list[tuple[int | str, str]] = [
            (i, "int32" if i == self.packed else storage(v)) for i, v in enumerate(body.inputs)]
        self.signature += [(len(body.inputs) + i, storage(v)) for i, v in enumerate(body.outputs)]
        self.ldx = self.layouts[self.x].ld

    def emit(self, views: list[Expr], dims: Expr, tile: Expr) -> None:
        rows = bind(dims[self.dim])
        panel = scratch(PANEL * TILE)
        weights = bind(wide(tile) * (self.steps * TILE))
        with T.serial(0, (rows + (PANEL - 1)) // PANEL) as p:
            first = bind(p * PANEL)
            here = bind(T.min(T.int32(PANEL), rows - first))
            self.multiply(views, panel, weights, tile, lambda row, count: [
                bind((first + row + m) * self.ldx) for m in range(count)], here)
            with T.serial(0, here) as r:
                self._epilogue(views, panel, tile, r, bind(first + r))

    def _sums(self, panel: Expr, env: dict[Value, Column], r: Expr) -> Column:
        bias = env[self.added] if self.added is not None else None
        channel = None if self.whole else env[self.body.inputs[self.scales]]

        def load(row: Expr, column: tuple[Expr, Expr], lanes: int) -> Expr:
            y = panel[lane_of(r * TILE + column[0], lanes)]
            if channel is not None:
                y = bind(y * channel.load(row, column, lanes))
            return bind(y if bias is None else y + bias.load(row, column, lanes))

        return Column(load)


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
