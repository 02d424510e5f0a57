"""Values within one token's row: where their elements come from, and how they are read.

A row value has the static shape behind the token axis. `load(row, index, lanes)` reads `lanes` consecutive
elements of the last axis as a vector (float32, int32 or bool); `lanes` never exceeds what `max_lanes` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.types import DType
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, lane_of, scratch, splat, store, typed, vectors

Expr = Any
Index = Sequence[Expr]


@dataclass(frozen=True, slots=True)
class RowValue:
    """`cheap` values are plain reads: reading them twice costs no computation."""

    shape: tuple[int, ...]
    max_lanes: int
    load: Callable[[Expr, Index, int], Expr]
    cheap: bool = True


def last(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 1


def flat(index: Index, shape: Sequence[int]) -> Expr:
    """Row-major position of `index`."""
    offset: Expr = T.int32(0)
    for i, size in zip(index, shape, strict=True):
        offset = offset * size + i
    return offset


def widen(raw: Expr, dtype: DType, lanes: int) -> Expr:
    """Stored elements as they are computed with."""
    if dtype in (DType.I8, DType.U8):
        return T.cast(raw, typed("int32", lanes))
    if dtype is DType.F16:
        return vmath.f16_to_f32(raw, lanes)
    return vmath.bf16_to_f32(raw, lanes) if dtype is DType.BF16 else raw


def memory(buffer: Expr, shape: tuple[int, ...], ld: int, dtype: DType) -> RowValue:
    """Rows of `ld` elements in memory; ld 0 for a constant that all rows share."""

    def load(row: Expr, index: Index, lanes: int) -> Expr:
        base = flat(index, shape) + (row * ld if ld else 0)
        return widen(buffer[lane_of(base, lanes)], dtype, lanes)

    return RowValue(shape, vectors(last(shape)), load)


def in_scratch(buffer: Expr, shape: tuple[int, ...]) -> RowValue:
    return RowValue(shape, vectors(last(shape)), lambda row, index, lanes: buffer[lane_of(flat(index, shape), lanes)])


def loop(shape: Sequence[int], lanes: int, body: Callable[[list[Expr]], None]) -> None:
    """Run `body(index)` for every vector of `lanes` elements of `shape`."""
    with ExitStack() as stack:
        index: list[Expr] = []
        for axis, size in enumerate(shape):
            step = lanes if axis == len(shape) - 1 else 1
            if size == step:
                index.append(T.int32(0))
            else:
                i = stack.enter_context(T.serial(0, size // step))
                index.append(i * step if step > 1 else i)
        body(index)


def materialize(value: RowValue, row: Expr, kind: str = "float32") -> RowValue:
    """Compute a value of TIR element type `kind` once, into scratch."""
    buffer = scratch(max(prod(value.shape), LANES), kind)
    fill(buffer, value, row, value.shape, 0, value.max_lanes)
    return in_scratch(buffer, value.shape)


def fill(buffer: Expr, value: RowValue, row: Expr, strides_of: Sequence[int], offset: Expr, lanes: int) -> None:
    """Copy `value` into `buffer`, laid out as part of an array of shape `strides_of` starting at `offset`."""
    loop(value.shape, lanes,
         lambda index: store(buffer, value.load(row, index, lanes), flat(index, strides_of) + offset, lanes))


def align(index: Index, shape: tuple[int, ...], to: tuple[int, ...]) -> list[Expr]:
    """The index into an operand of `shape` that broadcasts to `to`."""
    taken = list(index[len(to) - len(shape):]) if len(shape) <= len(to) else [T.int32(0)] * len(shape)
    if len(shape) > len(to):
        taken[len(shape) - len(to):] = list(index)
    return [T.int32(0) if size == 1 else i for i, size in zip(taken, shape, strict=True)]


def broadcast_load(value: RowValue, row: Expr, index: Index, to: tuple[int, ...], lanes: int) -> Expr:
    """Read an operand where the result of shape `to` has `index`."""
    own = align(index, value.shape, to)
    if last(value.shape) == 1 and lanes > 1:
        return splat(value.load(row, own, 1), lanes)
    return value.load(row, own, lanes)


def common_lanes(to: tuple[int, ...], operands: Sequence[RowValue]) -> int:
    """Lanes for a pointwise result: what the widest-reading operand allows."""
    lanes = vectors(last(to))
    for value in operands:
        if last(value.shape) != 1:
            lanes = min(lanes, value.max_lanes)
    return lanes


def tree(parts: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine pairwise, in an order that depends only on their number."""
    parts = list(parts)
    while len(parts) > 1:
        parts = [combine(parts[i], parts[i + 1]) if i + 1 < len(parts) else parts[i]
                 for i in range(0, len(parts), 2)]
    return parts[0]


def reduce(value: RowValue, row: Expr, axes: int, start: float,
           combine: Callable[[Expr, Expr], Expr], finish: Callable[[Expr], Expr],
           each: Callable[[Expr, list[Expr], int], Expr] | None = None) -> RowValue:
    """Reduce the last `axes` axes; each element passes through `each(x, index, lanes)` first.

    Result: the leading axes, kept as they are, in scratch.
    """
    outer, inner = value.shape[:len(value.shape) - axes], value.shape[len(value.shape) - axes:]
    lanes = value.max_lanes
    result = scratch(max(prod(outer), 1))
    partial = scratch(max(lanes, 1))

    def one(index: list[Expr]) -> None:
        store(partial, splat(T.float32(start), lanes), T.int32(0), lanes)

        def step(rest: list[Expr]) -> None:
            x = value.load(row, [*index, *rest], lanes)
            if each is not None:
                x = each(x, index, lanes)
            store(partial, combine(partial[lane_of(T.int32(0), lanes)], x), T.int32(0), lanes)

        loop(inner, lanes, step)
        total = tree([partial[i] for i in range(lanes)], combine)
        store(result, finish(total), flat(index, outer), 1)

    loop(outer, 1, one)
    return in_scratch(result, outer)
