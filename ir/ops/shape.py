"""Ops that move data without computing, and reductions."""

from __future__ import annotations

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import Tolerance, op
from inferloom.ir.types import Affine, Dim, DType, Shape, Sym, TensorType

EXACT = Tolerance(0.0, 0.0)


def _axis(x: TensorType, axis: int) -> int:
    if not 0 <= axis < x.rank:
        raise VerifyError(f"axis {axis} is outside {x} (axes count from 0 and are never negative)")
    return axis


def _static(dim: Dim, what: str) -> int:
    if not isinstance(dim, int):
        raise VerifyError(f"{what} needs a static dim, got {dim}")
    return dim


def _runtime_shape(x: np.ndarray, shape: Shape) -> tuple[int, ...]:
    """A shape with its one symbolic dim resolved from the array's size."""
    return tuple(-1 if isinstance(d, (Sym, Affine)) else d for d in shape)


@op("reshape", tolerance=EXACT)
class Reshape:
    """Row-major reshape; a symbolic dim must stay in the leading place."""

    def infer(x: TensorType, *, shape: Shape) -> TensorType:  # type: ignore[misc]
        def split(dims: Shape) -> tuple[list[Dim], int]:
            size = 1
            for d in dims:
                if isinstance(d, int):
                    size *= d
            return [d for d in dims if not isinstance(d, int)], size

        if split(x.shape) != split(shape):
            raise VerifyError(f"cannot reshape to [{','.join(map(str, shape))}]: sizes differ")
        if any(not isinstance(d, int) for d in shape[1:]):
            raise VerifyError(f"symbolic dims must lead, got [{','.join(map(str, shape))}]")
        return x.with_shape(shape)

    def reference(x, *, shape):  # type: ignore[no-untyped-def, misc]
        return np.reshape(x, _runtime_shape(x, shape))


@op("permute", tolerance=EXACT)
class Permute:
    """Reorder axes: result axis i is operand axis axes[i]."""

    def infer(x: TensorType, *, axes: tuple[int, ...]) -> TensorType:  # type: ignore[misc]
        if sorted(axes) != list(range(x.rank)):
            raise VerifyError(f"axes {axes} are not a permutation of {x.rank} axes")
        return x.with_shape(tuple(x.shape[a] for a in axes))

    def reference(x, *, axes):  # type: ignore[no-untyped-def, misc]
        return np.transpose(x, axes)


@op("slice", tolerance=EXACT)
class Slice:
    """`x[start:stop:step]` along one static axis."""

    def infer(x: TensorType, *, axis: int, start: int, stop: int, step: int = 1) -> TensorType:  # type: ignore[misc]
        dim = _static(x.shape[_axis(x, axis)], "slice")
        if not 0 <= start < stop <= dim or step < 1:
            raise VerifyError(f"[{start}:{stop}:{step}] is not inside 0..{dim}")
        shape = list(x.shape)
        shape[axis] = -(-(stop - start) // step)
        return x.with_shape(tuple(shape))

    def reference(x, *, axis, start, stop, step):  # type: ignore[no-untyped-def, misc]
        return x[(slice(None),) * axis + (slice(start, stop, step),)]


@op("concat", tolerance=EXACT)
class Concat:
    """Join along one static axis."""

    def infer(*parts: TensorType, axis: int) -> TensorType:  # type: ignore[misc]
        if not parts:
            raise VerifyError("needs at least one operand")
        first = parts[0]
        _axis(first, axis)
        for part in parts[1:]:
            same = part.rank == first.rank and all(
                a == b for i, (a, b) in enumerate(zip(part.shape, first.shape)) if i != axis)
            if not same or part.dtype is not first.dtype:
                raise VerifyError(f"{part} does not join {first} along axis {axis}")
        shape = list(first.shape)
        shape[axis] = sum(_static(p.shape[axis], "concat") for p in parts)
        return first.with_shape(tuple(shape))

    def reference(*parts, axis):  # type: ignore[no-untyped-def, misc]
        return np.concatenate(parts, axis)


@op("expand", tolerance=EXACT)
class Expand:
    """Broadcast to a shape, NumPy's rules."""

    def infer(x: TensorType, *, shape: Shape) -> TensorType:  # type: ignore[misc]
        if x.rank > len(shape):
            raise VerifyError(f"cannot expand to rank {len(shape)}")
        for have, want in zip(reversed(x.shape), reversed(shape), strict=False):
            if have not in (1, want):
                raise VerifyError(f"cannot expand to [{','.join(map(str, shape))}]")
        if any(not isinstance(d, int) and d not in x.shape for d in shape):
            raise VerifyError("a symbolic dim must be the operand's own: its size is not known otherwise")
        return x.with_shape(shape)

    def reference(x, *, shape):  # type: ignore[no-untyped-def, misc]
        full = tuple(x.shape[i - len(shape) + x.ndim] if isinstance(d, (Sym, Affine)) else d
                     for i, d in enumerate(shape))
        return np.broadcast_to(x, full)


@op("gather_rows", tolerance=EXACT, foldable=False)
class GatherRows:
    """`x[rows]`: pick rows of the leading axis, e.g. those whose logits are wanted."""

    def infer(x: TensorType, rows: TensorType) -> TensorType:  # type: ignore[misc]
        if rows.rank != 1 or rows.dtype is not DType.I32:
            raise VerifyError(f"rows must be i32[n], got {rows}")
        return x.with_shape((rows.shape[0], *x.shape[1:]))

    def reference(x, rows):  # type: ignore[no-untyped-def, misc]
        return x[rows]


def _reduced(x: TensorType, axes: tuple[int, ...], keepdims: bool) -> TensorType:
    for axis in axes:
        _static(x.shape[_axis(x, axis)], "reduction")
    if keepdims:
        return x.with_shape(tuple(1 if i in axes else d for i, d in enumerate(x.shape)))
    return x.with_shape(tuple(d for i, d in enumerate(x.shape) if i not in axes))


@op("sum")
class Sum:
    """Sum over static axes."""

    def infer(x: TensorType, *, axes: tuple[int, ...], keepdims: bool = False) -> TensorType:  # type: ignore[misc]
        return _reduced(x, axes, keepdims)

    def reference(x, *, axes, keepdims):  # type: ignore[no-untyped-def, misc]
        return np.sum(x, axis=axes, keepdims=keepdims, dtype=np.float32)


@op("mean")
class Mean:
    """Arithmetic mean over static axes."""

    def infer(x: TensorType, *, axes: tuple[int, ...], keepdims: bool = False) -> TensorType:  # type: ignore[misc]
        return _reduced(x, axes, keepdims)

    def reference(x, *, axes, keepdims):  # type: ignore[no-untyped-def, misc]
        return np.mean(x, axis=axes, keepdims=keepdims, dtype=np.float32)


@op("max")
class Max:
    """Largest element over static axes."""

    def infer(x: TensorType, *, axes: tuple[int, ...], keepdims: bool = False) -> TensorType:  # type: ignore[misc]
        return _reduced(x, axes, keepdims)

    def reference(x, *, axes, keepdims):  # type: ignore[no-untyped-def, misc]
        return np.max(x, axis=axes, keepdims=keepdims)
