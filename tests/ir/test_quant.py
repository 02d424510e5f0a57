"""Quantised layers: what numbers stand for, how they are rounded, and how they are laid out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.quantized import dequantize, from_fp8, quantize_weight, to_fp8
from tests.ir.test_ops import parse_type

RNG = np.random.default_rng(3)
SCHEMES = [("int8", 0, True), ("int8", 32, True), ("int8", 0, False), ("int4", 0, True), ("int4", 32, True), ("int4", 64, False),
           ("fp8", 0, True), ("fp8", 32, True)]


def run(name: str, *arrays: Any, **attrs: Any) -> tuple[np.ndarray, ...]:
    return ops.run_reference(name, arrays, ops.get(name).check_attrs(attrs))


def test_fp8_is_e4m3fn() -> None:
    """Every code, everything half way between two, and what lies beyond the largest."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8)
    numbers = from_fp8(codes)
    np.testing.assert_array_equal(numbers, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    finite = np.sort(numbers[np.isfinite(numbers)])
    x = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, RNG.normal(0, 20, 1000), RNG.normal(0, 0.01, 1000)])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(to_fp8(x), x.astype(ml_dtypes.float8_e4m3fn).view(np.int8))
    assert from_fp8(to_fp8(np.float32([1e6, -1e6]))).tolist() == [448, -448]


