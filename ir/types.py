"""Types of IR values: element types, bounded symbolic dims, tensors and state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod

import numpy as np


class DType(StrEnum):
    """Element type. The NumPy reference holds bf16 as float32 rounded to bf16.

    f8 is e4m3fn of the OCP 8-bit floating point specification: 4 bits of exponent, 3 of mantissa, no infinities.
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    F8 = "f8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory."""
        return {"i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2}.get(self.value, 1)

    @property
    def is_float(self) -> bool:
        return self in (DType.F32, DType.F16, DType.BF16)

    @property
    def numpy(self) -> np.dtype:
        """The dtype that the NumPy reference computes in."""
        return np.dtype(_NUMPY[self.value])


_NUMPY = {"f32": "float32", "f16": "float16", "bf16": "float32", "i64": "int64", "i32": "int32",
          "i8": "int8", "u8": "uint8", "f8": "float32", "bool": "bool"}


@dataclass(frozen=True, slots=True)
class Sym:
    """A dimension known only at run time: an integer in [0, bound]."""

    name: str
    bound: int

    def __mul__(self, factor: int) -> Affine:
        return Affine(self, factor, 0)

    def __add__(self, offset: int) -> Affine:
        return Affine(self, 1, offset)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Affine:
    """`scale * sym + offset`, e.g. the `seqs+1` entries of `seq_starts`."""

    sym: Sym
    scale: int
    offset: int

    @property
    def bound(self) -> int:
        return self.sym.bound * self.scale + self.offset

    def __str__(self) -> str:
        head = f"{self.scale}*{self.sym.name}" if self.scale != 1 or not self.offset else self.sym.name
        return head + (f"+{self.offset}" if self.offset else "")


Dim = int | Sym | Affine
Shape = tuple[Dim, ...]


def bound(dim: Dim) -> int:
    """The largest value that a dim can take."""
    return dim if isinstance(dim, int) else dim.bound


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dense tensor; a leading symbolic dim is the ragged token (or row) axis."""

    dtype: DType
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)

    @property
    def max_size(self) -> int:
        """Elements when every symbolic dim is at its bound."""
        size = 1
        for dim in self.shape:
            size *= bound(dim)
        return size

    def with_shape(self, shape: Shape) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class StateType:
    """Paged key-value state of one layer: K `[slots, heads, k_dim]` and V `[slots, heads, v_dim]`.

    With `latent`, the first `v_dim` elements of a key are its value, and nothing else is stored.
    A slot is `block * block_tokens + offset`. How a target lays slots out in memory is its own affair.
    Elements i8 and f8 have a scale, f32, for each key and value of a token and head.
    """

    dtype: DType
    heads: int
    k_dim: int
    v_dim: int
    block_tokens: int
    latent: bool = False

    @property
    def per_token(self) -> int:
        """Elements that a head keeps of a token."""
        return self.k_dim if self.latent else self.k_dim + self.v_dim

    @property
    def scales(self) -> int:
        """Scales that a head keeps of a token."""
        return 0 if self.dtype not in LARGEST else 1 if self.latent else 2

    @property
    def bytes_per_block(self) -> int:
        return self.block_tokens * self.heads * (self.per_token * self.dtype.itemsize + self.scales * DType.F32.itemsize)

    def __str__(self) -> str:
        return f"{'latent' if self.latent else 'kv'}<{self.dtype},{self.heads},{self.k_dim},{self.v_dim},{self.block_tokens}>"


@dataclass(frozen=True, slots=True)
class RecurrentType:
    """State of fixed size that a layer keeps for each sequence, `[pages, *shape]`: one page a sequence."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"rec<{self.dtype},{','.join(map(str, self.shape))}>"


Type = TensorType | StateType | RecurrentType
#: Types of values that a layer keeps between steps.
STATES = (StateType, RecurrentType)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16 value, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32)).astype(np.float32)


#: The largest magnitude of element types that need a scale.
LARGEST = {DType.I8: 127.0, DType.F8: 448.0}


def store_array(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Keys or values as a cache of `dtype` gives them back.

    Of i8 and f8, the last axis shares a scale, which makes its largest magnitude the largest that there is: numbers are
    rounded to the nearest times the scale, ties to even.
    """
    if dtype not in LARGEST:
        return cast_array(x, dtype)
    most = np.float32(LARGEST[dtype])
    scale = np.abs(x).max(-1, keepdims=True, initial=0).astype(np.float32) * np.float32(1 / LARGEST[dtype])
    steps = np.clip(x / np.where(scale > 0, scale, np.float32(1)), -most, most).astype(np.float32)
    steps = np.rint(steps) if dtype is DType.I8 else round_f8(steps)
    return (steps * scale).astype(np.float32)


def round_f8(x: np.ndarray) -> np.ndarray:
    """Round float32 of a magnitude of at most 448 to the nearest f8, ties to even."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)  # below 2^-6 the spacing stays the same
    return np.ldexp(np.rint(np.ldexp(x, 3 - exponent)), exponent - 3).astype(np.float32)


def cast_array(x: np.ndarray, dtype: DType) -> np.ndarray:
    """`x` as the NumPy reference holds values of `dtype`."""
    if dtype is DType.BF16:
        return round_bf16(np.asarray(x, dtype=np.float32))
    return np.asarray(x).astype(dtype.numpy)
