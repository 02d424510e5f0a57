"""Matmul kernels in the interpreter: every range of rows, every epilogue, split sums, smaller tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType, Sym
from tests.interpreter.single import Kernels
from tests.targets.single import ROWS, Body, alone, random_inputs, tensor

TOKENS = Sym("tokens", 512)


def linear(b: Builder, n: int, k: int, dtype: DType, bias: bool = False, rows: object = TOKENS) -> Value:
    x = b.input("x", tensor(rows, k, dtype=dtype))
    packed = b.input("packed", tensor(n, -(-k // 16) * 16, 1, 1, dtype=dtype))
    return b.emit("packed_linear", x, packed, *([b.input("bias", tensor(n))] if bias else []), n=n, k=k)


def plain(n: int, k: int, dtype: DType, bias: bool = False) -> Body:
    return lambda b: [linear(b, n, k, dtype, bias)]


def gated(inter: int, k: int, dtype: DType) -> Body:
    """silu(gate) * up with the columns of the two in turns, and a bias on both."""

    def body(b: Builder) -> Sequence[Value]:
        y = b.emit("reshape", linear(b, 2 * inter, k, dtype, True), shape=(TOKENS, inter, 2, 1))
        gate, up = (b.emit("reshape", b.emit("slice", y, axis=2, start=i, stop=i + 1), shape=(TOKENS, inter))
                    for i in (0, 1))
        return [b.emit("cast", b.emit("mul", b.emit("silu", gate), up), dtype=dtype)]

    return body


def residual(b: Builder) -> Sequence[Value]:
    """Everything that may follow: activation, residual, scale by channel, by row and by a number, two outputs."""
    y = b.emit("gelu", linear(b, 200, 96, DType.BF16, True), approximate="tanh")
    r = b.input("r", tensor(TOKENS, 200, dtype=DType.BF16))
    h = b.emit("add", b.emit("mul", y, b.input("w", tensor(200))), b.emit("cast", r, dtype=DType.F32))
    h = b.emit("mul", h, b.input("s", tensor(TOKENS, 1)))
    return [h, b.emit("cast", b.emit("mul", h, b.scalar(0.5)), dtype=DType.BF16)]


def softcap(b: Builder) -> Sequence[Value]:
    """Capped logits of the wanted rows."""
    y = b.emit("div", linear(b, 131, 64, DType.F32, rows=ROWS), b.scalar(3.0))
    return [b.emit("mul", b.emit("tanh", y), b.scalar(3.0))]


def gathered(n: int, k: int, dtype: DType) -> Body:
    """Logits of the wanted rows, which the kernel finds itself."""

    def body(b: Builder) -> Sequence[Value]:
        x, wanted = b.input("h", tensor(TOKENS, k)), b.input("wanted", tensor(ROWS, dtype=DType.I32))
        rows = b.emit("cast", b.emit("gather_rows", x, wanted), dtype=dtype)
        packed = b.input("packed", tensor(n, -(-k // 16) * 16, 1, 1, dtype=dtype))
        return [b.emit("packed_linear", rows, packed, n=n, k=k)]

    return body


BODIES: dict[str, Body] = {
    "gathered": gathered(131, 300, DType.BF16), "gathered_f32": gathered(40, 64, DType.F32),
    "f32": plain(128, 64, DType.F32), "f16": plain(96, 64, DType.F16, True), "bf16": plain(128, 64, DType.BF16),
    "ragged": plain(70, 40, DType.F32, True), "ragged_bf16": plain(130, 42, DType.BF16, True),
    "one_column": plain(1, 7, DType.F32), "deep": plain(48, 2100, DType.BF16, True), "gated": gated(96, 64, DType.F32),
    "gated_bf16": gated(40, 2048, DType.BF16), "gated_f16": gated(40, 64, DType.F16), "residual": residual,
    "softcap": softcap,
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("matmul", BODIES, tmp_path_factory.mktemp("matmul"))


@pytest.mark.parametrize("name", BODIES)
def test_matches_reference_for_every_range_of_rows(kernels: Kernels, name: str) -> None:
    dim = "tokens" if name not in ("softcap", "gathered", "gathered_f32") else "rows"
    for count in (3, 16) if dim == "rows" else (1, 16, 17, 64, 100, 300):
        counts = {"tokens": 20, dim: count}
        kernels.check(name, random_inputs(kernels.graphs[name], counts, count, high=20), counts)


def test_long_sums_are_split(kernels: Kernels) -> None:
    split = {k.symbol for k in kernels.picked.kernels if k.symbol.endswith("_sum")}
    assert {"deep_m16_sum", "deep_m64_sum", "gated_bf16_m16_sum"} <= split
    for name in ("deep", "gated_bf16"):
        inputs = random_inputs(kernels.graphs[name], {"tokens": 5})
        got = kernels.run(name, inputs, {"tokens": 5})
        for shuffle in (1, 2):
            again = kernels.run(name, inputs, {"tokens": 5}, shuffle=shuffle, padded={"tokens": 8})
            assert np.array_equal(got[0], again[0])


@pytest.mark.parametrize("chip,level", [("mi300x", 0), ("rx7900xtx", 0), ("h100", 2), ("h100", 9)])
def test_other_tiles(chip: str, level: int, tmp_path: Path) -> None:
    kernels = Kernels("matmul", {n: BODIES[n] for n in ("ragged_bf16", "residual", "gated_bf16")}, tmp_path, chip, level)
    for name in kernels.graphs:
        for count in (7, 130):
            kernels.check(name, random_inputs(kernels.graphs[name], {"tokens": count}), {"tokens": count})


def test_batch_invariant_rows_are_independent(tmp_path: Path) -> None:
    names = ("ragged_bf16", "residual", "deep")
    kernels = Kernels("matmul", {n: BODIES[n] for n in names}, tmp_path, batch_invariant=True)
    for name in names:
        inputs = random_inputs(kernels.graphs[name], {"tokens": 130})
        got = kernels.check(name, inputs, {"tokens": 130})
        for row in (0, 77, 129):
            single = kernels.run(name, alone(inputs, kernels.graphs[name], row), {"tokens": 1})
            assert all(np.array_equal(a[row], b[0]) for a, b in zip(got, single, strict=True))


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    def normed(b: Builder) -> Sequence[Value]:
        return [b.emit("rms_norm", linear(b, 64, 64, DType.F32), eps=1e-5, loc="model.py:9")]

    def tiled(b: Builder) -> Sequence[Value]:
        x, packed = b.input("x", tensor(TOKENS, 64)), b.input("packed", tensor(1, 64, 64, 1))
        return [b.emit("packed_linear", x, packed, n=64, k=64, loc="model.py:4")]

    for body, message in ((normed, "model.py:9.*rms_norm"), (tiled, "model.py:4.*rows of weights")):
        with pytest.raises(UnsupportedError, match=message):
            Kernels("matmul", {"k": body}, tmp_path)
