"""ATen operators that compute: layers and arithmetic. One function an operator, registered in `aten.LOWERINGS`."""

from __future__ import annotations

from typing import Any

import torch

from inferloom.compiler.frontends.aten import Importer, Known, Traced, lowers
from inferloom.compiler.frontends.aten_moves import axis_of
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType

# Layers.


@lowers("aten.linear.default")
def linear(im: Importer, x: Any, weight: Any, bias: Any = None) -> Traced:
    return _linear(im, im.traced(x), im.layouts.ordered(im.traced(weight)).value, bias)


def _linear(im: Importer, x: Traced, weight: Any, bias: Any) -> Traced:
    x = im.layouts.last(x, len(x.shape) - 1)
    made = im.emit("linear", x.value, weight, None if bias is None else im.traced(bias).value)
    return Traced(made, im.result_shape, (*x.axes[:-1], len(im.result_shape) - 1))


@lowers("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def matmul(im: Importer, x: Any, y: Any) -> Traced:
    x, y = im.traced(x), im.traced(y)
    shape = im.result_shape
    if x.shape[-1] == 1 and len(x.shape) == len(y.shape):
        return im.elementwise("mul", x, y)
    if y.token_axis is None and all(d == 1 for d in y.shape[:-2]):
        rank = len(y.shape)
        weight = im.layouts.arrange(y, (rank - 1, rank - 2))
        return _linear(im, x, weight, None)
    if x.token_axis is None and all(d == 1 for d in x.shape[:-2]) and y.token_axis == len(y.shape) - 1:
        rank = len(x.shape)
        y = im.layouts.last(y, len(y.shape) - 2)
        made = im.emit("linear", y.value, im.layouts.arrange(x, (rank - 2, rank - 1)), None)
        shift = len(shape) - len(y.shape)
        return Traced(made, shape, tuple(a + shift for a in y.axes))
    if x.token_axis is None and y.token_axis == len(y.shape) - 1 and len(x.shape) == len(y.shape) == len(shape):
        heads = [a for a in range(len(shape) - 2) if shape[a] != 1]
        if len(heads) == 1 and x.shape[heads[0]] == y.shape[heads[0]]:
            h, n, t = heads[0], len(shape) - 2, len(shape) - 1
            return Traced(_by_head(im, im.layouts.arrange(y, (t, h, n)), im.layouts.arrange(x, (h, n, t)), False, None), shape,
                          (t, h, n))
    raise UnsupportedError(f"product of {x.type} and {y.type}, both of which depend on tokens, outside of attention "
                           f"(result {shape})")


@lowers("aten.baddbmm.default")
def baddbmm(im: Importer, bias: Any, x: Any, weight: Any, beta: float = 1, alpha: float = 1) -> Traced:
    bias, x, weight = im.traced(bias), im.traced(x), im.traced(weight)
    if beta != 1 or alpha != 1 or x.token_axis != 1 or weight.token_axis is not None or bias.token_axis is not None:
        raise UnsupportedError("baddbmm other than of tokens by a weight for each head")
    made = _by_head(im, im.layouts.arrange(x, (1, 0, 2)), im.layouts.arrange(weight, (0, 1, 2)), True,
                    im.layouts.arrange(bias, (0, 2)))
    return Traced(made, im.result_shape, (1, 0, 2))


def _by_head(im: Importer, rows: Any, weight: Any, transposed: bool, bias: Any) -> Any:
    """rows [tokens, heads, k] by a weight [heads, n, k] of their own for each head: experts that every token chooses."""
    heads = int(str(weight.type.shape[0]))
    columns = im.traced(Known(torch.arange(heads, dtype=torch.int32), "heads")).value
    positions = im.builder.inputs[1]
    none = im.emit("mul", positions, im.number(0, DType.I32))
    choice = im.emit("add", im.layouts.reshape(none, (positions.type.shape[0], 1)), columns)  # type: ignore[union-attr]
    return im.emit("expert_linear", rows, weight, choice, bias, transposed=transposed)


@lowers("aten.addmm.default")
def addmm(im: Importer, bias: Any, x: Any, weight: Any, beta: float = 1, alpha: float = 1) -> Traced:
    weight = im.traced(weight)
    if beta != 1 or alpha != 1 or weight.token_axis is not None:
        raise UnsupportedError("addmm with beta, alpha or a weight that depends on tokens")
    return _linear(im, im.traced(x), im.layouts.arrange(weight, (1, 0)), bias)


@lowers("aten.layer_norm.default", "aten.native_layer_norm.default")
def layer_norm(im: Importer, x: Any, normalized: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
               *args: Any) -> Any:
    if len(normalized) != 1:
        raise UnsupportedError(f"layer norm over {len(normalized)} axes")
    x = im.traced(x)
    x = im.layouts.last(x, len(x.shape) - 1)
    scales = [None if s is None else im.traced(s).value for s in (weight, bias)]
    made = Traced(im.emit("layer_norm", x.value, *scales, eps=float(eps)), x.shape, x.axes)
    return (made, None, None) if "native" in str(im.node.target) else made  # type: ignore[union-attr]


@lowers("aten.rms_norm.default")
def rms_norm(im: Importer, x: Any, normalized: Any, weight: Any = None, eps: float | None = None) -> Traced:
    if len(normalized) != 1:
        raise UnsupportedError(f"RMS norm over {len(normalized)} axes")
    x = im.traced(x)
    x = im.layouts.last(x, len(x.shape) - 1)
    scale = None if weight is None else im.traced(weight).value
    eps = float(torch.finfo(torch.float32).eps) if eps is None else float(eps)
    return Traced(im.emit("rms_norm", x.value, scale, eps=eps), x.shape, x.axes)


@lowers("inferloom.attention.default")
def attention(im: Importer, q: Any, k: Any, v: Any, scale: float, window: int, chunk: int, softcap: float,
              sinks: Any, alibi: Any) -> Traced:
    values = [im.layouts.arrange(im.traced(t), (0, 1, 2)) for t in (q, k, v)]
    tables = [None if t is None else im.layouts.arrange(im.traced(t), (0,)) for t in (sinks, alibi)]
    made = im.emit("attention", *values, *tables, scale=float(scale), slot=im.slots, window=window,
                   softcap=float(softcap), chunk=chunk)
    im.slots += 1
    return Traced(made, im.result_shape, (0, 1, 2))


# Arithmetic.


def _same_as(im: Importer, x: Any) -> bool:
    return isinstance(x, Traced) and x.type.dtype.is_float and x.shape == im.result_shape


@lowers("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar")
def add(im: Importer, x: Any, y: Any, alpha: float = 1) -> Traced:
    name = str(im.node.target)  # type: ignore[union-attr]
    if alpha != 1:
        raise UnsupportedError(f"alpha={alpha}")
    if isinstance(y, (int, float)) and y == 0 and "rsub" not in name and _same_as(im, x):
        return x
    if "rsub" in name:
        return im.elementwise("sub", y, x)
    return im.elementwise("sub" if "sub" in name else "add", x, y)


@lowers("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")
def mul(im: Importer, x: Any, y: Any) -> Traced:
    if isinstance(y, (int, float)) and y == 1 and _same_as(im, x):
        return x
    if "div" not in str(im.node.target):  # type: ignore[union-attr]
        return im.elementwise("mul", x, y)
    if isinstance(x, Traced) and not x.type.dtype.is_float:  # a quotient of integers is a float
        x = im.cast(x, DType.F32)
    return im.elementwise("div", x, y)


@lowers("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def pow_(im: Importer, x: Any, y: Any) -> Traced:
    if y == 2 and isinstance(x, Traced):
        return im.elementwise("mul", x, x)
    if y == 3 and isinstance(x, Traced):
        square = im.elementwise("mul", x, x)
        return im.elementwise("mul", square, x)
    if y == 0.5 and isinstance(x, Traced):
        return im.elementwise("sqrt", x)
    return im.elementwise("pow", x, y)


@lowers("aten.square.default")
def square(im: Importer, x: Any) -> Traced:
    return im.elementwise("mul", x, x)


@lowers("aten.gt.Tensor", "aten.gt.Scalar", "aten.ge.Tensor", "aten.ge.Scalar")
def greater(im: Importer, x: Any, y: Any) -> Traced:
    return im.elementwise("lt" if ".gt." in str(im.node.target) else "le", y, x)  # type: ignore[union-attr]


@lowers("aten.log1p.default")
def log1p(im: Importer, x: Any) -> Traced:
    """`log(1 + x)`; near zero it loses relative, not absolute, precision."""
    return im.elementwise("log", im.elementwise("add", x, 1.0))


@lowers("aten.expm1.default")
def expm1(im: Importer, x: Any) -> Traced:
    """`exp(x) - 1`; near zero it loses relative, not absolute, precision."""
    return im.elementwise("sub", im.elementwise("exp", x), 1.0)


@lowers("aten.softplus.default")
def softplus(im: Importer, x: Any, beta: float = 1, threshold: float = 20) -> Traced:
    """`log(1 + exp(beta x)) / beta`, as `relu(z) + log(1 + exp(-|z|))` of z = beta x, which cannot overflow."""
    z = x if beta == 1 else im.elementwise("mul", x, beta)
    tail = im.elementwise("exp", im.elementwise("neg", im.elementwise("abs", z)))
    total = im.elementwise("add", im.elementwise("relu", z), im.elementwise("log", im.elementwise("add", tail, 1.0)))
    return total if beta == 1 else im.elementwise("div", total, beta)


@lowers("aten.clamp.default", "aten.clamp.Tensor", "aten.clamp_min.default", "aten.clamp_max.default")
def clamp(im: Importer, x: Any, low: Any = None, high: Any = None, **kwargs: Any) -> Traced:
    if "max" in str(im.node.target):  # type: ignore[union-attr]
        low, high = None, low
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    x = im.traced(x)
    x = x if low is None else im.elementwise("maximum", x, low)
    return x if high is None else im.elementwise("minimum", x, high)


@lowers("aten.gelu.default")
def gelu(im: Importer, x: Any, approximate: str = "none") -> Traced:
    return im.elementwise("gelu", x, approximate=approximate)


@lowers("aten.where.self")
def where(im: Importer, condition: Any, x: Any, y: Any) -> Traced:
    parts = [im.traced(t) for t in (condition, x, y)]
    values, axes = im.layouts.broadcast(parts, im.result_shape)
    return Traced(im.emit("where", *values), im.result_shape, axes)


@lowers("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default")
def reduce(im: Importer, x: Any, dims: Any, keepdim: bool = False, **kwargs: Any) -> Traced:
    op = {"mean": "mean", "sum": "sum", "amax": "max"}[str(im.node.target).split(".")[1]]  # type: ignore[union-attr]
    x = im.traced(x)
    gone = [axis_of(x, d) for d in dims]
    if any(not isinstance(x.shape[a], int) for a in gone):
        raise UnsupportedError("reduction over the tokens")
    x = im.layouts.with_axes(x, gone)
    value = im.emit(op, x.value, axes=tuple(sorted(x.axes.index(a) for a in gone)), keepdims=keepdim)
    if keepdim:
        return Traced(value, im.result_shape, x.axes)
    left = [a for a in range(len(x.shape)) if a not in gone]
    return Traced(value, im.result_shape, tuple(left.index(a) for a in x.axes if a not in gone))


def _pointwise(aten: str, op: str) -> None:
    @lowers(*(f"aten.{aten}.{overload}" for overload in ("default", "Tensor", "Scalar", "other")))
    def lower(im: Importer, *args: Any) -> Traced:
        if len(args) == 1 and op in ("maximum", "minimum"):
            raise UnsupportedError(f"{op} over a whole tensor")
        return im.elementwise(op, *args)


_SAME_NAME = ("neg", "abs", "exp", "log", "floor", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf", "relu", "sigmoid", "silu",
              "maximum", "minimum", "lt", "le", "eq")
for _aten, _op in {**dict.fromkeys(_SAME_NAME, ""), "max": "maximum", "min": "minimum"}.items():
    _pointwise(_aten, _op or _aten)
