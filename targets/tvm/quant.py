"""Quantised values in row programs: rounding a row, and looking up rows of quantised tables."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.graph import Node
from inferloom.ir.types import DType, TensorType
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, f32, lane_of, scratch, splat, store, typed, vectors, wide
from inferloom.targets.tvm.rowvalue import RowValue, in_scratch, loop, reduce

Expr = Any


def rounded(x: RowValue, row: Expr, group: int) -> tuple[RowValue, RowValue, RowValue]:
    """Values, scale and sums of `quantize_rows`, in scratch."""
    (k,) = x.shape
    most = reduce(x, row, 1, 0.0, T.max, lambda s: s, lambda v, index, lanes: vmath.absolute(v, lanes))
    largest = bind(most.load(row, [], 1))
    factor = bind(T.Select(largest > T.float32(0), T.float32(127) / largest, T.float32(0)))
    scale, values = scratch(1), scratch(max(k, LANES), "int32")
    T.buffer_store(scale, largest / T.float32(127), [0])
    width = group or k
    lanes = min(x.max_lanes, vectors(width))
    sums, partial = scratch(k // width, "int32"), scratch(lanes, "int32")
    with T.serial(0, k // width) as g:
        store(partial, splat(T.int32(0), lanes), T.int32(0), lanes)

        def step(index: list[Expr]) -> None:
            at = g * width + index[0]
            scaled = x.load(row, [at], lanes) * splat(factor, lanes)
            value = bind(T.cast(T.call_llvm_pure_intrin(f32(lanes), "llvm.rint", scaled), typed("int32", lanes)))
            store(values, value, at, lanes)
            store(partial, partial[lane_of(T.int32(0), lanes)] + value, T.int32(0), lanes)

        loop((width,), lanes, step)
        whole = partial[lane_of(T.int32(0), lanes)]
        T.buffer_store(sums, whole if lanes == 1 else T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", whole), [g])
    return in_scratch(values, (k,)), in_scratch(scale, (1,)), in_scratch(sums, (k // width,))


def looked_up(node: Node, token: Expr, scales: list[RowValue], value: Callable[[Expr, int], Expr], lanes: int) -> RowValue:
    """A row of `quantized_embedding`: `value(k, lanes)` are integers of the token's row."""
    k, group, fp8 = _columns(node), int(str(node.attrs["group"])), node.attrs["format"] == "fp8"

    def load(row: Expr, index: Any, lanes: int) -> Expr:
        at = index[0]
        made = vmath.from_8_bits(value(at, lanes), DType.F8 if fp8 else DType.I8, lanes)
        parts = [splat(s.load(row, [wide(token), at // group if group else T.int32(0)], 1), lanes) for s in scales]
        return bind(made * parts[0] + parts[1] if len(parts) > 1 else made * parts[0])

    return RowValue((k,), min(lanes, vectors(group or k)), load, cheap=False)


def looked_up_packed(node: Node, row: Expr, token: Expr, packed: RowValue, scales: list[RowValue]) -> RowValue:
    """A row of `packed_quantized_embedding`, element by element."""
    _, _, tile, _ = packed.shape
    group, format = int(str(node.attrs["group"])), node.attrs["format"]
    nibbles = format == "int4"

    def scale_of(scale: RowValue, at: Expr) -> Expr:
        if group:
            return scale.load(row, [wide(token // tile), at // group, token % tile], 1)
        return scale.load(row, [wide(token), T.int32(0)], 1)

    def load(row: Expr, index: Any, lanes: int) -> Expr:
        at, many = index[0], 8 if nibbles else 4
        byte = packed.load(row, [wide(token // tile), at // many, token % tile, at % 4], 1)
        if nibbles:
            byte = T.bitwise_and(T.shift_right(byte, at % 8 // 4 * 4), T.int32(15))
        if format == "fp8":
            made = vmath.from_8_bits(T.cast(byte, "int8"), DType.F8, 1)
        else:
            made = T.cast(byte - T.int32(8 if nibbles else 128), "float32")
        parts = [bind(scale_of(s, at)) for s in scales]
        return made * parts[0] + parts[1] if len(parts) > 1 else made * parts[0]

    return RowValue((_columns(node),), 1, load, cheap=False)


def _columns(node: Node) -> int:
    type = node.result.type
    if not isinstance(type, TensorType):
        raise TypeError(node)
    return prod(int(str(d)) for d in type.shape[1:])
