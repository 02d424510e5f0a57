"""ATen operators that move data: views, slices, joins, row selection. Most of them cost no node (see `layout`)."""

from __future__ import annotations

from typing import Any

from inferloom.compiler.frontends.aten import DTYPES, Importer, Traced, lowers
from inferloom.compiler.frontends.layout import Merged
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType, TensorType

END = 2**62


def axis_of(x: Traced, axis: int) -> int:
    """An axis counted from the front."""
    if axis >= 0 and any(isinstance(d, Merged) for d in x.shape):
        raise UnsupportedError("an axis counted from the front, of a tensor that has tokens and heads in one")
    return axis + len(x.shape) if axis < 0 else axis


# Nothing to compute: the value stays, only how it is seen changes.


@lowers("aten.alias.default", "aten.clone.default", "aten.contiguous.default", "aten.detach.default",
        "aten.lift_fresh_copy.default", "aten.dropout.default", "aten.detach_.default")
def same(im: Importer, x: Any, *args: Any, **kwargs: Any) -> Traced:
    return im.traced(x)


@lowers("aten._to_copy.default", "aten.to.dtype", "aten.type_as.default")
def to_copy(im: Importer, x: Any, *args: Any, **kwargs: Any) -> Traced:
    """Casts; float types are all f32 here, since models are traced in float32."""
    wanted = im.result().dtype
    if wanted not in DTYPES:
        raise UnsupportedError(f"cast to {wanted}")
    return im.cast(im.traced(x), DTYPES[wanted])


@lowers("aten.transpose.int", "aten.permute.default", "aten.t.default", "aten.numpy_T.default")
def permute(im: Importer, x: Any, *args: Any) -> Traced:
    x = im.traced(x)
    rank = len(x.shape)
    order = list(range(rank))
    if len(args) == 1:
        order = [axis_of(x, a) for a in args[0]]
    elif len(args) == 2:
        i, j = axis_of(x, args[0]), axis_of(x, args[1])
        order[i], order[j] = j, i
    else:
        order.reverse()
    return x.renumber(im.result_shape, {old: new for new, old in enumerate(order)})


@lowers("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.flatten.using_ints",
        "aten.unflatten.int", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default",
        "aten.unsqueeze.default")
def view(im: Importer, x: Any, *args: Any) -> Traced:
    return im.layouts.view(im.traced(x), im.result_shape)


