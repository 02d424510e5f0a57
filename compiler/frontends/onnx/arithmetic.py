"""ONNX operators that compute element by element, move data or reduce. One function an operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from inferloom.compiler.frontends.layout import Traced
from inferloom.compiler.frontends.onnx.file import ELEMENTS, Op
from inferloom.compiler.frontends.onnx.fold import axes_of
from inferloom.compiler.frontends.onnx.importer import (
    Cache,
    Importer,
    NoNaN,
    Scores,
    broadcast,
    lowers,
)
from inferloom.compiler.frontends.onnx.masks import HIDDEN, MaskRef
from inferloom.compiler.frontends.onnx.moves import axis_of
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType

# Attention scores on their way from one MatMul to the other.


def _scores(im: Importer, op: Op) -> tuple[Scores, int] | None:
    """The operand that is scores, and its place."""
    for place in range(len(op.inputs)):
        found = im.raw(op, place) if im.given(op, place) else None
        if isinstance(found, Scores):
            return found, place
    return None


def _changed(s: Scores, **changes: Any) -> Scores:
    if s.softmax:
        raise UnsupportedError("changes attention probabilities; only their product with the values is supported")
    return replace(s, **changes)


def _score_times(s: Scores, factor: float) -> Scores:
    if s.masks and (s.cap or factor <= 0):
        raise UnsupportedError("scales attention scores after a soft-cap and a mask, or by a number that is not positive")
    masks = tuple(replace(m, factor=m.factor * factor) if isinstance(m, MaskRef) else m for m in s.masks)
    return _changed(s, cap=s.cap * factor) if s.cap else _changed(s, scale=s.scale * factor, masks=masks)


def _score_mask(im: Importer, s: Scores, name: str, inverted: bool = False) -> Scores:
    if name in im.structure.content:
        raise UnsupportedError(f"the mask {name!r} depends on what the tokens are")
    return _changed(s, masks=(*s.masks, MaskRef(name, inverted)))


def _on_scores(im: Importer, op: Op, s: Scores, place: int) -> Scores:
    """Arithmetic on scores: scaling, soft-capping, masking."""
    number = im.number(op, 1 - place) if len(op.inputs) == 2 else None
    if op.key == "Mul" and number is not None:
        return _score_times(s, number)
    if op.key == "Div" and number and place == 0:
        return _score_times(s, 1 / number)
    if op.key == "Tanh" and not s.masks and not s.cap:
        return _changed(s, cap=1.0)
    if op.key == "Max" and number is not None and number <= HIDDEN:
        return s  # keeps masked scores finite
    if op.key == "Add" and number == 0:
        return s
    if op.key == "Add":
        return _score_mask(im, s, im.name(op, 1 - place))
    if op.key == "Where" and place in (1, 2):
        fill = im.number(op, 3 - place)
        if fill is not None and fill <= HIDDEN:
            return _score_mask(im, s, im.name(op, 0), inverted=place == 2)
    raise UnsupportedError("attention scores may be scaled, soft-capped by tanh and masked, but not this")


# Arithmetic.


def _binary(name: str, ir: str, swap: bool = False) -> None:
    @lowers(name)
    def lower(im: Importer, op: Op) -> Any:
        found = _scores(im, op)
        if found is not None:
            return _on_scores(im, op, *found)
        parts = [im.operand(op, i) for i in range(len(op.inputs))]
        if swap:
            parts.reverse()
        made = parts[0]
        for part in parts[1:]:
            made = _biased(im, made, part) if ir == "add" else None or im.elementwise(ir, made, part)
        return made


def _biased(im: Importer, x: Traced, y: Traced) -> Traced:
    """`x + y`; a bias on a linear becomes its own."""
    for a, b in ((x, y), (y, x)):
        node = next((n for n in reversed(im.builder.nodes[-8:]) if a.value in n.results), None)
        fits = b.token_axis is None and [d for d in b.shape if d != 1] == [a.shape[-1]] and b.shape[-1] == a.shape[-1]
        if node is not None and node.op == "linear" and node.operands[2] is None and fits and len(b.shape) <= len(a.shape) \
                and b.type.dtype is DType.F32:
            bias = im.layouts.arrange(b, (len(b.shape) - 1,))
            return Traced(im.emit("linear", *node.operands[:2], bias), a.shape, a.axes)
    return im.elementwise("add", x, y)


for _name, _ir in {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Max": "maximum", "Min": "minimum", "Sum": "add",
                   "Less": "lt", "LessOrEqual": "le", "Equal": "eq"}.items():
    _binary(_name, _ir)
_binary("Greater", "lt", swap=True)
_binary("GreaterOrEqual", "le", swap=True)


def _unary(name: str, ir: str) -> None:
    @lowers(name)
    def lower(im: Importer, op: Op) -> Any:
        found = _scores(im, op)
        return _on_scores(im, op, *found) if found is not None else im.elementwise(ir, im.operand(op, 0))


for _name, _ir in {"Neg": "neg", "Abs": "abs", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Tanh": "tanh", "Sin": "sin",
                   "Cos": "cos", "Erf": "erf", "Relu": "relu", "Sigmoid": "sigmoid"}.items():
    _unary(_name, _ir)


@lowers("Pow")
def pow_(im: Importer, op: Op) -> Traced:
    x, exponent = im.operand(op, 0), im.number(op, 1)
    if exponent in (2, 3):
        square = im.elementwise("mul", x, x)
        return square if exponent == 2 else im.elementwise("mul", square, x)
    return im.elementwise("sqrt", x) if exponent == 0.5 else im.elementwise("pow", x, im.operand(op, 1))


@lowers("Reciprocal")
def reciprocal(im: Importer, op: Op) -> Traced:
    x = im.operand(op, 0)
    node = next((n for n in reversed(im.builder.nodes[-4:]) if x.value in n.results), None)
    if node is not None and node.op == "sqrt" and node.operands[0] is not None:
        return Traced(im.emit("rsqrt", node.operands[0]), x.shape, x.axes)
    return im.elementwise("div", im.constant_like(1.0), x)


@lowers("Softplus")
def softplus(im: Importer, op: Op) -> Traced:
    """log(1 + exp(x)), written so that nothing overflows."""
    x = im.operand(op, 0)
    tail = im.elementwise("exp", im.elementwise("neg", im.elementwise("abs", x)))
    tail = im.elementwise("log", im.elementwise("add", tail, im.constant_like(1.0)))
    return im.elementwise("add", im.elementwise("relu", x), tail)


@lowers("Clip")
def clip(im: Importer, op: Op) -> Traced:
    x = im.operand(op, 0)
    x = im.elementwise("maximum", x, im.operand(op, 1)) if im.given(op, 1) else x
    return im.elementwise("minimum", x, im.operand(op, 2)) if im.given(op, 2) else x


@lowers("Gelu", "com.microsoft.Gelu", "com.microsoft.BiasGelu", "com.microsoft.FastGelu")
def gelu(im: Importer, op: Op) -> Traced:
    x = im.operand(op, 0)
    x = _biased(im, x, im.operand(op, 1)) if im.given(op, 1) else x
    kind = "tanh" if op.type == "FastGelu" else op.attrs.get("approximate", "none")
    return im.elementwise("gelu", x, approximate=kind)


@lowers("Swish", "com.microsoft.QuickGelu")
def swish(im: Importer, op: Op) -> Traced:
    """x * sigmoid(alpha * x)."""
    x = im.operand(op, 0)
    alpha = float(op.attrs.get("alpha", 1.0 if op.type == "Swish" else 1.702))
    inner = x if alpha == 1 else im.elementwise("mul", x, im.constant_like(alpha))
    return im.elementwise("mul", x, im.elementwise("sigmoid", inner))


@lowers("Where")
def where(im: Importer, op: Op) -> Any:
    found = _scores(im, op)
    if found is not None and isinstance(im.raw(op, 0), NoNaN) and found[1] == 2:
        return found[0]  # Where(IsNaN(p), 0, p)
    if found is not None:
        return _on_scores(im, op, *found)
    condition, x, y = (im.operand(op, i) for i in range(3))
    shape = broadcast(condition.shape, x.shape, y.shape)
    values, axes = im.layouts.broadcast([condition, *im.alike([x, y])], shape)
    return Traced(im.emit("where", *values), shape, axes)


@lowers("IsNaN")
def is_nan(im: Importer, op: Op) -> Any:
    found = im.raw(op, 0)
    if isinstance(found, Scores) and found.softmax:
        return NoNaN()
    raise UnsupportedError("of other than attention probabilities")


@lowers("Cast", "CastLike", "Identity", "Dropout")
def cast(im: Importer, op: Op) -> Any:
    """Casts; float types are all f32 here, since models are computed in float32 or as the artifact says."""
    found = im.raw(op, 0)
    if isinstance(found, (Scores, Cache)):
        return found
    x = im.operand(op, 0)
    if op.type == "Cast":
        if op.attrs["to"] not in ELEMENTS:
            raise UnsupportedError(f"cast to element type {op.attrs['to']}")
        kind = ELEMENTS[op.attrs["to"]].kind
        return im.cast(x, {"f": DType.F32, "V": DType.F32, "b": DType.BOOL}.get(kind, DType.I32))
    return im.cast(x, im.operand(op, 1).type.dtype) if op.type == "CastLike" else x


# Reductions.


def _reduction(name: str, ir: str) -> None:
    @lowers(name)
    def lower(im: Importer, op: Op) -> Traced:
        x = im.operand(op, 0)
        axes = axes_of(op, [im.array(op, 1)] if im.given(op, 1) else [])
        gone = [axis_of(a, len(x.shape)) for a in (axes or ())]
        if not gone or any(not isinstance(x.shape[a], int) for a in gone):
            raise UnsupportedError("a reduction over the tokens")
        x = im.layouts.with_axes(x, gone)
        keep = bool(op.attrs.get("keepdims", 1))
        value = im.emit(ir, x.value, axes=tuple(sorted(x.axes.index(a) for a in gone)), keepdims=keep)
        if keep:
            return Traced(value, tuple(1 if i in gone else d for i, d in enumerate(x.shape)), x.axes)
        left = [a for a in range(len(x.shape)) if a not in gone]
        return Traced(value, tuple(x.shape[a] for a in left), tuple(left.index(a) for a in x.axes if a not in gone))


for _name, _ir in {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max"}.items():
    _reduction(_name, _ir)
