"""Row programs: a kernel whose every op stays within one token's row.

Each chunk works on a few rows, one after the other. Pointwise chains are fused into the loops that store or
reduce them; a value goes to scratch on the stack only when it is read more than once. The order of every
reduction depends on shapes alone, so a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import pointwise, quant, vmath
from inferloom.targets.tvm.emit import LANES, STORAGE, bind, kernel, scratch, splat, store, typed, vectors, wide
from inferloom.targets.tvm.kvwrite import write_kv
from inferloom.targets.tvm.rowvalue import (
    RowValue,
    broadcast_load,
    common_lanes,
    fill,
    flat,
    in_scratch,
    last,
    loop,
    materialize,
    memory,
    reduce,
)

Expr = Any
ROWS_PER_CHUNK = 4
#: Ops that read an operand more than once.
_REREADS = frozenset({"rms_norm", "layer_norm", "sum", "mean", "max", "rotary", "kv_write", "topk", "take",
                       "quantize_rows"})


def row_dim(types: Sequence[object]) -> int:
    """Which run-time count a kernel's rows are: 0 tokens, 2 logit rows."""
    for type in types:
        if isinstance(type, TensorType) and type.shape and not isinstance(type.shape[0], int):
            return {"tokens": 0, "rows": 2}[str(type.shape[0])]
    raise UnsupportedError("a kernel needs a value with rows")


def lower(source: KernelSource) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "row" kernel, its grid, and its arguments as operand-then-result numbers."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    program = RowProgram(body, source)
    fn = kernel(source.symbol, program.signature, program.emit)
    return fn, Grid(program.dim, ROWS_PER_CHUNK, 1), tuple(a for a, _ in program.signature)


def storage(value: Value) -> str:
    """TIR element type that a value has in memory."""
    return STORAGE[str(getattr(value.type, "dtype"))]


def computed(value: Value) -> str:
    """TIR element type that a value has while it is computed with: bf16 is widened."""
    return "int32" if _is(value, DType.I32) or _is(value, DType.I8) else "float32"


def _is(value: Value, dtype: DType) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype is dtype


