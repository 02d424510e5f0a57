"""ggml's element types: plain numbers, and blocks of quantised ones.

A row is cut into blocks; each holds its integers and what scales them. The layouts are those of `block_q4_0` and so on in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; "low half" and "high half" of a block's bytes are the lower
and upper four bits of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from inferloom.compiler.frontends.quantized.weight import Integers
from inferloom.compiler.quantization.scheme import Format

#: values int8 [blocks, size], scales f32 [blocks, groups], offsets f32 [blocks, groups] or None
Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, slots=True)
class Plain:
    """A type of numbers. `stored`: its name in safetensors."""

    name: str
    stored: str
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class Block:
    """A quantised type: `bytes` for `size` numbers, which share scales in groups of `group`."""

    name: str
    size: int
    bytes: int
    format: Format
    group: int
    symmetric: bool
    decode: Callable[[np.ndarray], Decoded]

    def integers(self, raw: np.ndarray, rows: int) -> Integers:
        """`rows` rows of blocks, u8, as integers."""
        values, scales, offsets = self.decode(raw.reshape(-1, self.bytes))
        return Integers(values.reshape(rows, -1), scales.reshape(rows, -1),
                        None if offsets is None else offsets.reshape(rows, -1))


def _half(raw: np.ndarray) -> np.ndarray:
    """Two bytes of each block as f32 [blocks, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """[blocks, bytes] to u8 [blocks, 2, bytes]: the low halves, then the high halves."""
    return np.stack((raw & 15, raw >> 4), axis=1)


def _q4_0(raw: np.ndarray) -> Decoded:
    """f16 scale; 16 bytes: 32 values from 0 to 15, 8 standing for zero."""
    return _nibbles(raw[:, 2:]).reshape(len(raw), 32).view(np.int8) - np.int8(8), _half(raw[:, :2]), None


def _q4_1(raw: np.ndarray) -> Decoded:
    """f16 scale, f16 minimum; 16 bytes as in Q4_0."""
    scale = _half(raw[:, :2])
    values = _nibbles(raw[:, 4:]).reshape(len(raw), 32).view(np.int8) - np.int8(8)
    return values, scale, _half(raw[:, 2:4]) + 8 * scale


def _fifth(raw: np.ndarray, low: np.ndarray) -> np.ndarray:
    """32 values of 5 bits: the fifth ones in 4 bytes, the others in 16."""
    high = np.unpackbits(raw, axis=1, bitorder="little")
    return (_nibbles(low).reshape(len(raw), 32) | (high << 4)).view(np.int8)


def _q5_0(raw: np.ndarray) -> Decoded:
    """f16 scale; 4 bytes of fifth bits; 16 bytes: 32 values from 0 to 31, 16 standing for zero."""
    return _fifth(raw[:, 2:6], raw[:, 6:]) - np.int8(16), _half(raw[:, :2]), None


def _q5_1(raw: np.ndarray) -> Decoded:
    """f16 scale, f16 minimum; bits as in Q5_0."""
    scale = _half(raw[:, :2])
    return _fifth(raw[:, 4:8], raw[:, 8:]) - np.int8(16), scale, _half(raw[:, 2:4]) + 16 * scale


def _q8_0(raw: np.ndarray) -> Decoded:
    """f16 scale; 32 int8."""
    return np.ascontiguousarray(raw[:, 2:]).view(np.int8), _half(raw[:, :2]), None


def _scale_min(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 scale and minimum [blocks, 8] of Q4_K and Q5_K: f16 of both, then 12 bytes with 6 bits of each of the groups.

    The first four groups' lie in the low 6 bits of bytes 0..3 (scales) and 4..7 (minima); the others' low four bits in
    the halves of bytes 8..11, and their upper two in the upper bits of bytes 0..7.
    """
    d, least, packed = _half(raw[:, :2]), _half(raw[:, 2:4]), raw[:, 4:16]
    scales = np.concatenate((packed[:, :4] & 63, (packed[:, 8:] & 15) | (packed[:, :4] >> 6 << 4)), axis=1)
    minima = np.concatenate((packed[:, 4:8] & 63, (packed[:, 8:] >> 4) | (packed[:, 4:8] >> 6 << 4)), axis=1)
    return d * scales.astype(np.float32), least * minima.astype(np.float32)


def _q4_k(raw: np.ndarray) -> Decoded:
    """Scales and minima; 128 bytes: each 32 of them are two groups, in their low and high halves. value*scale - minimum."""
    scales, minima = _scale_min(raw)
    values = _nibbles(raw[:, 16:].reshape(-1, 32)).reshape(len(raw), 256).view(np.int8) - np.int8(8)
    return values, scales, 8 * scales - minima


def _q5_k(raw: np.ndarray) -> Decoded:
    """As Q4_K, with 32 bytes of fifth bits before: bit j of byte i is that of number i of group j."""
    scales, minima = _scale_min(raw)
    low = _nibbles(raw[:, 48:].reshape(-1, 32)).reshape(len(raw), 8, 32)
    high = (raw[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1).swapaxes(1, 2)
    return (low | (high << 4)).reshape(len(raw), 256).view(np.int8) - np.int8(16), scales, 16 * scales - minima


def _q6_k(raw: np.ndarray) -> Decoded:
    """128 bytes of low halves, 64 of upper two bits, 16 int8 scales, f16 scale of these; values 0..63, 32 is zero.

    For each half of the block: 64 bytes hold the low bits of numbers 0..63 (low halves) and 64..127 (high halves), and
    bits 2j, 2j+1 of 32 bytes the upper bits of numbers 32j..32j+31.
    """
    low = _nibbles(raw[:, :128].reshape(-1, 64)).reshape(len(raw), 2, 4, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = (low | (high << 4)).reshape(len(raw), 256).view(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return values, _half(raw[:, 208:]) * scales, None


#: ggml's numbers of the types that are read.
PLAIN = {0: Plain("F32", "F32", np.dtype("<f4")), 1: Plain("F16", "F16", np.dtype("<f2")),
         30: Plain("BF16", "BF16", np.dtype(ml_dtypes.bfloat16))}
BLOCKS = {2: Block("Q4_0", 32, 18, "int4", 32, True, _q4_0), 3: Block("Q4_1", 32, 20, "int4", 32, False, _q4_1),
          6: Block("Q5_0", 32, 22, "int8", 32, True, _q5_0), 7: Block("Q5_1", 32, 24, "int8", 32, False, _q5_1),
          8: Block("Q8_0", 32, 34, "int8", 32, True, _q8_0), 12: Block("Q4_K", 256, 144, "int4", 32, False, _q4_k),
          13: Block("Q5_K", 256, 176, "int8", 32, False, _q5_k), 14: Block("Q6_K", 256, 210, "int8", 16, True, _q6_k)}
#: Types that are refused by name.
OTHER_TYPES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
               20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
               29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
