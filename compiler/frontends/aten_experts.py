"""ATen operators of routers, and the layers of experts (hooks.py)."""

from __future__ import annotations

from typing import Any

import torch

from inferloom.compiler.frontends.aten import Importer, Known, Traced, lowers
from inferloom.compiler.frontends.aten_moves import axis_of, everywhere
from inferloom.compiler.frontends.aten_parts import Filled
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType


@lowers("aten.softmax.int", "aten._softmax.default")
def softmax(im: Importer, x: Any, axis: int, *args: Any, **kwargs: Any) -> Traced:
    x = im.traced(x)
    axis = axis_of(x, axis)
    if not isinstance(x.shape[axis], int):
        raise UnsupportedError("softmax over the tokens, outside of attention")
    x = im.layouts.last(im.cast(x, DType.F32), axis)
    last = (len(x.axes) - 1,)
    powers = im.emit("exp", im.emit("sub", x.value, im.emit("max", x.value, axes=last, keepdims=True)))
    total = im.emit("sum", powers, axes=last, keepdims=True)
    return Traced(im.emit("div", powers, total), x.shape, x.axes)


@lowers("aten.topk.default")
def topk(im: Importer, x: Any, k: int, axis: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Traced, Traced]:
    x = im.traced(x)
    axis = axis_of(x, axis)
    if not largest or not isinstance(x.shape[axis], int):
        raise UnsupportedError("topk of the smallest, or over the tokens")
    x = im.layouts.last(im.cast(x, DType.F32), axis)
    made = im.builder.emit_node("topk", (x.value,), {"k": k}, im.loc).results
    values, places = (Traced(v, im.shape(im.result(i)), x.axes) for i, v in enumerate(made))
    return values, places


@lowers("aten.gather.default")
def gather(im: Importer, x: Any, axis: int, places: Any) -> Traced:
    """Elements of the last axis, or rows of a known table [1, n, width] where all of a row's places are one index."""
    if isinstance(x, Known) and isinstance(places, Traced) and (x.tensor == x.tensor.reshape(-1)[0]).all():
        return everywhere(im, x.tensor.reshape(-1)[0].item(), places)
    x, places = im.traced(x), im.traced(places)
    axis = axis_of(x, axis)
    if axis == len(x.shape) - 1 and x.shape[:-1] == places.shape[:-1] and x.token_axis is not None:
        axes = [a for a in x.axes if a != axis and x.shape[a] != 1] + [axis]
        made = im.emit("take", im.layouts.arrange(x, axes), im.layouts.arrange(places, axes))
        return Traced(made, im.result_shape, tuple(axes))
    return _rows(im, x, axis)


def _rows(im: Importer, table: Traced, axis: int) -> Traced:
    repeated = im.node.args[2] if im.node is not None else None
    if isinstance(repeated, torch.fx.Node) and str(repeated.target) in ("aten.repeat.default", "aten.expand.default"):
        ids = im.env[repeated.args[0]]
        if len(table.shape) == 3 and table.shape[0] == 1 and axis == 1 and ids.shape[-1] == 1:
            rows = im.emit("embedding", ids.value, im.layouts.arrange(table, (1, 2)))
            return Traced(rows, im.result_shape, (1, 2))
    raise UnsupportedError("gather other than of a row's own elements, or of one row per token")


@lowers("aten.max.dim")
def max_dim(im: Importer, x: Any, axis: int, keepdim: bool = False) -> tuple[Traced, ...]:
    return tuple(im.layouts.view(part, im.shape(im.result(i))) for i, part in enumerate(topk(im, x, 1, axis)))


@lowers("aten.scatter.value", "aten.scatter.src")
def scatter(im: Importer, base: Any, axis: int, places: Any, source: Any, **kwargs: Any) -> Traced:
    """A number, or one for each place, at places of the last axis: no place may be named twice."""
    places, shape = im.traced(places), im.result_shape
    axis %= len(shape)
    tensor = isinstance(source, (Traced, Known))
    into_zeros = isinstance(base, Filled) and base.number == 0
    if kwargs or axis != len(shape) - 1 or not (into_zeros or isinstance(base, Traced) and not tensor):
        raise UnsupportedError("scatter other than into the last axis of zeros, or of one number")
    axes = [a for a in range(axis) if shape[a] != 1]
    rows = [shape[a] for a in axes]
    size, count = int(str(shape[axis])), int(str(places.shape[axis]))
    chosen = im.layouts.reshape(im.layouts.arrange(places, [*axes, axis]), (*rows, 1, count))
    columns = im.layouts.reshape(im.traced(Known(torch.arange(size, dtype=torch.int32), "columns")).value, (size, 1))
    hit = im.emit("cast", im.emit("eq", columns, chosen), dtype=DType.F32)
    if tensor:
        value = im.layouts.arrange(im.cast(im.traced(source), DType.F32), [*axes, axis])
        hit = im.emit("mul", hit, im.layouts.reshape(value, (*rows, 1, count)))
    made = im.emit("sum", hit, axes=(len(rows) + 1,), keepdims=False)
    if not into_zeros:
        kept = im.layouts.arrange(base, [*axes, axis])
        made = im.emit("where", im.emit("lt", im.number(0.0), made), im.number(float(source)), kept)
    elif not tensor and source != 1:
        made = im.emit("mul", made, im.number(float(source)))
    return Traced(made, shape, (*axes, axis))


@lowers("aten.masked_fill.Scalar")
def masked_fill(im: Importer, x: Any, mask: Any, value: float) -> Traced:
    (x_, mask_), axes = im.layouts.broadcast([im.traced(x), im.traced(mask)], im.result_shape)
    return Traced(im.emit("where", mask_, im.number(float(value)), x_), im.result_shape, axes)


@lowers("aten.logical_not.default", "aten.bitwise_not.default")
def logical_not(im: Importer, x: Any) -> Traced:
    x = im.traced(x)
    if x.type.dtype is not DType.BOOL:
        raise UnsupportedError(f"not of {x.type}")
    return Traced(im.emit("eq", im.emit("cast", x.value, dtype=DType.F32), im.number(0.0)), x.shape, x.axes)


@lowers("inferloom.expert_linear.default")
def expert_linear(im: Importer, x: Any, weight: Any, choice: Any, bias: Any, transposed: bool) -> Traced:
    rows = im.layouts.arrange(im.traced(x), (0, 1, 2))
    weight_ = im.layouts.arrange(im.traced(weight), (0, 1, 2))
    picked = im.layouts.arrange(im.cast(im.traced(choice), DType.I32), (0, 1))
    made = im.emit("expert_linear", rows, weight_, picked, None if bias is None else im.layouts.arrange(im.traced(bias), (0, 1)),
                   transposed=transposed)
    return Traced(made, im.result_shape, (0, 1, 2))
