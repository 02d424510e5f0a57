"""ONNX operators on NumPy arrays, for what a graph computes from shapes, positions and constants (see `structure`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from inferloom.compiler.frontends.onnx.file import ELEMENTS, Op
from inferloom.ir.errors import UnsupportedError

#: No evaluated array has more elements.
MOST = 1 << 26


Fold = Callable[..., Any]
FOLDS: dict[str, Fold] = {}


def folds(*names: str) -> Callable[[Fold], Fold]:
    """Register `f(op, *arrays)`; an absent operand is None."""

    def register(f: Fold) -> Fold:
        FOLDS.update({name: f for name in names})
        return f

    return register


def limit(shape: Sequence[int]) -> None:
    """UnsupportedError when an array is too large to be evaluated while compiling."""
    if math.prod(int(d) for d in shape) > MOST:
        raise UnsupportedError(f"an array of shape {list(shape)} would have to be evaluated; at most {MOST} elements are")


def axes_of(op: Op, arrays: Sequence[np.ndarray | None]) -> tuple[int, ...] | None:
    """`axes` as an attribute (old opsets) or as the second input; None when not given."""
    if "axes" in op.attrs:
        return tuple(op.attrs["axes"])
    given = arrays[0] if arrays else None
    return None if given is None else tuple(int(a) for a in given.reshape(-1))


def target_shape(shape: Sequence[int], wanted: Sequence[int], allow_zero: bool) -> list[int]:
    """The shape that a Reshape asks for: 0 keeps a dim (unless `allow_zero`), -1 stands for what is left."""
    return [int(shape[i]) if d == 0 and not allow_zero else int(d) for i, d in enumerate(wanted)]


def _pointwise(name: str, f: Callable[..., Any], keep: bool = True) -> None:
    @folds(name)
    def fold(op: Op, *arrays: np.ndarray) -> Any:
        limit(np.broadcast_shapes(*(a.shape for a in arrays)))
        made = arrays[0]
        if len(arrays) == 1 and name not in ("Max", "Min", "Sum"):
            made = f(made)
        for other in arrays[1:]:
            made = f(made, other)
        return made.astype(arrays[0].dtype) if keep else made


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind in "iu":  # towards zero
        return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(x.dtype)
    return x / y


_KEEP: dict[str, Fold] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Pow": np.power, "Max": np.maximum,
    "Min": np.minimum, "Neg": np.negative, "Abs": np.abs,
    "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log, "Sin": np.sin, "Cos": np.cos, "Tanh": np.tanh,
    "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint, "Sign": np.sign, "Reciprocal": np.reciprocal, "Not": np.logical_not,
    "BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseNot": np.bitwise_not, "Sum": np.add}
_BOOLEAN: dict[str, Fold] = {
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
    "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor, "IsNaN": np.isnan, "IsInf": np.isinf}
for _name, _f in (_KEEP | _BOOLEAN).items():
    _pointwise(_name, _f, keep=_name in _KEEP)


@folds("Mod")
def _mod(op: Op, x: np.ndarray, y: np.ndarray) -> Any:
    return (np.fmod if op.attrs.get("fmod") else np.mod)(x, y).astype(x.dtype)


@folds("Clip")
def _clip(op: Op, x: np.ndarray, low: Any = None, high: Any = None) -> Any:
    return x if low is None and high is None else np.clip(x, low, high).astype(x.dtype)


@folds("Where")
def _where(op: Op, condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> Any:
    limit(np.broadcast_shapes(condition.shape, x.shape, y.shape))
    return np.where(condition, x, y)


@folds("Cast")
def _cast(op: Op, x: np.ndarray) -> Any:
    return x.astype(ELEMENTS[op.attrs["to"]])


@folds("CastLike")
def _cast_like(op: Op, x: np.ndarray, like: np.ndarray) -> Any:
    return x.astype(like.dtype)


@folds("Identity", "Dropout")
def _same(op: Op, x: np.ndarray, *rest: Any) -> Any:
    return x


@folds("Range")
def _range(op: Op, start: np.ndarray, stop: np.ndarray, step: np.ndarray) -> Any:
    limit([max(0, math.ceil((stop.item() - start.item()) / step.item()))])
    return np.arange(start.item(), stop.item(), step.item()).astype(start.dtype)


@folds("ConstantOfShape")
def _filled(op: Op, shape: np.ndarray) -> Any:
    from onnx.numpy_helper import to_array

    limit(shape.tolist())
    value = to_array(op.attrs["value"]) if "value" in op.attrs else np.zeros(1, np.float32)
    return np.full(tuple(int(d) for d in shape), value.reshape(-1)[0], value.dtype)


@folds("Gather")
def _gather(op: Op, x: np.ndarray, places: np.ndarray) -> Any:
    return np.take(x, places.astype(np.int64), op.attrs.get("axis", 0))


@folds("GatherND")
def _gather_nd(op: Op, x: np.ndarray, places: np.ndarray) -> Any:
    if op.attrs.get("batch_dims", 0):
        raise ValueError("batch_dims other than 0")
    return x[tuple(places[..., i] for i in range(places.shape[-1]))]


@folds("GatherElements")
def _gather_elements(op: Op, x: np.ndarray, places: np.ndarray) -> Any:
    return np.take_along_axis(x, places.astype(np.int64), op.attrs.get("axis", 0))


@folds("ScatterND")
def _scatter_nd(op: Op, x: np.ndarray, places: np.ndarray, updates: np.ndarray) -> Any:
    if op.attrs.get("reduction", "none") != "none":
        raise ValueError("a reduction")
    made = x.copy()
    made[tuple(places[..., i] for i in range(places.shape[-1]))] = updates
    return made


@folds("Concat")
def _concat(op: Op, *parts: np.ndarray) -> Any:
    return np.concatenate(parts, op.attrs["axis"])


@folds("Split")
def _split(op: Op, x: np.ndarray, sizes: np.ndarray | None = None) -> Any:
    axis = op.attrs.get("axis", 0)
    return np.split(x, np.cumsum(split_sizes(op, x.shape[axis], sizes))[:-1], axis)


def split_sizes(op: Op, size: int, sizes: np.ndarray | None) -> list[int]:
    """The parts of a Split: given, as an attribute, or equal ones."""
    given = op.attrs.get("split") if sizes is None else sizes
    if given is not None:
        return [int(n) for n in given]
    step = -(-size // len(op.outputs))
    return [min(step, size - i * step) for i in range(len(op.outputs))]


@folds("Slice")
def _slice(op: Op, x: np.ndarray, starts: np.ndarray, ends: np.ndarray, axes: Any = None,
           steps: Any = None) -> Any:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        cut[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(cut)]


@folds("Squeeze")
def _squeeze(op: Op, x: np.ndarray, *rest: Any) -> Any:
    return np.squeeze(x, axes_of(op, rest))


@folds("Unsqueeze")
def _unsqueeze(op: Op, x: np.ndarray, *rest: Any) -> Any:
    return np.expand_dims(x, axes_of(op, rest) or ())


@folds("Reshape")
def _reshape(op: Op, x: np.ndarray, shape: np.ndarray) -> Any:
    return x.reshape(target_shape(x.shape, shape.tolist(), bool(op.attrs.get("allowzero", 0))))


@folds("Flatten")
def _flatten(op: Op, x: np.ndarray) -> Any:
    axis = op.attrs.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@folds("Transpose")
def _transpose(op: Op, x: np.ndarray) -> Any:
    return np.transpose(x, op.attrs.get("perm"))


@folds("Expand")
def _expand(op: Op, x: np.ndarray, shape: np.ndarray) -> Any:
    full = np.broadcast_shapes(x.shape, tuple(int(d) for d in shape))
    limit(full)
    return np.broadcast_to(x, full)


@folds("Tile")
def _tile(op: Op, x: np.ndarray, repeats: np.ndarray) -> Any:
    limit([a * int(b) for a, b in zip(x.shape, repeats)])
    return np.tile(x, tuple(int(r) for r in repeats))


@folds("Trilu")
def _trilu(op: Op, x: np.ndarray, k: np.ndarray | None = None) -> Any:
    return (np.triu if op.attrs.get("upper", 1) else np.tril)(x, 0 if k is None else int(k))


@folds("CumSum")
def _cumsum(op: Op, x: np.ndarray, axis: np.ndarray) -> Any:
    if op.attrs.get("exclusive") or op.attrs.get("reverse"):
        raise ValueError("exclusive or reverse")
    return np.cumsum(x, int(axis.item()), dtype=x.dtype)


@folds("MatMul")
def _matmul(op: Op, x: np.ndarray, y: np.ndarray) -> Any:
    limit((*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), *x.shape[-2:-1], *y.shape[-1:]))
    return np.matmul(x, y)


def _reduction(name: str, f: Callable[..., Any]) -> None:
    @folds(name)
    def fold(op: Op, x: np.ndarray, *rest: Any) -> Any:
        axes = axes_of(op, rest)
        if not axes and op.attrs.get("noop_with_empty_axes"):
            return x
        return f(x, axis=axes or None, keepdims=bool(op.attrs.get("keepdims", 1))).astype(x.dtype)


_REDUCTIONS: dict[str, Fold] = {"ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean,
                                "ReduceProd": np.prod}
for _name, _f in _REDUCTIONS.items():
    _reduction(_name, _f)

