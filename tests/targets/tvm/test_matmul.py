"""The matmul kernel and its epilogues against the interpreter, at any number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets.single import ROWS, TOKENS, Body, alone, random_inputs, tensor
from tests.targets.tvm.bodies import Kernels


def linear(b: Builder, n: int, k: int, dtype: DType, bias: bool = False, rows: object = TOKENS,
           x: DType | None = None) -> Value:
    pair = 2 if dtype is DType.BF16 else 1
    x = b.input("x", tensor(rows, k, dtype=x or dtype))
    packed = b.input("packed", tensor(-(-n // 64), 32 * -(-k // 32) // pair, 64, pair, dtype=dtype))
    return b.emit("packed_linear", x, packed, *([b.input("bias", tensor(n))] if bias else []), n=n, k=k)


def plain(n: int, k: int, dtype: DType, bias: bool = False, x: DType | None = None) -> Body:
    return lambda b: [linear(b, n, k, dtype, bias, x=x)]


def gated(inter: int, k: int, dtype: DType) -> Body:
    """silu(gate) * up with the two interleaved, and a bias on both."""

    def body(b: Builder) -> Sequence[Value]:
        y = b.emit("reshape", linear(b, 2 * inter, k, dtype, True), shape=(TOKENS, inter // 32, 2, 32))
        gate, up = (b.emit("reshape", b.emit("slice", y, axis=2, start=i, stop=i + 1), shape=(TOKENS, inter))
                    for i in (0, 1))
        made = b.emit("mul", b.emit("silu", gate), up)
        return [b.emit("cast", made, dtype=dtype)]

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


BODIES: dict[str, Body] = {
    "f32": plain(128, 64, DType.F32), "bf16": plain(128, 64, DType.BF16), "ragged": plain(70, 40, DType.F32, True),
    "ragged_bf16": plain(130, 42, DType.BF16, True), "one_column": plain(1, 7, DType.F32),
    "deep": plain(64, 1100, DType.F32), "deep_bf16": plain(64, 1100, DType.BF16),
    "gated": gated(96, 64, DType.F32), "gated_bf16": gated(64, 64, DType.BF16), "residual": residual,
    "softcap": softcap, "mixed": plain(130, 42, DType.BF16, True, DType.F32),
    "deep_mixed": plain(64, 1100, DType.BF16, x=DType.F32),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("matmul", BODIES)


@pytest.mark.parametrize("name", BODIES)
def test_matches_interpreter_and_rows_are_independent(kernels: Kernels, name: str) -> None:
    made, dim = kernels.graphs[name], "rows" if name == "softcap" else "tokens"
    inputs = random_inputs(made, {dim: 103})
    got = kernels.check(name, inputs, {dim: 103})
    for row in (0, 5, 96, 102):
        single = kernels.run(name, alone(inputs, made, row), {dim: 1})
        for whole, one in zip(got, single, strict=True):
            assert np.array_equal(whole[row], one[0])


@pytest.mark.parametrize("name", ["ragged", "ragged_bf16", "mixed"])
def test_any_number_of_rows(kernels: Kernels, name: str) -> None:
    made = kernels.graphs[name]
    assert not kernels.run(name, random_inputs(made, {"tokens": 0}), {"tokens": 0})[0].size
    whole = random_inputs(made, {"tokens": 97})
    want = kernels.check(name, whole, {"tokens": 97})[0]
    for tokens in (*range(1, 32), 95, 96):
        some = whole | {"x": whole["x"][:tokens]}
        assert np.array_equal(kernels.run(name, some, {"tokens": tokens})[0], want[:tokens]), tokens


def test_a_chunk_is_a_tile_of_columns(kernels: Kernels) -> None:
    assert [kernels.infos[n].grid.mult for n in ("one_column", "f32", "ragged_bf16")] == [1, 2, 3]


def test_odd_inner_dimension_of_pairs_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="even inner dimension"):
        Kernels("matmul", {"k": plain(64, 33, DType.BF16)})


def test_what_cannot_follow_is_refused() -> None:
    def body(b: Builder) -> Sequence[Value]:
        return [b.emit("rms_norm", linear(b, 64, 64, DType.F32), eps=1e-5, loc="model.py:9")]

    with pytest.raises(UnsupportedError, match="model.py:9.*rms_norm"):
        Kernels("matmul", {"k": body})
