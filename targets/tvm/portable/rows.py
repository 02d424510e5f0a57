"""Row programs on a device: a work-group for each row, and a thread for every so many elements of it.

Values are read lazily, as on a CPU; what is read more than once lies in shared memory if there is room, and is computed
again if not.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import StateType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import bind
from inferloom.targets.tvm.portable.emit import THREADS, Group, device_kernel, unflatten
from inferloom.targets.tvm.rows import RowProgram, axes_of
from inferloom.targets.tvm.rowvalue import RowValue, flat, in_scratch, last

Expr = Any
Index = Any


def lower(source: KernelSource, limit: int) -> tuple[Any, int, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "row" kernel, the bytes its groups share, its grid, and its arguments."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    program = _DeviceRow(body, source)
    fn, shared = device_kernel(source, program.signature, limit, program.emit_device)
    return fn, shared, Grid(program.dim, 1, 1), (*(a for a, _ in program.signature), "dims")


class _DeviceRow(RowProgram):
    chip = "a device reached by source"

    def emit_device(self, views: list[Expr], dims: Expr, chunk: Expr, group: Group) -> None:
        self.group = group
        count = len(self.body.inputs)
        self._bind_inputs(views)
        row = bind(chunk)
        for node in self.body.nodes:
            self._node(node, row)
        for (i, value), view in zip(self.stored, views[count:], strict=True):
            source, ld = self.env[value], self.layouts[count + i].ld
            group.spread(source.shape, lambda index: T.buffer_store(
                view, source.load(row, index, 1), [flat(index, source.shape) + row * ld]))

    def _materialize(self, value: RowValue, row: Expr, kind: str) -> RowValue:
        size = max(prod(value.shape), 1)
        if not self.group.fits(size):
            return value
        buffer = self.group.shared(size, kind)
        self.group.spread(value.shape, lambda index: T.buffer_store(
            buffer, value.load(row, index, 1), [flat(index, value.shape)]))
        self.group.barrier()
        return in_scratch(buffer, value.shape)

    # -- reductions and norms

    def _reduce(self, value: RowValue, row: Expr, axes: int, start: float, combine: Callable[[Expr, Expr], Expr],
                finish: Callable[[Expr], Expr], each: Callable[[Expr, list[Expr]], Expr] = lambda x, index: x) -> RowValue:
        """Reduce the last `axes` axes, in an order that depends on their sizes alone."""
        group, outer, inner = self.group, value.shape[:len(value.shape) - axes], value.shape[len(value.shape) - axes:]
        size = prod(inner)
        result = group.shared(max(prod(outer), 1))
        if prod(outer) > 1:  # a thread for each
            def one(index: list[Expr]) -> None:
                place = flat(index, outer)
                T.buffer_store(result, T.float32(start), [place])
                with T.serial(0, size) as i:
                    x = each(value.load(row, [*index, *unflatten(i, inner)], 1), index)
                    T.buffer_store(result, combine(result[place], x), [place])
                T.buffer_store(result, finish(result[place]), [place])

            group.spread(outer, one)
        else:
            first = [T.int32(0)] * len(outer)
            partial, thread = group.shared(THREADS), group.thread
            T.buffer_store(partial, T.float32(start), [thread])

            def add(index: list[Expr]) -> None:
                x = each(value.load(row, [*first, *index], 1), first)
                T.buffer_store(partial, combine(partial[thread], x), [thread])

            group.spread(inner, add)
            group.barrier()
            half = THREADS // 2
            while half:
                with T.If(thread < half):
                    with T.Then():
                        T.buffer_store(partial, combine(partial[thread], partial[thread + half]), [thread])
                group.barrier()
                half //= 2
            with T.If(thread < 1):
                with T.Then():
                    T.buffer_store(result, finish(partial[0]), [0])
        group.barrier()
        return in_scratch(result, outer)

    def _reduced(self, node: Node, row: Expr, start: float, combine: Any, mean: bool) -> RowValue:
        x = self._of(node.operands[0])
        axes = sorted(self._axis(node, a) for a in axes_of(node))
        if axes != list(range(len(x.shape) - len(axes), len(x.shape))):
            raise UnsupportedError(f"{node.loc}: {node.op} over axes {axes}; {self.chip} reduces trailing axes only")
        count = prod(x.shape[axes[0]:])
        made = self._reduce(x, row, len(axes), start, combine, lambda s: s * T.float32(1 / count) if mean else s)
        return RowValue(self._shape(node.result), 1, lambda row, index, lanes: made.load(row, list(index[:axes[0]]), 1))

    def _rms_norm(self, node: Node, row: Expr) -> RowValue:
        x, eps = self._of(node.operands[0]), float(str(node.attrs["eps"]))
        scale = self._reduce(x, row, 1, 0.0, _add, _inverse_root(last(x.shape), eps), lambda v, index: v * v)
        return self._scaled(x, node, lambda row, index, lanes: x.load(row, index, 1) * scale.load(row, list(index[:-1]), 1))

    def _layer_norm(self, node: Node, row: Expr) -> RowValue:
        x, eps = self._of(node.operands[0]), float(str(node.attrs["eps"]))
        size = last(x.shape)
        mean = self._reduce(x, row, 1, 0.0, _add, lambda s: s * T.float32(1 / size))

        def squared(v: Expr, index: list[Expr]) -> Expr:
            d = bind(v - mean.load(row, list(index), 1))
            return d * d

        scale = self._reduce(x, row, 1, 0.0, _add, _inverse_root(size, eps), squared)
        return self._scaled(x, node, lambda row, index, lanes: (
            x.load(row, index, 1) - mean.load(row, list(index[:-1]), 1)) * scale.load(row, list(index[:-1]), 1))

    # -- movement

    def _concat(self, node: Node, row: Expr) -> RowValue:
        axis, parts = self._axis(node, int(str(node.attrs["axis"]))), [self._of(v) for v in node.operands]

        def load(row: Expr, index: Index, lanes: int) -> Expr:
            made, start = None, 0
            for part in parts:
                own = list(index)
                own[axis] = T.max(T.min(index[axis] - start, T.int32(part.shape[axis] - 1)), T.int32(0))
                x = part.load(row, own, 1)
                made = x if made is None else T.Select(index[axis] < start, made, x)
                start += part.shape[axis]
            return bind(made)

        return RowValue(self._shape(node.result), 1, load, cheap=False)

    def _rotary(self, node: Node, row: Expr) -> RowValue:
        x, cos, sin = (self._of(v) for v in node.operands)
        half, interleaved = last(cos.shape), bool(node.attrs["interleaved"])

        def load(row: Expr, index: Index, lanes: int) -> Expr:
            h, j = index
            j = bind(j)
            turned = T.min(j, T.int32(2 * half - 1))  # what is beyond stays as it is
            first = turned % 2 < 1 if interleaved else turned < half
            other = bind(T.Select(first, turned + (1 if interleaved else half), turned - (1 if interleaved else half)))
            pair = bind(turned // 2 if interleaved else turned % half)
            a, b = bind(x.load(row, [h, j], 1)), bind(x.load(row, [h, other], 1))
            s = bind(sin.load(row, [pair], 1))
            made = bind(a * cos.load(row, [pair], 1) + b * T.Select(first, T.float32(0.0) - s, s))
            return made if 2 * half == x.shape[-1] else bind(T.Select(j < 2 * half, made, a))

        return RowValue(x.shape, 1, load, cheap=False)

    # -- reading and writing by index

    def _topk(self, node: Node, row: Expr) -> None:
        raise UnsupportedError(f"{node.loc}: {self.chip} cannot lower topk yet")

    def _embedding(self, node: Node, row: Expr) -> RowValue:
        ids, table = self._of(node.operands[0]), self._of(node.operands[1])
        token = bind(ids.load(row, [], 1))
        return RowValue(self._shape(node.result), 1, lambda row, index, lanes: table.load(row, [token, *index], 1))

    def _packed_embedding(self, node: Node, row: Expr) -> RowValue:
        ids, packed = self._of(node.operands[0]), self._of(node.operands[1])
        token = bind(ids.load(row, [], 1))
        _, _, tile, pair = packed.shape
        return RowValue(self._shape(node.result), 1, lambda row, index, lanes: packed.load(
            row, [token // tile, index[0] // pair, token % tile, index[0] % pair], 1))

    def _kv_write(self, node: Node, row: Expr) -> None:
        state, k, v, slots = node.operands
        if state is None or not isinstance(state.type, StateType):
            raise TypeError(state)
        type, (pool, stride) = state.type, self.state[state]
        if type.latent:
            raise UnsupportedError(f"{node.loc}: {self.chip} cannot lower latent attention yet")
        slot = bind(self._of(slots).load(row, [], 1))
        at = bind(slot % type.block_tokens)
        tile = 16 * type.per_token
        block = bind(slot // type.block_tokens * stride + at // 16 * tile)
        apart = type.block_tokens // 16 * tile
        keys, values = self._of(k), self._of(v)
        self.group.spread((type.heads, type.k_dim), lambda index: T.buffer_store(
            pool, keys.load(row, index, 1), [block + index[0] * apart + index[1] * 16 + at % 16]))
        self.group.spread((type.heads, type.v_dim), lambda index: T.buffer_store(
            pool, values.load(row, index, 1), [block + index[0] * apart + 16 * type.k_dim + at % 16 * type.v_dim + index[1]]))

    def _store(self, value: Value, view: Expr, ld: int, row: Expr) -> None:
        raise NotImplementedError("devices store in emit_device")


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _inverse_root(size: int, eps: float) -> Callable[[Expr], Expr]:
    return lambda s: vmath.rsqrt(s * T.float32(1 / size) + T.float32(eps), 1)