@pytest.mark.parametrize("format,group,symmetric", SCHEMES)
def test_layers_compute_with_the_weight_that_is_stored(format: str, group: int, symmetric: bool) -> None:
    """Linear and embedding, packed and not, against plain products with the dequantised weight."""
    n, k = 70, 64 if group else 51
    weight = RNG.normal(0, 1, (n, k)).astype(np.float32)
    values, scales, *offsets = run("quantize_weight", weight, format=format, group=group, symmetric=symmetric)
    offset = offsets[0] if offsets else None
    whole = np.float64(dequantize(values, scales, offset, format))
    how = {"format": format, "group": group}
    packed, = run("pack_quantized", values, format=format, tile=16, k_multiple=32)
    assert packed.shape == (5, 64 // (8 if format == "int4" else 4), 16, 4) and packed.dtype == np.uint8
    laid = [a if a is None or not group else run("pack_scales", a, tile=16)[0] for a in (scales, offset)]
    assert not group or laid[0].dtype == np.float16
    x, bias = RNG.normal(0, 1, (9, k)).astype(np.float32), RNG.normal(0, 1, n).astype(np.float32)
    made = run("quantized_linear", x, None, None, values, scales, offset, bias, **how)[0]
    np.testing.assert_allclose(made, x @ whole.T + bias, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(run("packed_quantized_linear", x, None, None, packed, *laid, bias, n=n, k=k, **how)[0], made)
    ids = np.array([5, 0, 69], np.int32)
    np.testing.assert_allclose(run("quantized_embedding", ids, values, scales, offset, **how)[0], whole[ids], rtol=1e-6)
    np.testing.assert_allclose(run("packed_quantized_embedding", ids, packed, *laid, n=n, k=k, **how)[0], whole[ids], rtol=1e-6)
    if format != "fp8":
        integers, scale, sums = run("quantize_rows", x, group=group)
        rounded = np.float64(integers) * scale
        made = run("quantized_linear", integers, scale, sums, values, scales, offset, bias, **how)[0]
        np.testing.assert_allclose(made, rounded @ whole.T + bias, rtol=1e-4, atol=1e-4)
        packed_made = run("packed_quantized_linear", integers, scale, sums, packed, *laid, bias, n=n, k=k, **how)[0]
        np.testing.assert_array_equal(packed_made, made)


def test_rows_by_hand() -> None:
    x = np.float32([[1, -2, 0.5, 0.25], [0, 0, 0, 0], [127, 0.5, 1.5, -127]])
    values, scales, sums = run("quantize_rows", x, group=0)
    assert values.tolist() == [[64, -127, 32, 16], [0, 0, 0, 0], [127, 0, 2, -127]]
    assert scales.tolist() == [[np.float32(2) / np.float32(127)], [0], [1]] and sums.tolist() == [[-15], [0], [2]]
    assert run("quantize_rows", np.tile(x, (1, 4)), group=8)[2].tolist() == [[-30, -30], [0, 0], [4, 4]]


def test_nibbles_of_a_weight_by_hand() -> None:
    """Eight steps of k are four bytes: step j in the lower half of byte j, step 4 + j in the upper."""
    values = np.int8([[-8, -7, -6, -5, 4, 5, 6, 7], [0] * 8])
    packed, = run("pack_quantized", values, format="int4", tile=2, k_multiple=8)
    assert packed.tolist() == [[[[0xC0, 0xD1, 0xE2, 0xF3], [0x88] * 4]]]
    packed, = run("pack_quantized", values[:, :5], format="int8", tile=2, k_multiple=8)
    assert packed[0, :, 0].tolist() == [[120, 121, 122, 123], [132, 0, 0, 0]]


def test_large_weights_are_rounded_in_parts() -> None:
    """Parts are rows, so that a weight of any size comes out the same."""
    weight = RNG.normal(0, 1, (5, 1 << 20)).astype(np.float32)
    values, scales, _ = quantize_weight(weight, "int8", 0, True)
    for row in range(5):
        one = quantize_weight(weight[row:row + 1], "int8", 0, True)
        np.testing.assert_array_equal(values[row], one[0][0])
        np.testing.assert_array_equal(scales[row], one[1][0])


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("quantize_weight", "f32:t,4", {"format": "int8"}, "must be static"),
    ("quantize_weight", "f32:6,4", {"format": "int3"}, "unknown format 'int3'"),
    ("quantize_weight", "f32:6,40", {"format": "int8", "group": 32}, "groups of 32 do not divide rows of 40"),
    ("quantized_expert_linear", "f32:t,1,8 i8:6,8 f32:6,1 _ i32:t,2", {"n": 4, "format": "int8"}, "6 rows those of experts of 4"),
    ("packed_quantized_expert_linear", "f32:t,1,8 u8:2,2,16,4 f32:32,1 _ i32:t,2", {"n": 8, "k": 8, "format": "int8"},
     "rows of two experts of 8"),
    ("quantize_weight", "f32:6,4", {"format": "fp8", "symmetric": False}, "fp8 has no offsets"),
    ("quantize_rows", "i32:t,4", {}, "must be .* of floats"), ("quantize_rows", "f32:t,4", {"group": 3}, "groups of 3"),
    ("quantize_rows", "f32:4,t", {}, "must be static"),
    ("quantized_linear", "i8:t,4 f32:t,1 i32:t,1 f32:6,4 f32:6,1", {"format": "int8"}, r"values must be i8"),
    ("quantized_linear", "i8:t,4 f32:t,1 i32:t,1 i8:6,4 f32:6,2", {"format": "int8"}, "scales and offsets"),
    ("quantized_linear", "i8:t,5 f32:t,1 i32:t,1 i8:6,4 f32:6,1", {"format": "int8"}, r"x must be \[tokens, 4\]"),
    ("quantized_linear", "i8:t,4 _ _ i8:6,4 f32:6,1", {"format": "int8"}, "needs the scales and sums"),
    ("quantized_linear", "f32:t,4 f32:t,1 _ i8:6,4 f32:6,1", {"format": "int8"}, "an x of floats has no scales"),
    ("quantized_linear", "i8:t,99999 f32:t,1 i32:t,1 i8:6,99999 f32:6,1", {"format": "int8"}, "may overflow"),
    ("quantized_linear", "f32:t,4 _ _ i8:6,4 f32:6,1 _ f32:5", {"format": "int8"}, "bias must have 6"),
    ("quantized_embedding", "f32:t i8:6,4 f32:6,1", {"format": "int8"}, "needs i32 ids"),
    ("pack_quantized", "f32:6,4", {"format": "int8", "tile": 4, "k_multiple": 8}, "must be static i8"),
    ("pack_quantized", "i8:6,4", {"format": "int8", "tile": 4, "k_multiple": 4}, "a multiple of 8"),
    ("pack_scales", "f32:6", {"tile": 4}, "must be static"),
    ("packed_quantized_linear", "f32:t,4 _ _ u8:2,2,4,4 f32:6,1", {"n": 9, "k": 4, "format": "int8"}, "does not hold"),
    ("packed_quantized_linear", "f32:t,4 _ _ f32:2,2,4,4 f32:6,1", {"n": 6, "k": 4, "format": "int8"}, "needs a weight of"),
    ("packed_quantized_linear", "f32:t,4 _ _ u8:2,2,4,4 f32:6,2", {"n": 6, "k": 4, "format": "int8"}, "scales and offsets"),
    ("packed_quantized_embedding", "f32:t u8:2,2,4,4 f32:6,1", {"n": 6, "k": 4, "format": "int8"}, "ids must be i32"),
]


@pytest.mark.parametrize("name,types,attrs,message", REFUSED, ids=[f"{r[0]}: {r[3]}" for r in REFUSED])
def test_type_rule_refuses(name: str, types: str, attrs: dict[str, Any], message: str) -> None:
    operands = [parse_type(t) for t in types.split()]
    with pytest.raises(VerifyError, match=f"^{name} .*{message}"):
        ops.infer(name, operands, ops.get(name).check_attrs(attrs))