@lowers("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(im: Importer, x: Any, *args: Any, **kwargs: Any) -> Traced:
    x = im.traced(x)
    shape = im.result_shape
    shift = len(shape) - len(x.shape)
    old = (1,) * shift + x.shape
    x = Traced(x.value, old, tuple(a + shift for a in x.axes))
    grown = [a for a in range(len(shape)) if old[a] != shape[a]]
    if not grown:
        return x
    x = im.layouts.with_axes(x, grown)
    axes = sorted(x.axes, key=lambda a: (isinstance(shape[a], int), x.axes.index(a)))
    value = im.layouts.arrange(x, axes)
    return Traced(im.emit("expand", value, shape=tuple(shape[a] for a in axes)), shape, tuple(axes))


# Moving data.


@lowers("aten.slice.Tensor")
def slice_(im: Importer, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Traced:
    x = im.traced(x)
    axis = axis_of(x, dim)
    size = x.shape[axis]
    shape = im.result_shape
    if shape[axis] == size:
        return x
    if not isinstance(size, int):
        raise UnsupportedError("slice along the token axis")
    if shape[axis] == 0:
        return Traced(x.value, shape, x.axes)  # only `cat` may read it, which leaves it out
    start, end = start or 0, END if end is None else end
    start = max(start + size, 0) if start < 0 else start
    end = end + size if end < 0 else min(end, size)
    x = im.layouts.with_axes(x, [axis])
    made = im.emit("slice", x.value, axis=x.axes.index(axis), start=start, stop=end, step=step)
    return Traced(made, shape, x.axes)


@lowers("aten.select.int")
def select(im: Importer, x: Any, dim: int, index: int) -> Traced:
    x = im.traced(x)
    return _pick(im, x, axis_of(x, dim), index)


def _pick(im: Importer, x: Traced, axis: int, index: int) -> Traced:
    """One element along an axis, which disappears."""
    size = x.shape[axis]
    if not isinstance(size, int):
        raise UnsupportedError("selecting one token")
    rest = tuple(d for i, d in enumerate(x.shape) if i != axis)
    if size > 1:
        index += size if index < 0 else 0
        made = im.emit("slice", x.value, axis=x.axes.index(axis), start=index, stop=index + 1)
        x = Traced(made, tuple(1 if i == axis else d for i, d in enumerate(x.shape)), x.axes)
    return im.layouts.view(x, rest)


@lowers("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int")
def split(im: Importer, x: Any, sizes: Any = 0, dim: int = 0) -> tuple[Traced, ...]:
    x = im.traced(x)
    unbind = str(im.node.target) == "aten.unbind.int"  # type: ignore[union-attr]
    axis = axis_of(x, sizes if unbind else dim)
    if not isinstance(x.shape[axis], int):
        raise UnsupportedError("splitting the token axis")
    if unbind:
        return tuple(_pick(im, x, axis, i) for i in range(int(str(x.shape[axis]))))
    x = im.layouts.with_axes(x, [axis])
    made, start = [], 0
    for part in im.result():
        shape = im.shape(part)
        size = int(str(shape[axis]))
        value = x.value if size == x.shape[axis] else im.emit(
            "slice", x.value, axis=x.axes.index(axis), start=start, stop=start + size)
        made.append(Traced(value, shape, x.axes))
        start += size
    return tuple(made)


@lowers("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(im: Importer, parts: Any, dim: int = 0) -> Traced:
    traced = [p for p in (im.traced(q) for q in parts) if 0 not in p.shape]
    axis = axis_of(traced[0], dim)
    shape = im.result_shape
    if not isinstance(shape[axis], int):
        raise UnsupportedError("concatenating tokens")
    if len(traced) == 1:
        return traced[0]
    return join(im, traced, axis)


def join(im: Importer, parts: list[Traced], axis: int) -> Traced:
    """Parts side by side along an axis of the current node's result."""
    shape = im.result_shape
    present = {a for p in parts for a in p.axes if shape[a] != 1} | {axis}
    base = im.layouts.with_axes(parts[0], sorted(present))
    axes = [a for a in base.axes if a in present]
    made = im.emit("concat", *(im.layouts.arrange(p, axes) for p in parts), axis=axes.index(axis))
    return Traced(made, shape, tuple(axes))


@lowers("aten.stack.default")
def stack(im: Importer, parts: Any, dim: int = 0) -> Traced:
    shape = im.result_shape
    axis = dim + len(shape) if dim < 0 else dim
    moved = []
    for part in parts:
        x = im.traced(part)
        wide = (*x.shape[:axis], 1, *x.shape[axis:])
        moved.append(x.renumber(wide, {a: a + (a >= axis) for a in range(len(x.shape))}))
    return join(im, moved, axis)


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(im: Importer, x: Any, repeats: int, dim: int | None = None, **kwargs: Any) -> Traced:
    x = im.traced(x)
    if dim is None:
        raise UnsupportedError("repeat_interleave without dim")
    axis = axis_of(x, dim)
    if not isinstance(x.shape[axis], int):
        raise UnsupportedError("repeating tokens")
    x = im.layouts.with_axes(x, [axis])
    wide = (*x.shape[:axis + 1], 1, *x.shape[axis + 1:])
    x = x.renumber(wide, {a: a + (a > axis) for a in range(len(wide))})
    place = x.axes.index(axis) + 1
    axes = (*x.axes[:place], axis + 1, *x.axes[place:])
    grown = (*wide[:axis + 1], repeats, *wide[axis + 2:])
    value = im.emit("expand", im.layouts.arrange(x, axes), shape=tuple(grown[a] for a in axes))
    return im.layouts.view(Traced(value, grown, axes), im.result_shape)


@lowers("aten.index.Tensor")
def index(im: Importer, x: Any, indices: Any) -> Traced:
    """`x[:, rows]` picks rows; `x[..., [i]]` with known indices slices."""
    x = im.traced(x)
    used = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(used) != 1:
        raise UnsupportedError("indexing along several axes at once")
    axis, chosen = used[0]
    if isinstance(chosen, Traced):
        if x.token_axis is None and axis == 0 and len(x.shape) == 2:
            return embedding(im, x, chosen)
        if x.axes[:1] != (axis,) or chosen.value is not im.builder.inputs[-1] or len(chosen.shape) != 1:
            raise UnsupportedError("indexing by computed values, other than picking rows of logits")
        return Traced(im.emit("gather_rows", x.value, chosen.value), im.result_shape, x.axes)
    places = [int(p) for p in chosen.tensor.reshape(-1)]
    step = places[1] - places[0] if len(places) > 1 else 1
    if not isinstance(x.shape[axis], int) or step < 1 or chosen.tensor.dim() != 1 or \
            places != list(range(places[0], places[-1] + 1, step)):
        raise UnsupportedError(f"indexing by {places}")
    size = int(str(x.shape[axis]))
    first = places[0] + (size if places[0] < 0 else 0)
    x = im.layouts.with_axes(x, [axis])
    if len(places) == size and step == 1:
        return x
    made = im.emit("slice", x.value, axis=x.axes.index(axis), start=first,
                   stop=first + step * (len(places) - 1) + 1, step=step)
    return Traced(made, im.result_shape, x.axes)


@lowers("aten.repeat.default")
def repeat(im: Importer, x: Any, repeats: Any) -> Traced:
    x = im.traced(x)
    shape = im.result_shape
    shift = len(shape) - len(x.shape)
    for axis, (times, size) in enumerate(zip(repeats[shift:], x.shape)):
        if times != 1 and size != 1:
            if not isinstance(size, int):
                raise UnsupportedError(f"repeat of {x.type} by {repeats}: repeating tokens")
            x = im.layouts.with_axes(x, [axis])
            value = im.emit("concat", *[x.value] * times, axis=x.axes.index(axis))
            x = Traced(value, (*x.shape[:axis], size * times, *x.shape[axis + 1:]), x.axes)
    return expand(im, x)


def everywhere(im: Importer, number: float, like: Traced) -> Traced:
    """One integer for each element of an integer tensor that depends on tokens."""
    none = im.emit("mul", like.value, im.number(0, DType.I32))
    return Traced(im.emit("add", none, im.number(number, DType.I32)), like.shape, like.axes)


@lowers("aten.arange.default", "aten.arange.start")
def arange(im: Importer, start: Any, end: Any = None, **kwargs: Any) -> Traced:
    """As many numbers as there are tokens: those are the positions."""
    (tokens,) = im.result_shape
    first = 0 if end is None else start
    position = im.builder.inputs[1]
    if not isinstance(first, int) or not isinstance(position.type, TensorType) or position.type.shape != (tokens,):
        raise UnsupportedError("a range of numbers that is neither known nor as long as the sequence")
    value = im.emit("add", position, im.number(first, DType.I32)) if first else position
    return Traced(value, im.result_shape, (0,))


@lowers("aten.embedding.default")
def embedding(im: Importer, table: Any, ids: Any, *args: Any, **kwargs: Any) -> Traced:
    table, ids = im.layouts.ordered(im.layouts.with_axes(im.traced(table), (0, 1))), im.traced(ids)
    axes = (*ids.axes, len(im.result_shape) - 1)
    return Traced(im.emit("embedding", ids.value, table.value), im.result_shape, axes)


@lowers("aten.index_select.default")
def index_select(im: Importer, table: Any, axis: int, ids: Any) -> Traced:
    """Rows of a known table or a parameter, by an index per token."""
    table = im.traced(table)
    if axis != 0 or len(table.shape) != 2 or table.token_axis is not None:
        raise UnsupportedError(f"index_select along axis {axis} of {table.type}")
    return embedding(im, table, ids)
