"""Integers of 4 or 8 bits, packed into int32 words, the lowest bits first."""

from __future__ import annotations

import numpy as np


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words to uint8 values in 0..2**bits-1; `axis` becomes 32/bits times as long."""
    moved = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint8)  # little-endian: the first value is lowest
    if bits == 4:
        split = np.empty((*moved.shape[:-1], moved.shape[-1], 2), np.uint8)
        np.bitwise_and(moved, 15, out=split[..., 0])
        np.right_shift(moved, 4, out=split[..., 1])
        moved = split.reshape(*moved.shape[:-1], -1)
    return np.moveaxis(moved, -1, axis)


def centred(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 in 0..2**bits-1 to int8 around zero: the middle becomes 0."""
    return (values ^ 0x80).view(np.int8) if bits == 8 else values.view(np.int8) - np.int8(8)
