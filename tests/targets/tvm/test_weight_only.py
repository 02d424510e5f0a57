"""Kernels over quantised weights and float activations against the interpreter: every scheme, any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from inferloom.compiler.quantization.scheme import parse
from inferloom.compiler.quantization.tensor import quantize
from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from inferloom.targets.base import Logits
from inferloom.targets.chips import find
from inferloom.targets.tvm.codegen import CpuTarget
from tests.targets.single import TOKENS, Bodies, Body, alone, tensor
from tests.targets.tvm.bodies import Kernels


def linear(b: Builder, name: str, n: int, k: int, bias: bool = False) -> Value:
    scheme = parse(name)
    x, tiles = b.input("x", tensor(TOKENS, k)), -(-n // 64)
    packed = b.input("packed", tensor(tiles, 32 * -(-k // 32) * scheme.bits // 32, 64, 4, dtype=DType.U8))
    kind = tensor(tiles, k // scheme.group, 64, dtype=DType.F16) if scheme.group else tensor(n, 1)
    scales, offsets = b.input("scales", kind), None if scheme.symmetric else b.input("offsets", kind)
    more = b.input("bias", tensor(n)) if bias else None
    return b.emit("packed_quantized_linear", x, None, None, packed, scales, offsets, more, n=n, k=k, format=scheme.format,
                  group=scheme.group)


def plain(*args: Any, **options: Any) -> Body:
    return lambda b: [linear(b, *args, **options)]


def gated(b: Builder) -> Sequence[Value]:
    """silu(gate) * up with the two interleaved, as bf16."""
    y = b.emit("reshape", linear(b, "fp8", 128, 96, bias=True), shape=(TOKENS, 2, 2, 32))
    gate, up = (b.emit("reshape", b.emit("slice", y, axis=2, start=i, stop=i + 1), shape=(TOKENS, 64)) for i in (0, 1))
    return [b.emit("cast", b.emit("mul", b.emit("silu", gate), up), dtype=DType.BF16)]


#: name of the body: scheme, columns, inner dimension, bias.
CASES = {
    "int8_odd": ("int8-wo", 70, 299, True), "int4_g64_asym": ("int4-g64-asym-wo", 33, 192, False), "fp8": ("fp8", 64, 160, False),
}
MORE = {
    "int8": ("int8-wo", 128, 64, False), "int8_column": ("int8-wo", 1, 7, False), "int8_asym": ("int8-asym-wo", 70, 300, True),
    "int8_g32": ("int8-g32-wo", 130, 160, False), "int8_g128_asym": ("int8-g128-asym-wo", 64, 640, True),
    "int4_channel": ("int4-channel-wo", 67, 51, False), "int4_channel_asym": ("int4-channel-asym-wo", 64, 139, False),
    "int4_g32": ("int4-wo", 130, 96, True), "int4_g128": ("int4-g128-wo", 64, 1152, False), "fp8_odd": ("fp8", 70, 301, True),
    "fp8_g128": ("fp8-g128", 64, 384, False),
}
QUICK: dict[str, Body] = {name: plain(*case[:3], bias=case[3]) for name, case in CASES.items()}
SLOW: dict[str, Body] = {name: plain(*case[:3], bias=case[3]) for name, case in MORE.items()} | {"gated": gated}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("matmul", QUICK)


@pytest.fixture(scope="module")
def more() -> Kernels:
    return Kernels("matmul", SLOW)


def inputs_of(kernels: Kernels, name: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    scheme_name, n, k, _ = (CASES | MORE).get(name, ("fp8", 128, 96, True))
    weight = quantize(rng.standard_t(3, (n, k)).astype(np.float32) / 16, parse(scheme_name))
    made = {"x": rng.normal(0, 1, (rows, k)).astype(np.float32), "bias": rng.normal(0, 1, n).astype(np.float32)}
    made["packed"], = ops.run_reference("pack_quantized", [weight.values], {"format": weight.scheme.format, "tile": 64,
                                                                            "k_multiple": 32})
    for part, array in (("scales", weight.scales), ("offsets", weight.offsets)):
        if array is not None:
            made[part] = ops.run_reference("pack_scales", [array], {"tile": 64})[0] if weight.scheme.group else array
    return {v.name: made[v.name] for v in kernels.graphs[name].inputs}


@pytest.mark.parametrize("name", QUICK)
def test_matches_interpreter_and_rows_are_independent(kernels: Kernels, name: str) -> None:
    check(kernels, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_schemes_and_sizes(more: Kernels, name: str) -> None:
    check(more, name)


def check(kernels: Kernels, name: str) -> None:
    """Few rows and many take different ways to the same bits."""
    inputs = inputs_of(kernels, name, 103)
    got = kernels.check(name, inputs, {"tokens": 103})
    for row in (0, 5, 96, 102):
        single = kernels.run(name, alone(inputs, kernels.graphs[name], row), {"tokens": 1})
        for whole, one in zip(got, single, strict=True):
            assert np.array_equal(whole[row], one[0])
    for rows in (2, 3, 4, 5, 7):
        few = kernels.check(name, inputs | {"x": inputs["x"][:rows]}, {"tokens": rows})
        for whole, some in zip(got, few, strict=True):
            assert np.array_equal(whole[:rows], some)


@pytest.mark.parametrize("name", ["int8_odd", "fp8"])
def test_every_value_is_unpacked(kernels: Kernels, name: str) -> None:
    """Each value that the format has (but NaN), by one that picks it."""
    format = name.partition("_")[0]
    inputs = inputs_of(kernels, name, 3)
    n, k = CASES[name][1:3]
    inputs |= {"bias": np.zeros(n, np.float32)} if "bias" in inputs else {}
    values = np.resize(np.arange(-128, 128), n * k).astype(np.int8).reshape(n, k)
    if format == "fp8":
        values[(values.view(np.uint8) & 0x7F) == 0x7F] = 0
    inputs["packed"], = ops.run_reference("pack_quantized", [values], {"format": format, "tile": 64, "k_multiple": 32})
    for at in range(k):
        inputs["x"] = np.zeros_like(inputs["x"])
        inputs["x"][:, at] = 1
        got, want = kernels.run(name, inputs, {"tokens": 3})[0], kernels.want(name, inputs)[0]
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["x86-64-v4", "avx512-bf16", "aarch64", "riscv64"])
def test_other_chips_compile(chip: str) -> None:
    made = Bodies("matmul", QUICK)
    assert CpuTarget(find(chip)).compile_kernels(made.sources, Logits(1, 1, 1), print).files
