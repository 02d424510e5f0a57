"""Matmul on a device: a work-group for 8 rows by a tile of 64 columns, a column for each thread.

The rows' inputs pass through shared memory in slices. Every output element is summed over k in order by one thread, so
a row's bits do not depend on its batch.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.graph import Graph, Value
from inferloom.ir.types import TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import bind
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.matmul import TILE, Matmul
from inferloom.targets.tvm.portable.emit import THREADS, Group, device_kernel, local

Expr = Any
ROWS = 8
#: Elements of k that are in shared memory at a time; weights are padded to a multiple of it.
SLICE = 32


def lower(source: KernelSource, limit: int) -> tuple[Any, int, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "matmul" kernel, the bytes its groups share, its grid, and its arguments."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    made = _DeviceMatmul(body, source, CpuIsa(1, 1, 1))
    fn, shared = device_kernel(source, made.signature, limit, made.emit_device)
    return fn, shared, Grid(made.dim, ROWS, made.tiles), (*(a for a, _ in made.signature), "dims")


class _DeviceMatmul(Matmul):
    def emit_device(self, views: list[Expr], dims: Expr, chunk: Expr, group: Group) -> None:
        assert TILE == THREADS and self.steps % SLICE == 0
        self.thread = thread = group.thread
        rows, tile, first = bind(dims[self.dim]), bind(chunk % self.tiles), bind(chunk // self.tiles * ROWS)
        x, w = views[self.x], views[self.packed]
        inputs, panel, acc = group.shared(ROWS * SLICE), group.shared(ROWS * TILE), local(ROWS)
        for r in range(ROWS):
            T.buffer_store(acc, T.float32(0.0), [r])
        with T.serial(0, self.steps // SLICE) as s:
            def fill(index: list[Expr]) -> None:
                r, k = bind(T.min(first + index[0], rows - 1)), bind(s * SLICE + index[1])
                value = x[r * self.ldx + T.min(k, T.int32(self.k - 1))]
                T.buffer_store(inputs, T.Select(k < self.k, value, T.float32(0.0)), [index[0] * SLICE + index[1]])

            group.spread((ROWS, SLICE), fill)
            group.barrier()
            with T.serial(0, SLICE) as k:
                weight = bind(w[(tile * self.steps + s * SLICE + k) * TILE + thread])
                for r in range(ROWS):
                    T.buffer_store(acc, vmath.fma(inputs[r * SLICE + k], weight, acc[r], 1), [r])
            group.barrier()
        for r in range(ROWS):
            T.buffer_store(panel, acc[r], [r * TILE + thread])
        group.barrier()
        with T.serial(0, ROWS) as r:
            with T.If(first + r < rows):
                with T.Then():
                    self._epilogue(views, panel, tile, r, bind(first + r))

    def _store(self, value: Value, source: Any, view: Expr, ld: int, tile: Expr, row: Expr, parts: int) -> None:
        if not isinstance(value.type, TensorType):
            raise TypeError(value)
        width, total, thread = TILE // parts, self.n // parts, self.thread
        column = tile * width + thread
        with T.If(T.And(thread < width, column < total)):
            with T.Then():
                T.buffer_store(view, source.load(row, (thread, column), 1), [row * ld + column])
