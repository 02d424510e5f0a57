"""Rounding of rows and quantised tables in row kernels against the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.compiler.quantization.scheme import parse
from inferloom.compiler.quantization.tensor import quantize
from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets.single import TOKENS, Body, alone, tensor
from tests.targets.tvm.bodies import Kernels

COUNT = 11
TABLES = {"int8": 64, "int8-g32-asym": 64, "int4": 96, "int4-channel-asym": 51, "int8-asym": 20, "fp8": 64, "fp8-g32": 96}


def rounding(width: int, group: int, norm: bool = False) -> Body:
    def body(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, width))
        x = b.emit("rms_norm", x, b.input("w", tensor(width)), eps=1e-5) if norm else x
        made = b.emit_node("quantize_rows", [x], {"group": group}).results
        return [*([x] if norm else []), *made]

    return body


def tables(name: str, k: int) -> Body:
    """The rows of a table of seven, and of one that is packed."""
    scheme = parse(name)

    def body(b: Builder) -> Sequence[Value]:
        ids, shape = b.input("ids", tensor(TOKENS, dtype=DType.I32)), (7, scheme.groups(k))
        how = {"format": scheme.format, "group": scheme.group}
        scales = [b.input(name, tensor(*shape)) for name in ("scales", "offsets")[:1 if scheme.symmetric else 2]]
        laid = tensor(1, shape[1], 64, dtype=DType.F16) if scheme.group else tensor(*shape)
        packed_scales = [b.input(f"packed_{v.name}", laid) for v in scales]
        packed = b.input("packed", tensor(1, 32 * -(-k // 32) // (8 if scheme.bits == 4 else 4), 64, 4, dtype=DType.U8))
        return [b.emit("quantized_embedding", ids, b.input("values", tensor(7, k, dtype=DType.I8)), *scales, **how),
                b.emit("packed_quantized_embedding", ids, packed, *packed_scales, n=7, k=k, **how)]

    return body


BODIES: dict[str, Body] = {
    "rows_64": rounding(64, 0), "rows_7": rounding(7, 0), "rows_g32": rounding(96, 32), "rows_g64": rounding(4864, 64),
    "norm": rounding(128, 32, True), **{name: tables(name, k) for name, k in TABLES.items()},
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("row", BODIES)


def rows_of(name: str, kernels: Kernels) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {v.name: rng.normal(0, 3, [d if isinstance(d, int) else COUNT for d in v.type.shape]).astype(np.float32)  # type: ignore[union-attr]
            for v in kernels.graphs[name].inputs}
    made["x"][3] = 0
    return made


@pytest.mark.parametrize("name", ["rows_64", "rows_7", "rows_g32", "rows_g64"])
def test_rounding_is_exact(kernels: Kernels, name: str) -> None:
    inputs = rows_of(name, kernels)
    got = kernels.run(name, inputs, {"tokens": COUNT})
    for g, w in zip(got, kernels.want(name, inputs), strict=True):
        np.testing.assert_array_equal(g, w)
    assert not got[0][3].any() and got[1][3] == 0
    single = kernels.run(name, alone(inputs, kernels.graphs[name], 5), {"tokens": 1})
    for whole, one in zip(got, single, strict=True):
        np.testing.assert_array_equal(whole[5], one[0])


def test_a_norm_is_rounded_where_it_is_made(kernels: Kernels) -> None:
    inputs = rows_of("norm", kernels)
    x, values, scales, sums = kernels.check("norm", inputs, {"tokens": COUNT})
    assert np.abs(values * scales - x).max() <= scales.max() * 0.501
    np.testing.assert_array_equal(sums, values.reshape(COUNT, -1, 32).sum(axis=2))


@pytest.mark.parametrize("name,k", TABLES.items())
def test_rows_of_tables(kernels: Kernels, name: str, k: int) -> None:
    rng, scheme = np.random.default_rng(1), parse(name)
    table = quantize(rng.normal(0.5, 1, (7, k)).astype(np.float32), scheme)
    inputs = {"ids": rng.integers(0, 7, COUNT).astype(np.int32), "values": table.values, "scales": table.scales}
    if table.offsets is not None:
        inputs["offsets"] = table.offsets
    for part in [key for key in ("scales", "offsets") if key in inputs]:
        packed = ops.run_reference("pack_scales", [inputs[part]], {"tile": 64})[0] if scheme.group else inputs[part]
        inputs[f"packed_{part}"] = packed
    inputs["packed"], = ops.run_reference("pack_quantized", [table.values], {"format": scheme.format, "tile": 64,
                                                                             "k_multiple": 32})
    for made in kernels.check(name, inputs, {"tokens": COUNT}):
        np.testing.assert_allclose(made, table.dequantize()[inputs["ids"]], rtol=1e-6, atol=1e-6)
