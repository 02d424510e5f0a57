"""Kernels over quantised weights against the interpreter: every scheme, any number of rows, odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets.single import TOKENS, Body, alone, tensor
from tests.targets.tvm.bodies import Kernels

ROWS = 103


def linear(b: Builder, n: int, k: int, format: str = "int8", group: int = 0, asym: bool = False, bias: bool = False) -> Value:
    x, scale = b.input("x", tensor(TOKENS, k, dtype=DType.I8)), b.input("scale", tensor(TOKENS, 1))
    sums = b.input("sums", tensor(TOKENS, k // group if group else 1, dtype=DType.I32))
    tiles, steps = -(-n // 64), 32 * -(-k // 32) // (8 if format == "int4" else 4)
    packed = b.input("packed", tensor(tiles, steps, 64, 4, dtype=DType.U8))
    kind = tensor(tiles, k // group, 64, dtype=DType.F16) if group else tensor(n, 1)
    scales, offsets = b.input("scales", kind), b.input("offsets", kind) if asym else None
    more = b.input("bias", tensor(n)) if bias else None
    return b.emit("packed_quantized_linear", x, scale, sums, packed, scales, offsets, more, n=n, k=k, format=format,
                  group=group)


def plain(*args: Any, **options: Any) -> Body:
    return lambda b: [linear(b, *args, **options)]


def gated(b: Builder) -> Sequence[Value]:
    """silu(gate) * up with the two interleaved, as bf16."""
    y = b.emit("reshape", linear(b, 128, 96, bias=True), shape=(TOKENS, 2, 2, 32))
    gate, up = (b.emit("reshape", b.emit("slice", y, axis=2, start=i, stop=i + 1), shape=(TOKENS, 64)) for i in (0, 1))
    return [b.emit("cast", b.emit("mul", b.emit("silu", gate), up), dtype=DType.BF16)]


def residual(b: Builder) -> Sequence[Value]:
    return [b.emit("add", linear(b, 200, 128, "int4", 32), b.input("r", tensor(TOKENS, 200)))]


BODIES: dict[str, Body] = {
    "int8": plain(128, 64), "int8_odd": plain(70, 42, bias=True), "int8_column": plain(1, 7), "int8_deep": plain(64, 2300),
    "int8_asym": plain(64, 1100, asym=True), "int8_g32": plain(96, 256, group=32),
    "int8_g128_asym": plain(96, 256, group=128, asym=True),
    "int4_channel": plain(67, 51, "int4"), "int4_channel_asym": plain(64, 64, "int4", asym=True),
    "int4_g32": plain(130, 96, "int4", 32), "int4_g32_asym": plain(64, 96, "int4", 32, asym=True, bias=True),
    "int4_g64": plain(64, 4480, "int4", 64), "int4_g64_asym": plain(33, 192, "int4", 64, asym=True),
    "int4_g128": plain(64, 256, "int4", 128), "int4_g128_asym": plain(200, 2304, "int4", 128, asym=True),
    "gated": gated, "residual": residual,
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("matmul", BODIES)


def inputs_of(kernels: Kernels, name: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Integers of the whole range, the largest in magnitude among them; sums that belong to x."""
    rng, made = np.random.default_rng(seed), {}
    (node,) = (n for n in kernels.graphs[name].nodes if n.op == "packed_quantized_linear")
    n, k, group = (int(str(node.attrs[key])) for key in ("n", "k", "group"))
    for value in kernels.graphs[name].inputs:
        shape = [d if isinstance(d, int) else rows for d in value.type.shape]  # type: ignore[union-attr]
        made[value.name] = rng.normal(0, 1, shape).astype(np.float32)
        if value.name in ("scales", "offsets"):
            made[value.name] = np.abs(made[value.name]).astype(np.float16).astype(np.float32) / 64
    x = rng.integers(-127, 128, (rows, k)).astype(np.int8)
    x[::3], x[1::5] = 127, -127
    low, high = (-8, 8) if node.attrs["format"] == "int4" else (-128, 128)
    values = rng.integers(low, high, (n, k)).astype(np.int8)
    values[::4], values[1::4] = low, high - 1
    how = {"format": node.attrs["format"], "tile": 64, "k_multiple": 32}
    made["packed"], = ops.run_reference("pack_quantized", [values], how)
    sums = x.reshape(rows, -1, group or k).sum(axis=2, dtype=np.int32)
    return made | {"x": x, "sums": sums, "scale": np.abs(made["scale"]) / 127}


@pytest.mark.parametrize("name", BODIES)
def test_matches_interpreter_and_rows_are_independent(kernels: Kernels, name: str) -> None:
    inputs = inputs_of(kernels, name, ROWS)
    got = kernels.check(name, inputs, {"tokens": ROWS})
    for row in (0, 5, 96, 102):
        single = kernels.run(name, alone(inputs, kernels.graphs[name], row), {"tokens": 1})
        for whole, one in zip(got, single, strict=True):
            assert np.array_equal(whole[row], one[0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16, 33, 97, 100])
@pytest.mark.parametrize("name", ["int8_odd", "int4_g32_asym"])
def test_any_number_of_rows(kernels: Kernels, name: str, rows: int) -> None:
    kernels.check(name, inputs_of(kernels, name, rows, rows), {"tokens": rows})


def test_sums_of_integers_are_exact(kernels: Kernels) -> None:
    """With scales of one, what comes out is the integer itself."""
    inputs = inputs_of(kernels, "int8_deep", 7)
    inputs |= {"scale": np.ones_like(inputs["scale"]), "scales": np.ones_like(inputs["scales"])}
    (got,) = kernels.run("int8_deep", inputs, {"tokens": 7})
    (want,) = kernels.want("int8_deep", inputs)
    assert np.array_equal(got, want)


def test_fp8_by_integers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no kernel of fp8 weights and int8 activations"):
        Kernels("matmul", {"k": plain(64, 64, "fp8")})


def test_narrow_activations_are_refused() -> None:
    """Weights alone are multiplied by float32."""
    def body(b: Builder) -> Sequence[Value]:
        x, packed = b.input("x", tensor(TOKENS, 64, dtype=DType.BF16)), b.input("packed", tensor(1, 16, 64, 4, dtype=DType.U8))
        return [b.emit("packed_quantized_linear", x, None, None, packed, b.input("s", tensor(64, 1)), n=64, k=64, format="int8",
                       loc="model.py:3")]

    with pytest.raises(UnsupportedError, match="model.py:3.*float32"):
        Kernels("matmul", {"k": body})