class RowProgram:
    def __init__(self, body: Graph, source: KernelSource) -> None:
        self.body, self.layouts = body, source.layouts
        self.users = body.users()
        self.signature: list[tuple[int | str, str]] = [(i, storage(v)) for i, v in enumerate(body.inputs)]
        self.stored = [(i, v) for i, v in enumerate(body.outputs) if not isinstance(v.type, StateType)]
        self.signature += [(len(body.inputs) + i, storage(v)) for i, v in self.stored]
        # A kernel may only write state; a gather's rows are those of its result.
        self.dim = row_dim([v.type for v in (*body.outputs, *body.inputs)])
        self.env: dict[Value, RowValue] = {}
        self.views: dict[Value, Expr] = {}
        self.state: dict[Value, tuple[Expr, int]] = {}
        self.producers = body.producers()

    def _bind_inputs(self, views: list[Expr]) -> None:
        for i, value in enumerate(self.body.inputs):
            if isinstance(value.type, StateType):
                self.state[value] = views[i], self.layouts[i].block_stride // value.type.dtype.itemsize
                continue
            self.views[value] = views[i]
            self.env[value] = memory(views[i], self._shape(value), self._ld(value, self.layouts[i].ld), value.type.dtype)

    def emit(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        count = len(self.body.inputs)
        self._bind_inputs(views)
        begin = bind(chunk * ROWS_PER_CHUNK)
        with T.serial(0, T.min(T.int32(ROWS_PER_CHUNK), dims[self.dim] - begin)) as r:
            row = bind(begin + r)
            for node in self.body.nodes:
                self._node(node, row)
            for (i, value), view in zip(self.stored, views[count:], strict=True):
                self._store(value, view, self.layouts[count + i].ld, row)

    def _shape(self, value: Value) -> tuple[int, ...]:
        """The shape within a row."""
        shape = value.type.shape if isinstance(value.type, TensorType) else ()
        dims = shape[1:] if shape and not isinstance(shape[0], int) else shape
        return tuple(int(str(d)) for d in dims)

    def _ld(self, value: Value, ld: int) -> int:
        """Step inputs are dense, with one element a row."""
        has_rows = isinstance(value.type, TensorType) and value.type.shape and not isinstance(value.type.shape[0], int)
        return (ld or 1) if has_rows else 0

    def _axis(self, node: Node, axis: int) -> int:
        value = node.operands[0]
        shape = value.type.shape if value is not None and isinstance(value.type, TensorType) else ()
        moved = axis - (1 if shape and not isinstance(shape[0], int) else 0)
        if moved < 0:
            raise UnsupportedError(f"{node.loc}: {node.op} over the token axis")
        return moved

    def _node(self, node: Node, row: Expr) -> None:
        handler = getattr(self, f"_{node.op}", None)
        if ops.get(node.op).pointwise:
            value = self._pointwise(node)
        elif handler is not None:
            value = handler(node, row)
        else:
            raise UnsupportedError(f"{node.loc}: the CPU target cannot lower {node.op} in a row kernel yet")
        if value is None:
            return
        result = node.result
        users = self.users.get(result, [])
        reads = len(users) + (result in self.body.outputs)
        # TVM has no arrays of booleans: comparisons are repeated instead.
        if not value.cheap and not _is(result, DType.BOOL) and (
                reads > 1 or any(u.op in _REREADS for u in users)):
            value = self._materialize(value, row, computed(result))
        self.env[result] = value

    def _materialize(self, value: RowValue, row: Expr, kind: str) -> RowValue:
        return materialize(value, row, kind)

    def _of(self, value: Value | None) -> RowValue:
        if value is None:
            raise TypeError("operand is required")
        return self.env[value]

    # -- pointwise and data movement

    def _pointwise(self, node: Node) -> RowValue:
        to = self._shape(node.result)
        if node.op == "constant":
            return RowValue((), 1, lambda row, index, lanes: pointwise.constant(node, lanes))
        if not pointwise.supported(node.op):
            raise UnsupportedError(f"{node.loc}: the CPU target cannot lower {node.op} yet")
        operands = [self._of(v) for v in node.operands]

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            return pointwise.emit(node, [broadcast_load(x, row, index, to, lanes) for x in operands], lanes)

        return RowValue(to, common_lanes(to, operands), load, cheap=False)

    def _reshape(self, node: Node, row: Expr) -> RowValue:
        x, shape = self._of(node.operands[0]), self._shape(node.result)

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            return x.load(row, _unflatten(flat(index, shape), x.shape), lanes)

        return RowValue(shape, min(x.max_lanes, vectors(last(shape))), load, x.cheap)

    def _slice(self, node: Node, row: Expr) -> RowValue:
        x, axis = self._of(node.operands[0]), self._axis(node, int(str(node.attrs["axis"])))
        start, step = int(str(node.attrs["start"])), int(str(node.attrs["step"]))
        shape = self._shape(node.result)

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            moved = list(index)
            moved[axis] = moved[axis] * step + start
            return x.load(row, moved, lanes)

        lanes = min(x.max_lanes, vectors(last(shape)))
        if axis == len(shape) - 1:
            lanes = 1 if step > 1 else min(lanes, vectors(start))
        return RowValue(shape, lanes, load, x.cheap)

    def _permute(self, node: Node, row: Expr) -> RowValue:
        x, shape = self._of(node.operands[0]), self._shape(node.result)
        axes = [self._axis(node, a) for a in axes_of(node)[1:]]

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            moved = [index[axes.index(a)] for a in range(len(axes))]
            return x.load(row, moved, lanes)

        return RowValue(shape, x.max_lanes if axes[-1] == len(axes) - 1 else 1, load, x.cheap)

    def _expand(self, node: Node, row: Expr) -> RowValue:
        x, shape = self._of(node.operands[0]), self._shape(node.result)
        return RowValue(shape, common_lanes(shape, [x]),
                        lambda row, index, lanes: broadcast_load(x, row, index, shape, lanes), x.cheap)

    def _concat(self, node: Node, row: Expr) -> RowValue:
        shape, axis = self._shape(node.result), self._axis(node, int(str(node.attrs["axis"])))
        if _is(node.result, DType.BOOL):
            raise UnsupportedError(f"{node.loc}: the CPU target cannot join booleans")
        buffer = scratch(max(prod(shape), LANES), computed(node.result))
        start = 0
        for operand in node.operands:
            part = self._of(operand)
            offset = start * prod(shape[axis + 1:])
            fill(buffer, part, row, shape, offset, min(part.max_lanes, vectors(offset)))
            start += part.shape[axis]
        return in_scratch(buffer, shape)

    def _interleave(self, node: Node, row: Expr) -> RowValue:
        raise UnsupportedError(f"{node.loc}: interleave is for weights only")

    # -- reductions and norms

    def _reduced(self, node: Node, row: Expr, start: float, combine: Any, mean: bool) -> RowValue:
        x = self._of(node.operands[0])
        axes = sorted(self._axis(node, a) for a in axes_of(node))
        if axes == [0] and len(x.shape) > 1 and not mean and not bool(node.attrs["keepdims"]):
            return self._reduced_first(x, self._shape(node.result), start, combine)
        if axes != list(range(len(x.shape) - len(axes), len(x.shape))):
            raise UnsupportedError(f"{node.loc}: the CPU target reduces trailing axes only, not {axes}")
        count = prod(x.shape[axes[0]:])
        made = reduce(x, row, len(axes), start, combine, lambda s: s * T.float32(1 / count) if mean else s)
        shape = self._shape(node.result)
        return RowValue(shape, 1, lambda row, index, lanes: made.load(row, list(index[:axes[0]]), 1))

    def _reduced_first(self, x: RowValue, shape: tuple[int, ...], start: float, combine: Any) -> RowValue:
        """Over the first axis of the row, element by element."""
        def load(row: Expr, index: Any, lanes: int) -> Expr:
            total = x.load(row, [T.int32(0), *index], lanes)
            for i in range(1, x.shape[0]):
                total = bind(combine(total, x.load(row, [T.int32(i), *index], lanes)))
            return total

        return RowValue(shape, x.max_lanes, load, cheap=False)

    def _sum(self, node: Node, row: Expr) -> RowValue:
        return self._reduced(node, row, 0.0, lambda a, b: a + b, False)

    def _mean(self, node: Node, row: Expr) -> RowValue:
        return self._reduced(node, row, 0.0, lambda a, b: a + b, True)

    def _max(self, node: Node, row: Expr) -> RowValue:
        return self._reduced(node, row, float("-inf"), T.max, False)

    def _scaled(self, x: RowValue, node: Node, normal: Any) -> RowValue:
        """x normalised by `normal(row, index, lanes)` and the node's weight and bias."""
        weight, bias = ([self.env[v] if v is not None else None for v in node.operands[1:]] + [None, None])[:2]
        extras = [v for v in (weight, bias) if v is not None]

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            y = normal(row, index, lanes)
            if weight is not None:
                y = y * broadcast_load(weight, row, index, x.shape, lanes)
            if bias is not None:
                y = y + broadcast_load(bias, row, index, x.shape, lanes)
            return bind(y)

        return RowValue(x.shape, common_lanes(x.shape, [x, *extras]), load, cheap=False)

    def _rms_norm(self, node: Node, row: Expr) -> RowValue:
        x, eps = self._of(node.operands[0]), float(str(node.attrs["eps"]))
        size = last(x.shape)
        scale = reduce(x, row, 1, 0.0, lambda a, b: a + b, lambda s: _rsqrt(s * T.float32(1 / size), eps),
                       lambda v, index, lanes: v * v)
        return self._scaled(x, node, lambda row, index, lanes:
                            x.load(row, index, lanes) * splat(scale.load(row, list(index[:-1]), 1), lanes))

    def _layer_norm(self, node: Node, row: Expr) -> RowValue:
        x, eps = self._of(node.operands[0]), float(str(node.attrs["eps"]))
        size = last(x.shape)
        mean = reduce(x, row, 1, 0.0, lambda a, b: a + b, lambda s: s * T.float32(1 / size))

        def centred(v: Expr, index: Any, lanes: int) -> Expr:
            return bind(v - splat(mean.load(row, list(index), 1), lanes))

        def squared(v: Expr, index: Any, lanes: int) -> Expr:
            d = centred(v, index, lanes)
            return d * d

        scale = reduce(x, row, 1, 0.0, lambda a, b: a + b, lambda s: _rsqrt(s * T.float32(1 / size), eps), squared)
        return self._scaled(x, node, lambda row, index, lanes: centred(x.load(row, index, lanes), index[:-1], lanes)
                            * splat(scale.load(row, list(index[:-1]), 1), lanes))

    def _rotary(self, node: Node, row: Expr) -> RowValue:
        x, cos, sin = (self._of(v) for v in node.operands)
        half, (heads, dim) = last(cos.shape), x.shape
        buffer = scratch(heads * dim)
        interleaved = bool(node.attrs["interleaved"])
        lanes = 1 if interleaved else min(x.max_lanes, vectors(half), cos.max_lanes, sin.max_lanes)

        def pair(index: list[Expr]) -> None:
            h, j = index
            first, second = (j * 2, j * 2 + 1) if interleaved else (j, j + half)
            a, b = bind(x.load(row, [h, first], lanes)), bind(x.load(row, [h, second], lanes))
            c, s = bind(cos.load(row, [j], lanes)), bind(sin.load(row, [j], lanes))
            store(buffer, a * c - b * s, h * dim + first, lanes)
            store(buffer, b * c + a * s, h * dim + second, lanes)

        loop((heads, half), lanes, pair)
        if 2 * half < dim:
            rest = min(x.max_lanes, vectors(dim, 2 * half))
            loop((heads, dim - 2 * half), rest, lambda index: store(
                buffer, x.load(row, [index[0], index[1] + 2 * half], rest), index[0] * dim + index[1] + 2 * half, rest))
        return in_scratch(buffer, x.shape)

    # -- reading and writing by index

    def _take(self, node: Node, row: Expr) -> RowValue:
        x, places = self._of(node.operands[0]), self._of(node.operands[1])
        return RowValue(places.shape, 1, lambda row, index, lanes: x.load(
            row, [*index[:-1], places.load(row, index, 1)], 1))

    def _topk(self, node: Node, row: Expr) -> None:
        x = self._of(node.operands[0])
        *groups, size = x.shape
        k = int(str(node.attrs["k"]))
        left, at, best = scratch(max(size, LANES)), scratch(1, "int32"), scratch(1)
        shape = (*groups, k)
        values, places = scratch(max(prod(shape), LANES)), scratch(max(prod(shape), LANES), "int32")

        def group(index: list[Expr]) -> None:
            with T.serial(0, size) as i:
                T.buffer_store(left, x.load(row, [*index, i], 1), [i])
            with T.serial(0, k) as j:
                T.buffer_store(best, T.float32(float("-inf")), [0])
                T.buffer_store(at, T.int32(0), [0])
                with T.serial(0, size) as i:
                    with T.If(left[i] > best[0]):
                        with T.Then():
                            T.buffer_store(best, left[i], [0])
                            T.buffer_store(at, i, [0])
                place = flat([*index, j], shape)
                T.buffer_store(values, best[0], [place])
                T.buffer_store(places, at[0], [place])
                T.buffer_store(left, T.float32(float("-inf")), [at[0]])

        loop(tuple(groups), 1, group)
        self.env |= {node.results[0]: in_scratch(values, shape), node.results[1]: in_scratch(places, shape)}

    def _embedding(self, node: Node, row: Expr) -> RowValue:
        ids, table = self._of(node.operands[0]), self._of(node.operands[1])
        token = bind(ids.load(row, [], 1))
        return RowValue(self._shape(node.result), table.max_lanes,
                        lambda row, index, lanes: table.load(row, [wide(token), *index], lanes))

    def _packed_embedding(self, node: Node, row: Expr) -> RowValue:
        ids, packed = self._of(node.operands[0]), self._of(node.operands[1])
        token = bind(ids.load(row, [], 1))
        _, _, tile, pair = packed.shape

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            (k,) = index
            return packed.load(row, [wide(token // tile), k // pair, token % tile, k % pair], 1)

        return materialize(RowValue(self._shape(node.result), 1, load), row)

    def _quantized_embedding(self, node: Node, row: Expr) -> RowValue:
        ids, values, *scales = (self._of(v) for v in node.operands if v is not None)
        token = bind(ids.load(row, [], 1))
        return quant.looked_up(node, token, scales, lambda k, lanes: values.load(row, [wide(token), k], lanes),
                               values.max_lanes)

    def _packed_quantized_embedding(self, node: Node, row: Expr) -> RowValue:
        ids, packed, *scales = (self._of(v) for v in node.operands if v is not None)
        token = bind(ids.load(row, [], 1))
        return materialize(quant.looked_up_packed(node, row, token, packed, scales), row)

    def _quantize_rows(self, node: Node, row: Expr) -> None:
        made = quant.rounded(self._of(node.operands[0]), row, int(str(node.attrs["group"])))
        self.env.update(zip(node.results, made, strict=True))

    def _gather_rows(self, node: Node, row: Expr) -> RowValue:
        x, rows = self._of(node.operands[0]), self._of(node.operands[1])
        if node.operands[0] not in self.views:
            raise UnsupportedError(f"{node.loc}: gather_rows of a value computed in the same kernel")
        wanted = bind(rows.load(row, [], 1))
        return RowValue(x.shape, x.max_lanes, lambda row, index, lanes: x.load(wanted, index, lanes))

    def _kv_write(self, node: Node, row: Expr) -> None:
        state, k, v, slots = node.operands
        if state is None or k is None or not isinstance(state.type, StateType):
            raise TypeError(state)
        slot = bind(self._of(slots).load(row, [], 1))
        write_kv(*self.state[state], state.type, slot, self._of(k), None if v is None else self._of(v), row, node.loc)

    # -- results

    def _store(self, value: Value, view: Expr, ld: int, row: Expr) -> None:
        maker = self.producers.get(value)
        narrow = _is(value, DType.BF16)
        source = self.env[value]
        if narrow and maker is not None and maker.op == "cast" and maker.operands[0] in self.env:
            source = self.env[maker.operands[0]]  # type: ignore[index]
        lanes = source.max_lanes

        def put(index: list[Expr]) -> None:
            x = source.load(row, index, lanes)
            if _is(value, DType.I8):
                x = T.cast(x, typed("int8", lanes))
            store(view, vmath.f32_to_bf16(x, lanes) if narrow else x, flat(index, source.shape) + row * ld, lanes)

        loop(source.shape, lanes, put)


def axes_of(node: Node) -> list[int]:
    axes = node.attrs["axes"]
    if not isinstance(axes, tuple):
        raise TypeError(axes)
    return [int(str(a)) for a in axes]


def _rsqrt(mean: Expr, eps: float) -> Expr:
    return vmath.rsqrt(mean + T.float32(eps), 1)


def _unflatten(offset: Expr, shape: Sequence[int]) -> list[Expr]:
    index: list[Expr] = []
    for axis in range(len(shape) - 1, -1, -1):
        if shape[axis] == 1:
            index.append(T.int32(0))
        elif axis == 0 or prod(shape[:axis]) == 1:
            index.append(offset)
            offset = T.int32(0)
        else:
            index.append(offset % shape[axis])
            offset = offset // shape[axis]
    return index[::-1]


