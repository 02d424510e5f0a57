"""Layers: embedding, linear, norms, rotary embedding."""

from __future__ import annotations

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import Tolerance, op
from inferloom.ir.types import DType, TensorType


@op("embedding", tolerance=Tolerance(0.0, 0.0), foldable=False)
class Embedding:
    """`table[ids]`: ids i32[tokens], table [vocab, width] -> f32 [tokens, width]."""

    def infer(ids: TensorType, table: TensorType) -> TensorType:  # type: ignore[misc]
        if ids.dtype is not DType.I32 or table.rank != 2:
            raise VerifyError("needs i32 ids and a [vocab, width] table")
        return TensorType(DType.F32, (*ids.shape, table.shape[1]))

    def reference(ids, table):  # type: ignore[no-untyped-def, misc]
        return np.asarray(table[ids], np.float32)


@op("linear", tolerance=Tolerance(1e-5, 1e-4))
class Linear:
    """`x @ weight.T + bias`: x [..., k], weight [n, k], bias f32 [n] -> f32 [..., n].

    x has the weight's element type, or is f32; products accumulate in float32.
    """

    def infer(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:  # type: ignore[misc]
        if weight.rank != 2 or x.shape[-1:] != weight.shape[1:]:
            raise VerifyError("the last dim of x must be the second of weight")
        if x.dtype not in (weight.dtype, DType.F32):
            raise VerifyError("x has neither the weight's element type nor f32; insert a cast")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise VerifyError("bias must have one element per row of weight")
        return TensorType(DType.F32, (*x.shape[:-1], weight.shape[0]))

    def reference(x, weight, bias=None):  # type: ignore[no-untyped-def, misc]
        y = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
        return y if bias is None else y + bias


@op("rms_norm")
class RmsNorm:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019): `x / sqrt(mean(x^2) + eps) * weight`.

    Models that scale by `1 + weight` (Gemma) add the one to the weight at compile time.
    """

    def infer(x: TensorType, weight: TensorType | None = None, *, eps: float) -> TensorType:  # type: ignore[misc]
        if weight is not None and weight.shape != x.shape[-weight.rank:]:
            raise VerifyError("weight must match the trailing dims of x")
        return x.with_dtype(DType.F32)

    def reference(x, weight=None, *, eps):  # type: ignore[no-untyped-def, misc]
        x = np.asarray(x, np.float32)
        y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
        return y if weight is None else y * weight


@op("layer_norm")
class LayerNorm:
    """Layer norm over the last axis (Ba et al. 2016): `(x - mean) / sqrt(var + eps) * weight + bias`."""

    def infer(x: TensorType, weight: TensorType | None = None, bias: TensorType | None = None,  # type: ignore[misc]
              *, eps: float) -> TensorType:
        for scale in (weight, bias):
            if scale is not None and scale.shape != x.shape[-scale.rank:]:
                raise VerifyError("weight and bias must match the trailing dims of x")
        return x.with_dtype(DType.F32)

    def reference(x, weight=None, bias=None, *, eps):  # type: ignore[no-untyped-def, misc]
        x = np.asarray(x, np.float32)
        centred = x - np.mean(x, axis=-1, keepdims=True)
        y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


@op("rotary")
class Rotary:
    """Rotary position embedding (Su et al. 2021) of x [tokens, heads, dim] by cos, sin [tokens, r/2].

    The first r elements of each head are turned, the rest pass through. Pair i is (x[i], x[i + r/2]), or
    (x[2i], x[2i+1]) when `interleaved`: `(a*cos - b*sin, b*cos + a*sin)`.
    """

    def infer(x: TensorType, cos: TensorType, sin: TensorType, *, interleaved: bool = False) -> TensorType:  # type: ignore[misc]
        half = cos.shape[-1] if cos.rank else None
        if x.rank != 3 or cos != sin or cos.rank != 2 or not isinstance(half, int) or not isinstance(x.shape[2], int):
            raise VerifyError("needs x [tokens, heads, dim] and cos, sin [tokens, r/2]")
        if 2 * half > x.shape[2] or x.shape[0] != cos.shape[0]:
            raise VerifyError("cos and sin must cover at most dim/2 pairs of the same tokens")
        return x

    def reference(x, cos, sin, *, interleaved):  # type: ignore[no-untyped-def, misc]
        x = np.asarray(x, np.float32)
        half = cos.shape[-1]
        out = x.copy()
        first = np.s_[..., 0:2 * half:2] if interleaved else np.s_[..., :half]
        second = np.s_[..., 1:2 * half:2] if interleaved else np.s_[..., half:2 * half]
        a, b, c, s = x[first], x[second], cos[:, None], sin[:, None]
        out[first], out[second] = a * c - b * s, b * c + a * s
        return out


def _unpack(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    tiles, steps, tile, pair = packed.shape
    return packed.transpose(0, 2, 1, 3).reshape(tiles * tile, steps * pair)[:n, :k]


def _check_packed(packed: TensorType, n: int, k: int) -> None:
    if packed.rank != 4 or not packed.is_static:
        raise VerifyError("needs a weight packed by pack_linear: [n/tile, k/pair, tile, pair]")
    tiles, steps, tile, pair = (int(str(d)) for d in packed.shape)
    if not (tiles * tile >= n > (tiles - 1) * tile and steps * pair >= k):
        raise VerifyError(f"packed weight {packed} does not hold [{n}, {k}]")


@op("packed_linear", tolerance=Tolerance(1e-5, 1e-4))
class PackedLinear:
    """`linear` with a weight laid out by `pack_linear`; n and k are the weight's own rows and columns."""

    def infer(x: TensorType, packed: TensorType, bias: TensorType | None = None, *, n: int, k: int) -> TensorType:  # type: ignore[misc]
        _check_packed(packed, n, k)
        if x.shape[-1:] != (k,) or x.dtype not in (packed.dtype, DType.F32):
            raise VerifyError("x must have k columns, and the weight's element type or f32")
        if bias is not None and bias.shape != (n,):
            raise VerifyError("bias must have n elements")
        return TensorType(DType.F32, (*x.shape[:-1], n))

    def reference(x, packed, bias=None, *, n, k):  # type: ignore[no-untyped-def, misc]
        y = np.asarray(x, np.float32) @ np.asarray(_unpack(packed, n, k), np.float32).T
        return y if bias is None else y + bias


@op("packed_embedding", tolerance=Tolerance(0.0, 0.0), foldable=False)
class PackedEmbedding:
    """`embedding` from a table that a tied output projection has packed: n is the vocabulary, k the width."""

    def infer(ids: TensorType, packed: TensorType, *, n: int, k: int) -> TensorType:  # type: ignore[misc]
        _check_packed(packed, n, k)
        if ids.dtype is not DType.I32:
            raise VerifyError("ids must be i32")
        return TensorType(DType.F32, (*ids.shape, k))

    def reference(ids, packed, *, n, k):  # type: ignore[no-untyped-def, misc]
        return np.asarray(_unpack(packed, n, k)[ids], np.float32)
