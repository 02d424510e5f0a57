from __future__ import annotations

import numpy as np
import pytest

from inferloom.compiler.quantization.scheme import Scheme, parse
from inferloom.compiler.quantization.tensor import QuantizedTensor, concat, quantize
from inferloom.ir.errors import UnsupportedError

NAMES = ("int8", "int8-g32", "int8-asym", "int4", "int4-channel", "int4-g64-asym", "int4-g128", "fp8", "fp8-g64")


def _weight(n: int = 5, k: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2, (n, k)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_off_by_half_a_step_at_most(name: str) -> None:
    scheme, weight = parse(name), _weight()
    made = quantize(weight, scheme)
    error = np.abs(made.dequantize() - weight).reshape(5, made.scales.shape[1], -1)
    if scheme.format == "fp8":
        size = np.abs(weight).reshape(error.shape)
        assert (error <= size / 16 + made.scales[:, :, None] * 2.0 ** -10).all()
    elif scheme.format == "int4" and scheme.symmetric:  # which may cut off the ends of a range
        assert (error <= np.abs(made.scales[:, :, None]) * 2.1).all()
    else:  # the ends of a range may be off by the rounding of scale and offset to f16, too
        slack = 0.5 + (0.1 if scheme.group else 1e-3)
        assert (error <= made.scales[:, :, None] * slack).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", [n for n in NAMES if "asym" not in n])
def test_quantising_again_changes_nothing(name: str) -> None:
    once = quantize(_weight(), parse(name))
    twice = quantize(once.dequantize(), once.scheme)
    np.testing.assert_allclose(twice.dequantize(), once.dequantize(), rtol=2e-3)


def test_symmetric_by_hand() -> None:
    made = quantize(np.array([[-12.7, 0.04, 6.42, 0.16]], np.float32), parse("int8"))
    assert made.values.tolist() == [[-127, 0, 64, 2]]
    np.testing.assert_allclose(made.scales, [[0.1]], rtol=1e-6)
    assert made.offsets is None


def test_symmetric_int4_by_hand() -> None:
    """The weight of largest magnitude becomes -8, whatever its sign; others leave less error where it is less alone."""
    made = quantize(np.array([[4.0, -3.5, 1.0, 0.5], [-8.0, 7.0, 1.0, 0.0]], np.float32), parse("int4-channel"))
    assert made.values.tolist() == [[-8, 7, -2, -1], [-8, 7, 1, 0]] and made.scales.tolist() == [[-0.5], [1.0]]
    made = quantize(np.array([[-7.0, 7.0, 1.0, -2.0]], np.float32), parse("int4-channel"))
    assert made.dequantize().tolist() == [[-7.0, 7.0, 1.0, -2.0]]


def test_symmetric_int4_leaves_less_than_the_largest_over_7() -> None:
    weight = _weight()
    plain = np.float32(weight).reshape(-1, 32)
    scale = (np.abs(plain).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    error = np.square(np.rint(plain / scale) * scale - plain).sum()
    assert np.square(quantize(weight, parse("int4")).dequantize() - weight).sum() < 0.9 * error


def test_asymmetric_by_hand() -> None:
    made = quantize(np.array([[1.0, 2.5, 16.0, 4.25]], np.float32), parse("int4-channel-asym"))
    assert made.values.tolist() == [[-8, -6, 7, -5]]
    np.testing.assert_allclose(made.scales, [[1.0]])
    np.testing.assert_allclose(made.offsets, [[9.0]])
    assert made.dequantize().tolist() == [[1.0, 3.0, 16.0, 4.0]]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    assert not quantize(np.zeros((2, 128), np.float32), parse(name)).dequantize().any()


def test_scales_of_groups_fit_f16() -> None:
    scales = quantize(_weight(), parse("int4-g64-asym")).scales
    assert (scales == scales.astype(np.float16)).all()


@pytest.mark.parametrize("name", NAMES)
def test_concat_and_rows_keep_values(name: str) -> None:
    a, b = quantize(_weight(3, seed=1), parse(name)), quantize(_weight(4, seed=2), parse(name))
    both = concat([a, b])
    assert both.shape == (7, 256)
    np.testing.assert_array_equal(both.dequantize(), np.concatenate([a.dequantize(), b.dequantize()]))
    np.testing.assert_array_equal(both.rows(slice(3, 7)).values, b.values)
    np.testing.assert_array_equal(both.rows(np.array([4, 0])).scales, np.stack([b.scales[1], a.scales[0]]))


def test_other_schemes_do_not_join() -> None:
    a = quantize(_weight(), parse("int8"))
    with pytest.raises(UnsupportedError, match="cannot join"):
        concat([a, quantize(_weight(), parse("fp8"))])
    with pytest.raises(UnsupportedError, match="cannot join"):
        concat([a, quantize(_weight(k=128), parse("int8"))])


def test_what_does_not_fit_together_is_refused() -> None:
    values, scales = np.zeros((2, 64), np.int8), np.ones((2, 2), np.float32)
    scheme = Scheme("int4", 32)
    QuantizedTensor(values, scales, None, scheme)
    for wrong in ((values.astype(np.int32), scales, None), (values, scales[:, :1], None),
                  (values, scales.astype(np.float16), None), (values, scales, scales), (values + np.int8(8), scales, None)):
        with pytest.raises(UnsupportedError):
            QuantizedTensor(*wrong, scheme)
    with pytest.raises(UnsupportedError, match=r"only weights \[n, k\]"):
        quantize(np.zeros(4, np.float32), parse("int8"))
