"""A weight that a checkpoint stores in few bits, not read yet.

Every format says the same: `weight = value * scale + offset`, with a scale for each group of a row's columns. A format's
decoder gives the integers; here they become the float weight, exactly, or the form that the kernels read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from inferloom.compiler.quantization.scheme import GROUPS, Activations, Format, Scheme
from inferloom.compiler.quantization.tensor import QuantizedTensor, quantize
from inferloom.ir.errors import UnsupportedError


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """What a decoder reads of a weight [n, k].

    `values`: int8 or float8_e4m3fn [n, k]. `scales`, and `offsets` unless all are zero: f32 [n, groups]. `columns`: the
    group of each column, int [k]; None when groups are of equal size and in order.
    """

    values: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    columns: np.ndarray | None = None

    def dequantize(self) -> np.ndarray:
        """The weight, f32 [n, k]."""
        n, k = self.values.shape
        if self.columns is not None:
            weight = self.values.astype(np.float32) * self.scales[:, self.columns]
            return weight if self.offsets is None else weight + self.offsets[:, self.columns]
        weight = self.values.astype(np.float32).reshape(n, self.scales.shape[1], -1) * self.scales[:, :, None]
        if self.offsets is not None:
            weight += self.offsets[:, :, None]
        return weight.reshape(n, k)

    def rows(self, order: np.ndarray) -> Integers:
        """The weight with its rows in another order."""
        return Integers(self.values[order], self.scales[order], None if self.offsets is None else self.offsets[order],
                        self.columns)


def spread(module: str, scale: np.ndarray, n: int, k: int, rows: int, columns: int) -> np.ndarray:
    """The scale of each group of each row, f32 [n, groups], of a weight with one for each `rows` x `columns` (0: all)."""
    rows, columns = rows or n, columns or k
    high, wide = -(-n // rows), -(-k // columns)
    if scale.shape not in ((high, wide), (high,) * (wide == 1), ()) or scale.size != high * wide:
        raise UnsupportedError(f"{module}: the scales are {list(scale.shape)}; a weight [{n}, {k}] in blocks of "
                               f"{rows} x {columns} has {[high, wide]}")
    return np.repeat(scale.reshape(high, wide), rows, axis=0)[:n]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A tensor of a checkpoint (see `weights.Tensor`) that `integers` decodes.

    `scheme` is how the kernels hold it. `exact`: with the checkpoint's own integers; if not, `stored_as` says what the
    checkpoint has, and `quantized` rounds the weight anew. Groups' scales and offsets are f16 in an artifact.
    """

    shape: tuple[int, int]
    scheme: Scheme
    exact: bool
    stored_as: str
    integers: Callable[[], Integers]

    @property
    def dtype(self) -> str:
        return "F32"

    def read(self) -> np.ndarray:
        """The weight that the checkpoint stands for, f32 [n, k]."""
        return self.integers().dequantize()

    def quantized(self) -> QuantizedTensor:
        """The weight in `scheme`."""
        found = self.integers()
        if not self.exact:
            return quantize(found.dequantize(), self.scheme)
        groups = self.scheme.groups(self.shape[1])
        values = found.values if found.values.dtype == np.int8 else found.values.view(np.int8)
        repeat = groups // found.scales.shape[1]  # a group of 256 is two of 128 with the same scale

        def repeated(array: np.ndarray) -> np.ndarray:
            return np.repeat(array, repeat, axis=1) if repeat > 1 else array

        offsets = found.offsets
        if offsets is None and not self.scheme.symmetric:
            offsets = np.zeros_like(found.scales)
        return QuantizedTensor(np.ascontiguousarray(values), repeated(found.scales),
                               None if offsets is None else repeated(offsets), self.scheme)


def quantized_weight(shape: tuple[int, int], format: Format, groups: int, symmetric: bool, stored_as: str,
                     integers: Callable[[], Integers], *, in_order: bool = True,
                     activations: Activations = "none") -> QuantizedWeight:
    """The weight with the scheme that holds it: its own, or the nearest finer one that there are kernels for.

    `groups`: scales of a row. A group must be the whole row or a multiple of one of GROUPS, and its columns must lie
    together (`in_order`); otherwise the weight is rounded to int8 in groups of 32, or in rows that these do not divide.
    """
    k = shape[1]
    size = k // groups if groups and k % groups == 0 else 0
    if in_order and groups == 1:
        return QuantizedWeight(shape, Scheme(format, 0, symmetric, activations), True, stored_as, integers)
    if in_order and size:
        fitting = [g for g in GROUPS if size % g == 0]
        if fitting:
            return QuantizedWeight(shape, Scheme(format, fitting[-1], symmetric, activations), True, stored_as, integers)
    finer = next((g for g in GROUPS if k % g == 0), 0)
    return QuantizedWeight(shape, Scheme("int8", finer, True, activations), False, stored_as, integers)
