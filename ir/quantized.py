"""What quantised numbers stand for, and how they are rounded: the arithmetic behind ir/ops/quant.py, in NumPy.

A weight is `value * scale + offset`. Values are int8 arrays: integers of 8 bits, integers of 4 bits (-8..7), or the bits
of an fp8 number (e4m3fn of the OCP 8-bit floating point specification: 4 bits of exponent, 3 of mantissa, no infinities).
"""

from __future__ import annotations

import numpy as np

FORMATS = ("int8", "int4", "fp8")
#: The range of integers, and the largest absolute value that symmetric rounding gives.
RANGE = {"int8": (-128, 127), "int4": (-8, 7)}
LARGEST = {"int8": 127.0, "fp8": 448.0}
#: What the weight of largest magnitude may become, before it is rounded, in a symmetric group of int4.
INT4_EXTREMES = (-8.0, -8.5, -7.5, -9.0, -7.0)
_CHUNK = 1 << 22
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def quantize_weight(weight: np.ndarray, format: str, group: int, symmetric: bool) -> Arrays:
    """Values int8 [n, k], scales f32 [n, k/group] (group 0: [n, 1]), and offsets like scales unless `symmetric`.

    Each value is the nearest, ties to even. Symmetric: the scale is the largest absolute weight of a group over the
    largest value (127 or 448); in int4 it is the weight of largest magnitude over the one of `INT4_EXTREMES` (the first, of
    several) that leaves the least squared error, so that a scale may be negative. With offsets: the smallest weight becomes
    the smallest value and the largest the largest. Scales and offsets of groups are rounded to f16, in which they are
    stored, before values are chosen by them.
    """
    n, k = weight.shape
    rows = max(1, _CHUNK // max(k, 1))
    parts = [_quantize(weight[i:i + rows], format, group, symmetric) for i in range(0, max(n, 1), rows)]
    values, scales = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    return values, scales, None if symmetric else np.concatenate([p[2] for p in parts if p[2] is not None])


def _quantize(weight: np.ndarray, format: str, group: int, symmetric: bool) -> Arrays:
    n, k = weight.shape
    grouped = np.asarray(weight, np.float32).reshape(n, k // group if group else 1, group or k)
    offsets = None
    if symmetric and format == "int4":
        scales = _int4_scales(grouped, group)
    elif symmetric:
        scales = _stored(np.maximum(grouped.max(axis=2), -grouped.min(axis=2)) / np.float32(LARGEST[format]), group)
    else:
        low, high = RANGE[format]
        least = grouped.min(axis=2)
        scales = _stored((grouped.max(axis=2) - least) / np.float32(high - low), group)
        offsets = _stored(least - scales * np.float32(low), group)
        grouped = grouped - offsets[:, :, None]
    steps = grouped / np.where(scales == 0, np.float32(1), scales)[:, :, None]
    if format == "fp8":
        return to_fp8(steps).reshape(n, k), scales, offsets
    low, high = RANGE[format]
    return np.clip(np.rint(steps), low, high).astype(np.int8).reshape(n, k), scales, offsets


def _int4_scales(grouped: np.ndarray, group: int) -> np.ndarray:
    """Scales [n, groups] of symmetric int4 for weights [n, groups, width]."""
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    extreme = np.where(-low > high, low, high)
    least, best = np.full(extreme.shape, np.inf, np.float32), np.zeros(extreme.shape, np.float32)
    for value in INT4_EXTREMES:
        scales = _stored(extreme / np.float32(value), group)
        each = np.where(scales == 0, np.float32(1), scales)[:, :, None]
        error = np.clip(np.rint(grouped / each), *RANGE["int4"]) * each - grouped
        squares = np.einsum("ngk,ngk->ng", error, error)
        best = np.where(squares < least, scales, best)
        least = np.minimum(squares, least)
    return best


def dequantize(values: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None, format: str) -> np.ndarray:
    """The weight [n, k] that values, scales and offsets stand for, in f32."""
    n, k = values.shape
    numbers = from_fp8(values) if format == "fp8" else values.astype(np.float32)
    weight = numbers.reshape(n, scales.shape[1], -1) * np.asarray(scales, np.float32)[:, :, None]
    if offsets is not None:
        weight += np.asarray(offsets, np.float32)[:, :, None]
    return weight.reshape(n, k)


def _stored(scales: np.ndarray, group: int) -> np.ndarray:
    """`scales` as f32 that the artifact can hold exactly."""
    return scales.astype(np.float16).astype(np.float32) if group else scales.astype(np.float32)


def to_fp8(x: np.ndarray) -> np.ndarray:
    """The bits, as int8, of the nearest fp8 numbers, ties to even; what is larger becomes 448."""
    size = np.minimum(np.abs(np.asarray(x, np.float32)), np.float32(448))
    bits = size.view(np.uint32)
    # 3 bits of mantissa stay; their exponent is biased by 7 instead of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).astype(np.int32) - (120 << 3)
    code = np.where(size < 2.0**-6, np.rint(size * 512).astype(np.int32), normal)
    return np.where(np.signbit(x), code | 0x80, code).astype(np.uint8).view(np.int8)


def _fp8_table() -> np.ndarray:
    code = np.arange(256, dtype=np.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -size, size).astype(np.float32)


FP8 = _fp8_table()


def from_fp8(values: np.ndarray) -> np.ndarray:
    """The f32 numbers of fp8 bits."""
    return FP8[values.view(np.uint8)]
