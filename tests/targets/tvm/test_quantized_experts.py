"""Linear layers by expert over weights of few bits: against the reference, and each token as it is alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.compiler.quantization.scheme import parse
from inferloom.compiler.quantization.tensor import quantize
from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets.single import TOKENS, Body, tensor
from tests.targets.tvm.bodies import Kernels

#: scheme, experts, n, k, choices of a token, whether each has a row of x, bias.
CASES = {"int8": ("int8-wo", 5, 128, 99, 2, False, False), "int4": ("int4-g64-asym-wo", 4, 64, 192, 3, True, True)}


def body(name: str, experts: int, n: int, k: int, choices: int, each: bool, bias: bool, dtype: DType = DType.F32) -> Body:
    scheme = parse(name)

    def emit(b: Builder) -> Sequence[Value]:
        tiles = experts * n // 64
        x = b.input("x", tensor(TOKENS, choices if each else 1, k, dtype=dtype))
        packed = b.input("packed", tensor(tiles, 32 * -(-k // 32) * scheme.bits // 32, 64, 4, dtype=DType.U8))
        kind = tensor(tiles, k // scheme.group, 64, dtype=DType.F16) if scheme.group else tensor(experts * n, 1)
        scales, offsets = b.input("scales", kind), None if scheme.symmetric else b.input("offsets", kind)
        choice = b.input("choice", tensor(TOKENS, choices, dtype=DType.I32))
        extra = [b.input("bias", tensor(experts, n))] if bias else []
        return [b.emit("packed_quantized_expert_linear", x, packed, scales, offsets, choice, *extra, n=n, k=k,
                       format=scheme.format, group=scheme.group, loc="model.py:3")]

    return emit


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("experts", {name: body(*case) for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_matches_reference_whatever_others_chose(kernels: Kernels, name: str) -> None:
    scheme, experts, n, k, choices, each, _ = CASES[name]
    for count in (1, 2, 7, 60):
        rng = np.random.default_rng(count)
        weight = quantize(rng.normal(0, 1, (experts * n, k)).astype(np.float32), parse(scheme))
        made = {"x": rng.normal(0, 1, (count, choices if each else 1, k)).astype(np.float32),
                "bias": rng.normal(0, 1, (experts, n)).astype(np.float32),
                "choice": np.stack([rng.permutation(experts)[:choices] for _ in range(count)]).astype(np.int32)}
        how = {"format": weight.scheme.format, "tile": 64, "k_multiple": 32}
        made["packed"], = ops.run_reference("pack_quantized", [weight.values], how)
        for part, array in (("scales", weight.scales), ("offsets", weight.offsets)):
            if array is not None:
                made[part] = ops.run_reference("pack_scales", [array], {"tile": 64})[0] if weight.scheme.group else array
        inputs = {v.name: made[v.name] for v in kernels.graphs[name].inputs}
        got = kernels.check(name, inputs, {"tokens": count})[0]
        picked = weight.dequantize().reshape(experts, n, k)[made["choice"][0, 0]]
        np.testing.assert_allclose(got[0, 0], picked @ made["x"][0, 0] + ("bias" in inputs) * made["bias"][made["choice"][0, 0]],
                                   rtol=1e-4, atol=1e-3)
        for row in {0, count // 2, count - 1}:
            alone = inputs | {key: inputs[key][row:row + 1] for key in ("x", "choice")}
            assert np.array_equal(kernels.run(name, alone, {"tokens": 1})[0][0], got[row])


def test_narrow_activations_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="model.py:3.*float32"):
        Kernels("experts", {"k": body("int8-wo", 2, 64, 64, 1, False, False, DType.BF16)})
