"""Ops on parameters that packing needs; they are evaluated at compile time."""

from __future__ import annotations

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import Tolerance, op
from inferloom.ir.types import TensorType


@op("pack_linear", tolerance=Tolerance(0.0, 0.0))
class PackLinear:
    """Lay weight [n, k] out as [n/tile, k/pair, tile, pair] for the target's matmul, padded with zeros.

    `n` is padded to a multiple of `tile`, `k` to a multiple of `k_multiple`. A following kernel reads it with
    lanes over n and k in order.
    """

    def infer(weight: TensorType, *, tile: int, pair: int, k_multiple: int) -> TensorType:  # type: ignore[misc]
        if weight.rank != 2 or not weight.is_static:
            raise VerifyError(f"weight must be static [n, k], got {weight}")
        if min(tile, pair, k_multiple) < 1 or k_multiple % pair:
            raise VerifyError("tile, pair and k_multiple must be positive, k_multiple a multiple of pair")
        n, k = (int(str(d)) for d in weight.shape)
        return weight.with_shape((-(-n // tile), -(-k // k_multiple) * k_multiple // pair, tile, pair))

    def reference(weight, *, tile, pair, k_multiple):  # type: ignore[no-untyped-def, misc]
        n, k = weight.shape
        rows, cols = -(-n // tile) * tile, -(-k // k_multiple) * k_multiple
        if (rows, cols) != (n, k):
            padded = np.zeros((rows, cols), weight.dtype)
            padded[:n, :k] = weight
            weight = padded
        return weight.reshape(rows // tile, tile, cols // pair, pair).transpose(0, 2, 1, 3)


@op("interleave", tolerance=Tolerance(0.0, 0.0))
class Interleave:
    """Rows of a and b [n, ...] in turns of `group`: a[:group], b[:group], a[group:2*group], ..."""

    def infer(a: TensorType, b: TensorType, *, group: int) -> TensorType:  # type: ignore[misc]
        if a != b or a.rank < 1 or not isinstance(a.shape[0], int) or group < 1 or a.shape[0] % group:
            raise VerifyError(f"a and b must be equal and a multiple of {group} rows")
        return a.with_shape((2 * a.shape[0], *a.shape[1:]))

    def reference(a, b, *, group):  # type: ignore[no-untyped-def, misc]
        n, rest = a.shape[0], a.shape[1:]
        both = np.stack([a.reshape(n // group, group, *rest), b.reshape(n // group, group, *rest)], 1)
        return both.reshape(2 * n, *rest)


