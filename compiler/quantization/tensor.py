"""A quantised weight: integers and what they stand for.

This is the form in which every source of quantised weights meets the compiler: `quantize` of a float weight, and
the decoders of checkpoints that are already quantised. `weight = value * scale + offset` says all of them: a zero
point z is an offset of -z * scale, a minimum is the offset itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from inferloom.compiler.quantization.scheme import Scheme
from inferloom.ir.errors import UnsupportedError

FP8 = ml_dtypes.float8_e4m3fn
#: The values that a symmetric weight takes, in absolute terms, and the range that integers may have.
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
RANGE = {"int8": (-128, 127), "int4": (-8, 7)}


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight [n, k] as `values * scale + offset`.

    `values`: int8 [n, k]: int8 in -128..127, int4 in -8..7 (one a byte, packing comes later), fp8 as its bits.
    `scales`: f32 [n, k // group], [n, 1] when a row has one. `offsets`: the same shape, None when symmetric.
    UnsupportedError when a shape, an element type or a range is another.
    """

    values: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.int8:
            raise UnsupportedError(f"quantised values must be int8 [n, k], got {self.values.dtype} {self.values.shape}")
        n, k = self.values.shape
        wanted = (n, self.scheme.groups(k))
        for name, array in (("scales", self.scales), ("offsets", self.offsets)):
            if array is not None and (array.shape != wanted or array.dtype != np.float32):
                raise UnsupportedError(f"{self.scheme}: {name} must be f32 {wanted}, got {array.dtype} {array.shape}")
        if (self.offsets is None) != self.scheme.symmetric:
            raise UnsupportedError(f"{self.scheme}: a symmetric weight has no offsets, any other has them")
        if self.scheme.format == "int4" and self.values.size:
            low, high = int(self.values.min()), int(self.values.max())
            if low < -8 or high > 7:
                raise UnsupportedError(f"{self.scheme}: values must be in -8..7, got {low}..{high}")

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.values.shape
        return n, k

    def dequantize(self) -> np.ndarray:
        """The weight that this stands for, f32 [n, k]."""
        n, k = self.shape
        values = self.values.view(FP8) if self.scheme.format == "fp8" else self.values
        weight = values.astype(np.float32).reshape(n, self.scales.shape[1], -1) * self.scales[:, :, None]
        if self.offsets is not None:
            weight += self.offsets[:, :, None]
        return weight.reshape(n, k)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows start..stop of the weight."""
        part = slice(start, stop)
        offsets = None if self.offsets is None else self.offsets[part]
        return QuantizedTensor(self.values[part], self.scales[part], offsets, self.scheme)


def quantize(weight: np.ndarray, scheme: Scheme) -> QuantizedTensor:
    """Round f32 [n, k] to the nearest values, ties to even.

    Symmetric: the scale is the largest absolute weight of a group over the largest value (127, 7 or 448). With
    offsets: the smallest weight becomes the smallest value and the largest the largest. Scales and offsets of
    groups are rounded to f16, in which they are stored, before values are chosen by them; those of channels are f32.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.ndim != 2:
        raise UnsupportedError(f"only weights [n, k] can be quantised, got {weight.shape}")
    n, k = weight.shape
    grouped = weight.reshape(n, scheme.groups(k), -1)
    offsets = None
    if scheme.symmetric:
        scales = _stored(np.abs(grouped).max(axis=2) / np.float32(_LARGEST[scheme.format]), scheme)
    else:
        low, high = RANGE[scheme.format]
        least = grouped.min(axis=2)
        scales = _stored((grouped.max(axis=2) - least) / np.float32(high - low), scheme)
        offsets = _stored(least - scales * np.float32(low), scheme)
        grouped = grouped - offsets[:, :, None]
    steps = grouped / np.where(scales == 0, np.float32(1), scales)[:, :, None]
    if scheme.format == "fp8":
        values = np.clip(steps, -448, 448).astype(FP8).view(np.int8)
    else:
        values = np.clip(np.rint(steps), *RANGE[scheme.format]).astype(np.int8)
    return QuantizedTensor(values.reshape(n, k), scales, offsets, scheme)


def concat(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Weights of one scheme and one k, one below the other. UnsupportedError when these differ."""
    first = parts[0]
    for part in parts:
        if part.scheme != first.scheme or part.shape[1] != first.shape[1]:
            raise UnsupportedError(f"cannot join quantised weights [*, {first.shape[1]}] {first.scheme} and "
                                   f"[*, {part.shape[1]}] {part.scheme}")
    offsets = [p.offsets for p in parts if p.offsets is not None]
    return QuantizedTensor(np.concatenate([p.values for p in parts]), np.concatenate([p.scales for p in parts]),
                           np.concatenate(offsets) if offsets else None, first.scheme)


def _stored(scales: np.ndarray, scheme: Scheme) -> np.ndarray:
    """`scales` as f32 that the artifact can hold exactly."""
    return scales.astype(np.float16).astype(np.float32) if scheme.group else scales.astype(np.float32)
