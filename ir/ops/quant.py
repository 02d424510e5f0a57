"""Quantised layers: weights as integers (or fp8) with scales, activations as 8-bit integers with a scale per token."""

from __future__ import annotations

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import Tolerance, op
from inferloom.ir.ops.experts import expert_product, expert_result
from inferloom.ir.quantized import FORMATS, dequantize, quantize_weight
from inferloom.ir.types import DType, TensorType

#: Products of integers are exact below this many of them.
MOST_K = 1 << 16


def _size(type: TensorType, axis: int) -> int:
    size = type.shape[axis]
    if not isinstance(size, int):
        raise VerifyError(f"dim {axis} of {type} must be static")
    return size


def _check_format(format: str, group: int, k: int) -> None:
    if format not in FORMATS:
        raise VerifyError(f"unknown format {format!r}")
    if group < 0 or group and (group % 8 or k % group):
        raise VerifyError(f"groups of {group} do not divide rows of {k}")


def _check_scales(n: int, k: int, group: int, *arrays: TensorType | None) -> None:
    for array in arrays:
        if array is not None and (array.shape != (n, k // group if group else 1) or not array.dtype.is_float):
            raise VerifyError(f"scales and offsets of [{n}, {k}] in groups of {group} are not {array}")


@op("quantize_weight", tolerance=Tolerance(0.0, 0.0))
class QuantizeWeight:
    """Round weight [n, k] to `format` (int8, int4 or fp8): values i8 [n, k], scales f32 [n, k/group] and, unless
    `symmetric`, offsets like them. The weight is then `value * scale + offset`; group 0 means one scale a row.

    Values of int4 are one a byte, fp8 is held as its bits. How numbers are rounded is said in ir/quantized.py. A weight
    that the checkpoint stores quantised in this way keeps the integers and scales that it has.
    """

    def infer(weight: TensorType, *, format: str, group: int = 0, symmetric: bool = True) -> tuple[TensorType, ...]:  # type: ignore[misc]
        if weight.rank != 2 or not weight.is_static:
            raise VerifyError(f"weight must be static [n, k], got {weight}")
        n, k = _size(weight, 0), _size(weight, 1)
        _check_format(format, group, k)
        if format == "fp8" and not symmetric:
            raise VerifyError("fp8 has no offsets")
        scales = TensorType(DType.F32, (n, k // group if group else 1))
        return TensorType(DType.I8, (n, k)), scales, *(() if symmetric else (scales,))

    def reference(weight, *, format, group, symmetric):  # type: ignore[no-untyped-def, misc]
        values, scales, offsets = quantize_weight(weight, format, group, symmetric)
        return (values, scales) if offsets is None else (values, scales, offsets)


@op("quantize_rows", tolerance=Tolerance(0.0, 1.0), foldable=False)
class QuantizeRows:
    """Quantise each row of x [tokens, k] by its own scale: values i8 [tokens, k], scales f32 [tokens, 1], and the sums of
    values over groups, i32 [tokens, k/group] (group 0: [tokens, 1]).

    scale = max|x| / 127, value = x * (127 / max|x|) rounded to the nearest, ties to even; a row of zeros has scale 0.
    The tolerance is a value's: x may lie between two.
    """

    def infer(x: TensorType, *, group: int = 0) -> tuple[TensorType, TensorType, TensorType]:  # type: ignore[misc]
        if x.rank != 2 or not x.dtype.is_float:
            raise VerifyError(f"x must be [tokens, k] of floats, got {x}")
        k = _size(x, 1)
        _check_format("int8", group, k)
        rows = x.shape[0]
        return (TensorType(DType.I8, x.shape), TensorType(DType.F32, (rows, 1)),
                TensorType(DType.I32, (rows, k // group if group else 1)))

    def reference(x, *, group):  # type: ignore[no-untyped-def, misc]
        x = np.asarray(x, np.float32)
        most = np.abs(x).max(axis=1, keepdims=True, initial=0)
        factor = np.float32(127) / np.where(most > 0, most, np.float32(np.inf))
        values = np.rint(x * factor).astype(np.int8)
        sums = values.reshape(len(x), -1, group or x.shape[1]).sum(axis=2, dtype=np.int32)
        return values, most / np.float32(127), sums


def _check_x(x: TensorType, scale: TensorType | None, sums: TensorType | None, n: int, k: int, group: int,
             bias: TensorType | None) -> TensorType:
    if x.rank != 2 or x.shape[1] != k:
        raise VerifyError(f"x must be [tokens, {k}], got {x}")
    rows = x.shape[0]
    if x.dtype is DType.I8:
        if scale != TensorType(DType.F32, (rows, 1)) or sums != TensorType(DType.I32, (rows, k // group if group else 1)):
            raise VerifyError("an x of integers needs the scales and sums that quantize_rows made of it, by the same groups")
        if k > MOST_K:
            raise VerifyError(f"sums of {k} products of integers may overflow")
    elif scale is not None or sums is not None:
        raise VerifyError("an x of floats has no scales")
    if bias is not None and bias.shape != (n,):
        raise VerifyError(f"bias must have {n} elements")
    return TensorType(DType.F32, (rows, n))


def _product(x: np.ndarray, scale: np.ndarray | None, values: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None,
             bias: np.ndarray | None, format: str) -> np.ndarray:
    if scale is None:
        y = np.asarray(x, np.float32) @ dequantize(values, scales, offsets, format).T
    else:
        groups, y = scales.shape[1], np.zeros((len(x), len(values)), np.float32)
        width = values.shape[1] // groups
        for g in range(groups):
            part = slice(g * width, g * width + width)
            integers = x[:, part].astype(np.float64)  # products of integers are exact in f64, and fast
            y += (integers @ values[:, part].astype(np.float64).T).astype(np.float32) * scales[:, g]
            if offsets is not None:
                y += integers.sum(axis=1, keepdims=True).astype(np.float32) * offsets[:, g]
        y *= scale
    return y if bias is None else y + bias


@op("quantized_linear", tolerance=Tolerance(1e-5, 1e-4))
class QuantizedLinear:
    """`x @ weight.T + bias` with a weight of `quantize_weight`: values i8 [n, k], scales and offsets [n, k/group].

    With x i8, of which `scale` and `sums` are those of `quantize_rows`, products of integers are summed exactly over
    each group, and groups are added up in order, in f32. With x of floats the weight alone is quantised.
    """

    def infer(x: TensorType, scale: TensorType | None, sums: TensorType | None, values: TensorType, scales: TensorType,  # type: ignore[misc]
              offsets: TensorType | None = None, bias: TensorType | None = None, *, format: str, group: int = 0) -> TensorType:
        if values.rank != 2 or values.dtype is not DType.I8:
            raise VerifyError(f"values must be i8 [n, k], got {values}")
        n, k = _size(values, 0), _size(values, 1)
        _check_format(format, group, k)
        _check_scales(n, k, group, scales, offsets)
        return _check_x(x, scale, sums, n, k, group, bias)

    def reference(x, scale, sums, values, scales, offsets=None, bias=None, *, format, group):  # type: ignore[no-untyped-def, misc]
        return _product(x, scale, values, scales, offsets, bias, format)


@op("quantized_embedding", tolerance=Tolerance(1e-6, 1e-6), foldable=False)
class QuantizedEmbedding:
    """`embedding` from a table of `quantize_weight`: ids i32 [tokens] -> f32 [tokens, k]."""

    def infer(ids: TensorType, values: TensorType, scales: TensorType, offsets: TensorType | None = None,  # type: ignore[misc]
              *, format: str, group: int = 0) -> TensorType:
        if ids.dtype is not DType.I32 or values.rank != 2 or values.dtype is not DType.I8:
            raise VerifyError("needs i32 ids and i8 [vocab, width] values")
        n, k = _size(values, 0), _size(values, 1)
        _check_format(format, group, k)
        _check_scales(n, k, group, scales, offsets)
        return TensorType(DType.F32, (*ids.shape, k))

    def reference(ids, values, scales, offsets=None, *, format, group):  # type: ignore[no-untyped-def, misc]
        return dequantize(values[ids], scales[ids], None if offsets is None else offsets[ids], format)


def _packed_shape(n: int, k: int, tile: int, k_multiple: int, format: str) -> tuple[int, int, int, int]:
    return -(-n // tile), -(-k // k_multiple) * k_multiple // (8 if format == "int4" else 4), tile, 4


@op("pack_quantized", tolerance=Tolerance(0.0, 0.0))
class PackQuantized:
    """Lay values i8 [n, k] out for the target's matmul: u8 [n/tile, k/4, tile, 4], lanes over n, four k-steps together.

    Integers become unsigned by adding 128 or 8; fp8 stays as it is. int4 is [n/tile, k/8, tile, 4]: byte j of a group of
    eight k-steps holds step j in its lower half and step 4 + j in its upper half. Padding is bytes of zero.
    """

    def infer(values: TensorType, *, format: str, tile: int, k_multiple: int) -> TensorType:  # type: ignore[misc]
        if values.rank != 2 or values.dtype is not DType.I8 or not values.is_static:
            raise VerifyError(f"values must be static i8 [n, k], got {values}")
        _check_format(format, 0, 0)
        if tile < 1 or k_multiple < 8 or k_multiple % 8:
            raise VerifyError("tile must be positive, k_multiple a multiple of 8")
        return TensorType(DType.U8, _packed_shape(_size(values, 0), _size(values, 1), tile, k_multiple, format))

    def reference(values, *, format, tile, k_multiple):  # type: ignore[no-untyped-def, misc]
        n, k = values.shape
        padded = np.zeros((-(-n // tile) * tile, -(-k // k_multiple) * k_multiple), np.uint8)
        padded[:n, :k] = values.view(np.uint8)
        if format != "fp8":
            padded[:n, :k] += np.uint8(8 if format == "int4" else 128)
        if format == "int4":
            halves = padded.reshape(len(padded), -1, 2, 4)
            padded = np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(padded), -1)
        quads = padded.view(np.uint32).reshape(len(padded) // tile, tile, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(quads).view(np.uint8).reshape(*quads.shape, 4)


@op("pack_scales", tolerance=Tolerance(0.0, 0.0))
class PackScales:
    """Lay scales (or offsets) [n, groups] of groups out as the matmul reads them: f16 [n/tile, groups, tile]."""

    def infer(scales: TensorType, *, tile: int) -> TensorType:  # type: ignore[misc]
        if scales.rank != 2 or not scales.is_static or tile < 1:
            raise VerifyError(f"scales must be static [n, groups], got {scales}")
        return TensorType(DType.F16, (-(-_size(scales, 0) // tile), _size(scales, 1), tile))

    def reference(scales, *, tile):  # type: ignore[no-untyped-def, misc]
        n, groups = scales.shape
        padded = np.zeros((-(-n // tile) * tile, groups), np.float16)
        padded[:n] = scales
        return padded.reshape(-1, tile, groups).transpose(0, 2, 1)


def _unpack_values(packed: np.ndarray, n: int, k: int, format: str) -> np.ndarray:
    """Values i8 [n, k] of a weight of `pack_quantized`."""
    tiles, steps, tile, _ = packed.shape
    rows = packed.transpose(0, 2, 1, 3).reshape(tiles * tile, steps, 4)
    if format == "int4":
        rows = np.stack([rows & 15, rows >> 4], axis=2)
    values = rows.reshape(tiles * tile, -1)[:n, :k]
    return (values - np.uint8({"int8": 128, "int4": 8, "fp8": 0}[format])).view(np.int8)


def _unpack_scales(packed: np.ndarray, n: int, group: int) -> np.ndarray:
    if not group:
        return packed
    return np.asarray(packed.transpose(0, 2, 1), np.float32).reshape(-1, packed.shape[1])[:n]


def _check_packed(packed: TensorType, n: int, k: int, format: str, group: int, *scales: TensorType | None) -> None:
    _check_format(format, group, k)
    if packed.rank != 4 or packed.dtype is not DType.U8 or not packed.is_static:
        raise VerifyError(f"needs a weight of pack_quantized, got {packed}")
    tiles, steps, tile, _ = (int(str(d)) for d in packed.shape)
    if not (tiles * tile >= n > (tiles - 1) * tile and steps * (8 if format == "int4" else 4) >= k):
        raise VerifyError(f"packed weight {packed} does not hold [{n}, {k}]")
    wanted = TensorType(DType.F16, (tiles, k // group, tile)) if group else TensorType(DType.F32, (n, 1))
    for array in scales:
        if array is not None and array != wanted:
            raise VerifyError(f"scales and offsets must be {wanted}, got {array}")


@op("packed_quantized_linear", tolerance=Tolerance(1e-5, 1e-4), foldable=False)
class PackedQuantizedLinear:
    """`quantized_linear` with values laid out by `pack_quantized`, scales and offsets of groups by `pack_scales` (those
    of rows f32 [n, 1] as they are); n and k are the weight's own rows and columns."""

    def infer(x: TensorType, scale: TensorType | None, sums: TensorType | None, packed: TensorType, scales: TensorType,  # type: ignore[misc]
              offsets: TensorType | None = None, bias: TensorType | None = None, *, n: int, k: int, format: str,
              group: int = 0) -> TensorType:
        _check_packed(packed, n, k, format, group, scales, offsets)
        return _check_x(x, scale, sums, n, k, group, bias)

    def reference(x, scale, sums, packed, scales, offsets=None, bias=None, *, n, k, format, group):  # type: ignore[no-untyped-def, misc]
        offsets = None if offsets is None else _unpack_scales(offsets, n, group)
        return _product(x, scale, _unpack_values(packed, n, k, format), _unpack_scales(scales, n, group), offsets, bias, format)


@op("quantized_expert_linear", tolerance=Tolerance(1e-5, 1e-4))
class QuantizedExpertLinear:
    """`expert_linear` with weights of `quantize_weight`: values i8 [experts * n, k], scales and offsets like them.

    x [tokens, 1 or choices, k] of floats, choice i32 [tokens, choices], bias f32 [experts, n] -> f32 [tokens, choices, n].
    """

    def infer(x: TensorType, values: TensorType, scales: TensorType, offsets: TensorType | None, choice: TensorType,  # type: ignore[misc]
              bias: TensorType | None = None, *, n: int, format: str, group: int = 0) -> TensorType:
        if values.rank != 2 or values.dtype is not DType.I8:
            raise VerifyError(f"values must be i8 [experts * n, k], got {values}")
        rows, k = _size(values, 0), _size(values, 1)
        _check_format(format, group, k)
        _check_scales(rows, k, group, scales, offsets)
        return _check_experts(x, choice, rows, n, k, bias)

    def reference(x, values, scales, offsets, choice, bias=None, *, n, format, group):  # type: ignore[no-untyped-def, misc]
        weight = dequantize(values, scales, offsets, format)
        return expert_product(x, weight.reshape(-1, n, weight.shape[1]), choice, bias)


@op("packed_quantized_expert_linear", tolerance=Tolerance(1e-5, 1e-4), foldable=False)
class PackedQuantizedExpertLinear:
    """`quantized_expert_linear` with values laid out by `pack_quantized`, scales and offsets of groups by `pack_scales`;
    n and k are those of each expert's weight, of which tiles hold no two."""

    def infer(x: TensorType, packed: TensorType, scales: TensorType, offsets: TensorType | None, choice: TensorType,  # type: ignore[misc]
              bias: TensorType | None = None, *, n: int, k: int, format: str, group: int = 0) -> TensorType:
        rows = _size(packed, 0) * _size(packed, 2)
        if n % _size(packed, 2):
            raise VerifyError(f"tiles of {packed} hold rows of two experts of {n}")
        _check_packed(packed, rows, k, format, group, scales, offsets)
        return _check_experts(x, choice, rows, n, k, bias)

    def reference(x, packed, scales, offsets, choice, bias=None, *, n, k, format, group):  # type: ignore[no-untyped-def, misc]
        rows = packed.shape[0] * packed.shape[2]
        offsets = None if offsets is None else _unpack_scales(offsets, rows, group)
        weight = dequantize(_unpack_values(packed, rows, k, format), _unpack_scales(scales, rows, group), offsets, format)
        return expert_product(x, weight.reshape(-1, n, k), choice, bias)


def _check_experts(x: TensorType, choice: TensorType, rows: int, n: int, k: int, bias: TensorType | None) -> TensorType:
    if x.shape[2:] != (k,) or not x.dtype.is_float or n < 1 or rows % n:
        raise VerifyError(f"x must be [tokens, 1 or choices, {k}] of floats, and {rows} rows those of experts of {n}")
    return expert_result(x, choice, rows // n, n, bias)


@op("packed_quantized_embedding", tolerance=Tolerance(1e-6, 1e-6), foldable=False)
class PackedQuantizedEmbedding:
    """`quantized_embedding` from a table that a tied output projection has packed: n is the vocabulary, k the width."""

    def infer(ids: TensorType, packed: TensorType, scales: TensorType, offsets: TensorType | None = None,  # type: ignore[misc]
              *, n: int, k: int, format: str, group: int = 0) -> TensorType:
        _check_packed(packed, n, k, format, group, scales, offsets)
        if ids.dtype is not DType.I32:
            raise VerifyError("ids must be i32")
        return TensorType(DType.F32, (*ids.shape, k))

    def reference(ids, packed, scales, offsets=None, *, n, k, format, group):  # type: ignore[no-untyped-def, misc]
        offsets = None if offsets is None else _unpack_scales(offsets, n, group)[ids]
        return dequantize(_unpack_values(packed, n, k, format)[ids], _unpack_scales(scales, n, group)[ids], offsets, format)
