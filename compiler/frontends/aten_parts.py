"""Tensors that are not values of their own: filled with one number, written part by part, complex."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inferloom.compiler.frontends.aten import Importer, Special, Traced, lowers
from inferloom.compiler.frontends.aten_moves import (
    END,
    axis_of,
    embedding,
    everywhere,
    expand,
    join,
    select,
    slice_,
    view,
)
from inferloom.compiler.frontends.aten_ops import mul
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import Shape, TensorType


@dataclass(frozen=True, slots=True)
class Filled(Special):
    """A tensor full of one number (None: whatever was in memory), for ops that write into it."""

    number: float | None
    shape: Shape


@dataclass(frozen=True, slots=True)
class Written(Special):
    """A tensor of which `parts` along `axis` are written, by where they begin."""

    shape: Shape
    axis: int
    parts: tuple[tuple[int, Traced], ...]


@dataclass(frozen=True, slots=True)
class Complex(Special):
    """A complex tensor."""

    real: Traced
    imag: Traced


@lowers("aten.zeros.default", "aten.ones.default", "aten.zeros_like.default", "aten.empty_like.default",
        "aten.new_zeros.default", "aten.ones_like.default", "aten.new_empty.default")
def filled(im: Importer, *args: Any, **kwargs: Any) -> Filled:
    name = str(im.node.target)  # type: ignore[union-attr]
    return Filled(0.0 if "zeros" in name else 1.0 if "ones" in name else None, im.result_shape)


@lowers("aten.slice.Tensor")
def slice_any(im: Importer, x: Any, *args: Any, **kwargs: Any) -> Any:
    return Filled(None, im.result_shape) if isinstance(x, (Filled, Written)) else slice_(im, x, *args, **kwargs)


@lowers("aten.expand.default")
def expand_any(im: Importer, x: Any, *args: Any, **kwargs: Any) -> Any:
    return Filled(x.number, im.result_shape) if isinstance(x, Filled) else expand(im, x)


@lowers("aten.embedding.default")
def embedding_any(im: Importer, table: Any, ids: Any, *args: Any, **kwargs: Any) -> Traced:
    """Where all ids are one number, such as a token type that nobody gives."""
    if isinstance(ids, Filled) and ids.number is not None:
        position = im.builder.inputs[1]
        shape = tuple(d for d in ids.shape if d != 1)
        if not isinstance(position.type, TensorType) or shape != position.type.shape:
            raise UnsupportedError(f"an embedding of {ids.shape} equal numbers")
        axis = next(i for i, d in enumerate(ids.shape) if not isinstance(d, int))
        ids = everywhere(im, ids.number, Traced(position, ids.shape, (axis,)))
    return embedding(im, table, ids)


@lowers("aten.copy.default")
def copy(im: Importer, base: Any, x: Any, *args: Any) -> Traced:
    x = im.traced(x)
    return x if x.shape == im.result_shape else expand(im, x)


@lowers("aten.slice_scatter.default")
def slice_scatter(im: Importer, base: Any, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Writes a part; once all of the tensor is written, it is the parts side by side."""
    x, start = im.traced(x), start or 0
    axis = axis_of(x, axis)
    if isinstance(base, Filled):
        base = Written(base.shape, axis, ())
    if not isinstance(base, Written) or base.axis != axis or step != 1 or start < 0 or not isinstance(base.shape[axis], int):
        raise UnsupportedError("writing into part of a tensor, other than one part after the other of a new one")
    size = min(END if end is None else int(end), int(str(base.shape[axis]))) - start
    if size != x.shape[axis]:
        raise UnsupportedError(f"writing {x.shape[axis]} columns over {size}")
    parts = tuple(sorted((*((s, p) for s, p in base.parts if s != start), (start, x)), key=lambda part: part[0]))
    at = 0
    for begin, part in parts:
        if begin != at:
            return Written(base.shape, axis, parts)
        at += int(str(part.shape[axis]))
    return join(im, [p for _, p in parts], axis) if at == base.shape[axis] else Written(base.shape, axis, parts)


# Complex numbers, as rotary embeddings use them.


@lowers("aten.polar.default")
def polar(im: Importer, size: Any, angle: Any) -> Complex:
    if not isinstance(size, Filled) or size.number != 1:
        raise UnsupportedError("complex numbers other than of size one")
    return Complex(im.elementwise("cos", angle), im.elementwise("sin", angle))


@lowers("aten.view_as_complex.default")
def view_as_complex(im: Importer, x: Any) -> Complex:
    x = im.traced(x)
    last = len(x.shape) - 1
    return Complex(select(im, x, last, 0), select(im, x, last, 1))


@lowers("aten.view_as_real.default")
def view_as_real(im: Importer, x: Complex) -> Traced:
    last = len(im.result_shape) - 1
    parts = [p.renumber((*p.shape, 1), {a: a for a in range(len(p.shape))}) for p in (x.real, x.imag)]
    return join(im, parts, last)


@lowers("aten.mul.Tensor")
def mul_any(im: Importer, x: Any, y: Any) -> Any:
    if not isinstance(x, Complex):
        return mul(im, x, y)
    if not isinstance(y, Complex):
        return Complex(im.elementwise("mul", x.real, y), im.elementwise("mul", x.imag, y))

    def product(a: Traced, b: Traced) -> Traced:
        return im.elementwise("mul", a, b)

    return Complex(im.elementwise("sub", product(x.real, y.real), product(x.imag, y.imag)),
                   im.elementwise("add", product(x.real, y.imag), product(x.imag, y.real)))


@lowers("aten.unsqueeze.default", "aten.squeeze.dim", "aten.view.default")
def view_any(im: Importer, x: Any, *args: Any) -> Any:
    return Complex(view(im, x.real), view(im, x.imag)) if isinstance(x, Complex) else view(im, x)
