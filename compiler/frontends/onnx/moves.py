"""ONNX operators that move data: views, slices, joins, rows of tables. Most of them cost no node (see `layout`)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from inferloom.compiler.frontends.layout import Traced
from inferloom.compiler.frontends.onnx.file import Op
from inferloom.compiler.frontends.onnx.fold import axes_of, split_sizes
from inferloom.compiler.frontends.onnx.importer import (
    KEYS,
    PAST,
    TOKENS,
    Cache,
    Importer,
    Scores,
    broadcast,
    lowers,
    show,
)
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import Shape


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise UnsupportedError(f"axis {axis} is outside of {rank} axes")
    return axis % rank


@lowers("Transpose")
def transpose(im: Importer, op: Op) -> Traced:
    x = im.operand(op, 0)
    rank = len(x.shape)
    order = [axis_of(a, rank) for a in op.attrs.get("perm", range(rank - 1, -1, -1))]
    return x.renumber(tuple(x.shape[a] for a in order), {old: new for new, old in enumerate(order)})


def view(im: Importer, op: Op, shape: Shape) -> Any:
    """The operand seen with another shape of as many elements."""
    found = im.raw(op, 0)
    if isinstance(found, Scores):
        if [d for d in found.shape if d != 1] != [d for d in shape if d != 1] or shape[-2:] != found.shape[-2:]:
            raise UnsupportedError(f"reshapes attention scores {show(found.shape)} to {show(shape)}")
        return replace(found, shape=shape)
    return im.layouts.view(im.operand(op, 0), shape)


def _shape_of(im: Importer, op: Op) -> Shape:
    found = im.raw(op, 0)
    return found.shape if isinstance(found, (Scores, Traced)) else im.operand(op, 0).shape


@lowers("Reshape")
def reshape(im: Importer, op: Op) -> Any:
    old = _shape_of(im, op)
    wanted: list[Any] = im.dims(op, 1)
    if not op.attrs.get("allowzero", 0):
        wanted = [old[i] if d == 0 else d for i, d in enumerate(wanted)]
    if wanted.count(-1) > 1:
        raise UnsupportedError(f"reshape to {show(wanted)}")
    if -1 in wanted:
        rest: list[Any] = [d for d in old if not isinstance(d, int)]
        for d in wanted:
            if not isinstance(d, int):
                if d not in rest:
                    raise UnsupportedError(f"reshape {show(old)} -> {show(wanted)} mixes the token axis with others")
                rest.remove(d)
        size = math.prod(d for d in old if isinstance(d, int))
        size //= math.prod(d for d in wanted if isinstance(d, int) and d != -1) or 1
        if rest and size != 1:
            raise UnsupportedError(f"reshape {show(old)} -> {show(wanted)} mixes the token axis with others")
        wanted[wanted.index(-1)] = rest[0] if rest else size
    return view(im, op, tuple(wanted))


@lowers("Flatten")
def flatten(im: Importer, op: Op) -> Any:
    old = _shape_of(im, op)
    axis = op.attrs.get("axis", 1)
    sides = []
    for dims in (old[:axis], old[axis:]):
        symbolic = [d for d in dims if not isinstance(d, int)]
        size = math.prod(d for d in dims if isinstance(d, int))
        if len(symbolic) > 1 or (symbolic and size != 1):
            raise UnsupportedError(f"flatten of {show(old)} mixes the token axis with others")
        sides.append(symbolic[0] if symbolic else size)
    return view(im, op, tuple(sides))


@lowers("Squeeze", "Unsqueeze")
def squeeze(im: Importer, op: Op) -> Any:
    old = _shape_of(im, op)
    axes = axes_of(op, [im.array(op, 1)] if im.given(op, 1) else [])
    if op.type == "Squeeze":
        gone = [i for i, d in enumerate(old) if d == 1] if axes is None else [axis_of(a, len(old)) for a in axes]
        if any(old[a] != 1 for a in gone):
            raise UnsupportedError(f"squeezes axes {gone} of {show(old)}")
        return view(im, op, tuple(d for i, d in enumerate(old) if i not in gone))
    made = [axis_of(a, len(old) + len(axes or ())) for a in axes or ()]
    shape = list(old)
    for axis in sorted(set(made)):
        shape.insert(axis, 1)
    if len(set(made)) != len(made):
        raise UnsupportedError(f"adds the axes {made} to {show(old)}")
    return view(im, op, tuple(shape))


@lowers("Expand", "Tile")
def expand(im: Importer, op: Op) -> Any:
    x = im.operand(op, 0)
    wanted: Shape = tuple(im.dims(op, 1))
    if op.type == "Tile":
        if any(n != 1 and d != 1 for n, d in zip(wanted, x.shape)):
            raise UnsupportedError(f"tiles {show(x.shape)} by {show(wanted)}; only axes of size one may be repeated")
        wanted = tuple(d if n == 1 else n for n, d in zip(wanted, x.shape))
    return expand_to(im, x, broadcast(x.shape, wanted))


def expand_to(im: Importer, x: Traced, shape: Shape) -> Traced:
    """`x` broadcast to a shape."""
    shift = len(shape) - len(x.shape)
    old = (1,) * shift + x.shape
    x = Traced(x.value, old, tuple(a + shift for a in x.axes))
    grown = [a for a in range(len(shape)) if old[a] != shape[a]]
    if not grown:
        return x
    if any(not isinstance(shape[a], int) for a in grown):
        raise UnsupportedError(f"expands {show(old)} over the tokens to {show(shape)}")
    x = im.layouts.with_axes(x, grown)
    axes = sorted(x.axes, key=lambda a: (isinstance(shape[a], int), x.axes.index(a)))
    value = im.layouts.arrange(x, axes)
    return Traced(im.emit("expand", value, shape=tuple(shape[a] for a in axes)), shape, tuple(axes))


def cut(im: Importer, x: Traced, axis: int, start: int, stop: int, step: int = 1) -> Traced:
    """`x[start:stop:step]` along one static axis."""
    size = x.shape[axis]
    if (start, stop, step) == (0, size, 1):
        return x
    x = im.layouts.with_axes(x, [axis])
    made = im.emit("slice", x.value, axis=x.axes.index(axis), start=start, stop=stop, step=step)
    shape = tuple(-(-(stop - start) // step) if i == axis else d for i, d in enumerate(x.shape))
    return Traced(made, shape, x.axes)


@lowers("Slice")
def slice_(im: Importer, op: Op) -> Traced:
    x = im.operand(op, 0)
    starts = im.structure.everywhere(im.name(op, 1))
    ends = im.structure.everywhere(im.name(op, 2))
    axes = im.array(op, 3).tolist() if im.given(op, 3) else range(len(starts[0]))
    steps = im.array(op, 4).tolist() if im.given(op, 4) else [1] * len(starts[0])
    for i, (axis, step) in enumerate(zip(axes, steps)):
        axis = axis_of(axis, len(x.shape))
        size = x.shape[axis]
        sizes = [im.structure.concrete((size,), at)[0] for at in im.structure.samples]
        cuts = [slice(int(s[i]), int(e[i]), step).indices(n) for s, e, n in zip(starts, ends, sizes)]
        if all(c == (0, n, 1) for c, n in zip(cuts, sizes)):
            continue
        if not isinstance(size, int):
            raise UnsupportedError("picks some of the tokens; export logits of all of them")
        if len(set(cuts)) == 1 and step > 0:
            x = cut(im, x, axis, *cuts[0])
        elif x.token_axis is None and axis == 0 and step == 1 and len(x.shape) == 2 and all(
                (s[i], e[i]) == (at.past, at.keys) for s, e, at in zip(starts, ends, im.structure.samples)):
            x = rows_of(im, x, Traced(im.positions, (TOKENS,), (0,)), im.name(op, 0))
        else:
            raise UnsupportedError(f"slices axis {axis} of {show(x.shape)} by bounds that depend on the number of tokens")
    return x


@lowers("Split")
def split(im: Importer, op: Op) -> tuple[Traced, ...]:
    x = im.operand(op, 0)
    axis = axis_of(op.attrs.get("axis", 0), len(x.shape))
    size = x.shape[axis]
    if not isinstance(size, int):
        raise UnsupportedError("splits the token axis")
    made, start = [], 0
    for part in split_sizes(op, size, im.array(op, 1) if im.given(op, 1) else None):
        made.append(cut(im, x, axis, start, start + part))
        start += part
    return tuple(made)


@lowers("Concat")
def concat(im: Importer, op: Op) -> Any:
    found = [im.raw(op, i) for i in range(len(op.inputs))]
    if isinstance(found[0], Cache):
        return _joined_cache(im, op)
    parts = im.alike([im.operand(op, i) for i in range(len(op.inputs))])
    axis = axis_of(op.attrs["axis"], len(parts[0].shape))
    if any(not isinstance(p.shape[axis], int) for p in parts):
        raise UnsupportedError("joins tokens")
    if len(parts) == 1:
        return parts[0]
    total = sum(int(str(p.shape[axis])) for p in parts)
    shape = tuple(total if i == axis else d for i, d in enumerate(parts[0].shape))
    present = {a for p in parts for a in p.axes if shape[a] != 1} | {axis}
    base = im.layouts.with_axes(parts[0], sorted(present))
    axes = [a for a in base.axes if a in present]
    return Traced(im.emit("concat", *(im.layouts.arrange(p, axes) for p in parts), axis=axes.index(axis)), shape, tuple(axes))


def _joined_cache(im: Importer, op: Op) -> Traced:
    """`Concat(past, new)`: the new keys or values, which the paged state will hold with the past ones."""
    cache = im.structure.shapes[im.name(op, 0)]
    axis = axis_of(op.attrs["axis"], len(cache))
    if len(op.inputs) != 2 or cache[axis] is not PAST:
        raise UnsupportedError(f"joins the cache {op.inputs[0]!r} along axis {axis} of {show(cache)}")
    return cached(im, im.operand(op, 1), axis)


def cached(im: Importer, x: Traced, axis: int) -> Traced:
    """New keys or values seen as all of their sequence."""
    if x.shape[axis] is not TOKENS:
        raise UnsupportedError(f"joins a cache with {show(x.shape)}")
    return Traced(x.value, tuple(KEYS if i == axis else d for i, d in enumerate(x.shape)), x.axes)


@lowers("Gather")
def gather(im: Importer, op: Op) -> Traced:
    """Rows of a table by tokens or positions, or some places along a static axis."""
    table, name = im.operand(op, 0), im.name(op, 1)
    axis = axis_of(op.attrs.get("axis", 0), len(table.shape))
    if table.token_axis is None and axis == 0 and len(table.shape) == 2 and (
            name in im.structure.content or im.need(name).token_axis is not None):
        return rows_of(im, table, im.operand(op, 1), im.name(op, 0), name)
    return pick(im, table, axis, im.array(op, 1))


@lowers("GatherND")
def gather_nd(im: Importer, op: Op) -> Traced:
    table, name = im.operand(op, 0), im.name(op, 1)
    if op.attrs.get("batch_dims", 0):
        raise UnsupportedError("with batch_dims")
    if table.token_axis is None and len(table.shape) == 2 and name in im.structure.dynamic:
        index = im.operand(op, 1)
        if index.shape[-1] == 1:
            return rows_of(im, table, im.layouts.view(index, index.shape[:-1]), op.inputs[0], name)
    places = im.array(op, 1)
    if places.shape[-1:] != (1,):
        raise UnsupportedError("places along several axes at once")
    return pick(im, im.operand(op, 0), 0, places[..., 0])


@lowers("GatherElements")
def gather_elements(im: Importer, op: Op) -> Traced:
    """Rows of a known table [1, n, width] where the places [1, tokens, width] repeat each position."""
    table, axis = im.operand(op, 0), op.attrs.get("axis", 0)
    arrays = im.structure.everywhere(im.name(op, 1))
    width = int(str(table.shape[-1]))
    if table.token_axis is not None or len(table.shape) != 3 or table.shape[0] != 1 or axis != 1 or any(
            not np.array_equal(a, np.broadcast_to(s.positions[None, :, None], (1, s.tokens, width)))
            for a, s in zip(arrays, im.structure.samples)):
        raise UnsupportedError("other than of one row of a table for each position")
    rows = im.layouts.view(table, table.shape[1:])
    return rows_of(im, rows, Traced(im.positions, (1, TOKENS), (1,)), op.inputs[0])


def pick(im: Importer, x: Traced, axis: int, array: np.ndarray) -> Traced:
    """Known places along a static axis, evenly spaced; without axes of its own, `array` removes the axis."""
    size = x.shape[axis]
    if not isinstance(size, int):
        raise UnsupportedError("picks some of the tokens; export logits of all of them")
    places = [int(p) + (size if p < 0 else 0) for p in array.reshape(-1)]
    step = places[1] - places[0] if len(places) > 1 else 1
    if array.ndim > 1 or step < 1 or places != list(range(places[0], places[-1] + 1, step)):
        raise UnsupportedError(f"picks the places {places[:12]} of axis {axis}; only evenly spaced ones are supported")
    made = cut(im, x, axis, places[0], places[-1] + 1, step)
    return made if array.ndim else im.layouts.view(made, tuple(d for i, d in enumerate(made.shape) if i != axis))


def rows_of(im: Importer, table: Traced, index: Traced, table_name: str, index_name: str = "") -> Traced:
    """`table[index]` for an index that is the tokens or positions; the table must be long enough for all of them."""
    rows = int(str(table.shape[0]))
    if index.value is im.builder.inputs[0]:
        im.token_rows[table_name] = rows
    else:
        offset = 0
        if index_name and index.value is not im.positions:
            if index_name in im.structure.content:
                raise UnsupportedError(f"picks rows of {table_name!r} by {index_name!r}, which is neither tokens nor positions")
            offsets = {int(o) for a, s in zip(im.structure.everywhere(index_name), im.structure.samples)
                       for o in np.unique(a.reshape(-1) - s.positions)}
            if len(offsets) != 1 or min(offsets) < 0:
                raise UnsupportedError(f"picks rows of {table_name!r} by {index_name!r}, which is not a position")
            offset = offsets.pop()
        im.position_rows[table_name] = min(rows - offset, im.position_rows.get(table_name, rows))
    value = im.emit("embedding", index.value, im.layouts.arrange(table, (0, 1)))
    return Traced(value, (*index.shape, table.shape[1]), (*index.axes, len(index.shape)))
