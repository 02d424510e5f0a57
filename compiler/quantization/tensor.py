"""A quantised weight: integers and what they stand for.

This is the form in which every source of quantised weights meets the compiler: `quantize` of a float weight, and
the decoders of checkpoints that are already quantised. `weight = value * scale + offset` says all of them: a zero
point z is an offset of -z * scale, a minimum is the offset itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferloom.compiler.quantization.scheme import Scheme
from inferloom.ir import quantized
from inferloom.ir.errors import UnsupportedError


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
        return quantized.dequantize(self.values, self.scales, self.offsets, self.scheme.format)

    def rows(self, which: slice | np.ndarray) -> QuantizedTensor:
        """The rows of the weight that a slice, or an array of their numbers, picks."""
        offsets = None if self.offsets is None else self.offsets[which]
        return QuantizedTensor(self.values[which], self.scales[which], offsets, self.scheme)


def quantize(weight: np.ndarray, scheme: Scheme) -> QuantizedTensor:
    """Round f32 [n, k] as ir/quantized.py says. UnsupportedError when the scheme's groups do not divide k."""
    if weight.ndim != 2:
        raise UnsupportedError(f"only weights [n, k] can be quantised, got {weight.shape}")
    scheme.groups(weight.shape[1])
    return QuantizedTensor(*quantized.quantize_weight(weight, scheme.format, scheme.group, scheme.symmetric), scheme)


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
