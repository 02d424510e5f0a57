"""Pointwise ops. Operands broadcast as in NumPy; floats are computed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import Tolerance, op
from inferloom.ir.types import DType, Shape, TensorType, cast_array

_erf_scalar = np.frompyfunc(math.erf, 1, 1)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function in float64, rounded to float32."""
    return np.asarray(_erf_scalar(np.asarray(x, np.float64)), np.float64).astype(np.float32)


def broadcast(*types: TensorType) -> Shape:
    """The common shape of operands, NumPy's rules; VerifyError when there is none."""
    rank = max(t.rank for t in types)
    shape = []
    for axis in range(rank):
        dims = [t.shape[axis - rank + t.rank] for t in types if axis - rank + t.rank >= 0]
        wide = list(dict.fromkeys(d for d in dims if d != 1))
        if len(wide) > 1:
            raise VerifyError(f"shapes {', '.join(str(t) for t in types)} do not broadcast at axis {axis}")
        shape.append(wide[0] if wide else 1)
    return tuple(shape)


def _same_dtype(*types: TensorType) -> DType:
    dtypes = set(t.dtype for t in types)
    if len(dtypes) != 1:
        raise VerifyError(f"element types differ: {', '.join(str(t) for t in types)}; insert a cast")
    return types[0].dtype


def _unary(name: str, doc: str, reference: Callable[[np.ndarray], np.ndarray]) -> None:
    class Unary:
        def infer(x: TensorType) -> TensorType:  # type: ignore[misc]
            if not x.dtype.is_float:
                raise VerifyError(f"needs floats, got {x}")
            return x

    Unary.__doc__ = doc
    Unary.reference = lambda x: np.asarray(reference(np.asarray(x, np.float32)), np.float32)  # type: ignore[attr-defined]
    op(name, pointwise=True)(Unary)


def _binary(name: str, doc: str, reference: Callable[[np.ndarray, np.ndarray], np.ndarray],
            compares: bool = False) -> None:
    class Binary:
        def infer(x: TensorType, y: TensorType) -> TensorType:  # type: ignore[misc]
            dtype = _same_dtype(x, y)
            return TensorType(DType.BOOL if compares else dtype, broadcast(x, y))

    Binary.__doc__ = doc
    Binary.reference = lambda x, y: np.asarray(reference(x, y))  # type: ignore[attr-defined]
    op(name, pointwise=True)(Binary)


_unary("neg", "-x.", np.negative)
_unary("abs", "|x|.", np.abs)
_unary("exp", "e to the x.", np.exp)
_unary("log", "Natural logarithm.", np.log)
_unary("floor", "The largest integer that is at most x.", np.floor)
_unary("sqrt", "Square root.", np.sqrt)
_unary("rsqrt", "1 / sqrt(x).", lambda x: 1 / np.sqrt(x))
_unary("tanh", "Hyperbolic tangent.", np.tanh)
_unary("sin", "Sine of radians.", lambda x: np.sin(np.float64(x)))
_unary("cos", "Cosine of radians.", lambda x: np.cos(np.float64(x)))
_unary("erf", "Error function.", erf)
_unary("relu", "max(x, 0).", lambda x: np.maximum(x, 0))
_unary("sigmoid", "1 / (1 + exp(-x)).", lambda x: 1 / (1 + np.exp(-np.clip(x, -80, 80))))
_unary("silu", "x * sigmoid(x) (Elfwing et al. 2017).", lambda x: x / (1 + np.exp(-np.clip(x, -80, 80))))

_binary("add", "x + y.", np.add)
_binary("sub", "x - y.", np.subtract)
_binary("mul", "x * y.", np.multiply)
_binary("div", "x / y.", np.divide)
_binary("maximum", "The larger of x and y.", np.maximum)
_binary("minimum", "The smaller of x and y.", np.minimum)
_binary("pow", "x to the power y.", np.power)
_binary("lt", "x < y.", np.less, compares=True)
_binary("le", "x <= y.", np.less_equal, compares=True)
_binary("eq", "x == y.", np.equal, compares=True)


@op("gelu", pointwise=True)
class Gelu:
    """Gaussian error linear unit (Hendrycks & Gimpel 2016).

    `approximate="none"` uses erf; "tanh" the tanh formula (gelu_new, gelu_pytorch_tanh).
    """

    def infer(x: TensorType, *, approximate: str = "none") -> TensorType:  # type: ignore[misc]
        if approximate not in ("none", "tanh"):
            raise VerifyError(f"approximate={approximate!r} is neither 'none' nor 'tanh'")
        return x

    def reference(x, *, approximate):  # type: ignore[no-untyped-def, misc]
        x = np.asarray(x, np.float32)
        if approximate == "tanh":
            cubic = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
            return x * np.float32(0.5) * (1 + np.tanh(cubic))
        return x * np.float32(0.5) * (1 + erf(x * np.float32(math.sqrt(0.5))))


@op("where", pointwise=True)
class Where:
    """`x` where `condition` holds, else `y`."""

    def infer(condition: TensorType, x: TensorType, y: TensorType) -> TensorType:  # type: ignore[misc]
        if condition.dtype is not DType.BOOL:
            raise VerifyError(f"condition must be bool, got {condition}")
        return TensorType(_same_dtype(x, y), broadcast(condition, x, y))

    def reference(condition, x, y):  # type: ignore[no-untyped-def, misc]
        return np.where(condition, x, y)


@op("cast", pointwise=True, tolerance=Tolerance(0.0, 0.0))
class Cast:
    """Convert to another element type; floats round to nearest, ties to even."""

    def infer(x: TensorType, *, dtype: DType) -> TensorType:  # type: ignore[misc]
        return x.with_dtype(dtype)

    def reference(x, *, dtype):  # type: ignore[no-untyped-def, misc]
        return cast_array(x, dtype)


@op("iota", tolerance=Tolerance(0.0, 0.0))
class Iota:
    """0, 1, ..., size - 1: i32 [size]."""

    def infer(*, size: int) -> TensorType:  # type: ignore[misc]
        if size < 1:
            raise VerifyError(f"size must be positive, got {size}")
        return TensorType(DType.I32, (size,))

    def reference(*, size):  # type: ignore[no-untyped-def, misc]
        return np.arange(size, dtype=np.int32)


@op("constant", pointwise=True, tolerance=Tolerance(0.0, 0.0))
class Constant:
    """A scalar constant of shape []."""

    def infer(*, value: float, dtype: DType = DType.F32) -> TensorType:  # type: ignore[misc]
        return TensorType(dtype, ())

    def reference(*, value, dtype):  # type: ignore[no-untyped-def, misc]
        return cast_array(np.asarray(value), dtype)
