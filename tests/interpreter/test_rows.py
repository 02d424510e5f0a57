"""Row kernels in the interpreter, at sizes that fill a tile and sizes that do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import DType, StateType, cast_array
from tests.interpreter.harness import unpack_state
from tests.interpreter.single import Kernels
from tests.targets.row_cases import CASES
from tests.targets.single import TOKENS, Body, aligned, alone, random_inputs, tensor

COUNTS = {"tokens": 11, "rows": 3}
STATES = {
    "f32": StateType(DType.F32, 2, 16, 16, 32), "bf16": StateType(DType.BF16, 2, 16, 32, 32),
    "f16": StateType(DType.F16, 4, 64, 64, 16), "odd": StateType(DType.F32, 3, 5, 7, 32),
    "odd_bf16": StateType(DType.BF16, 1, 6, 9, 32),
    "latent": StateType(DType.F32, 1, 40, 32, 32, latent=True),
    "latent_bf16": StateType(DType.BF16, 1, 22, 6, 32, latent=True),
}


def wide(b: Builder) -> Sequence[Value]:
    """More columns than a program takes: pieces, the last of which sticks out; and a norm over all of them."""
    x = b.input("x", tensor(TOKENS, 2500))
    return [b.emit("silu", x), b.emit("rms_norm", b.input("y", tensor(TOKENS, 1500)), eps=1e-5),
            b.emit("cast", x, dtype=DType.F16)]


def logarithm(b: Builder) -> Sequence[Value]:
    x = b.input("x", tensor(TOKENS, 48))
    return [b.emit("log", b.emit("add", b.emit("abs", x), b.scalar(0.1)))]


BODIES: dict[str, Body] = {
    **{k: v for k, v in CASES.items() if not k.startswith("lookup")}, "wide": wide, "log": logarithm}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("row", BODIES, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("name", BODIES)
def test_matches_reference(kernels: Kernels, name: str) -> None:
    inputs = random_inputs(kernels.graphs[name], COUNTS)
    got = kernels.check(name, inputs, COUNTS)
    if name in ("gather", "chain_7", "norms_40"):
        again = kernels.run(name, inputs, COUNTS, shuffle=1, padded={"tokens": 16, "rows": 8})
        assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    if name in ("norms_40", "heads_3_6"):
        single = kernels.run(name, alone(inputs, kernels.graphs[name], 4), {"tokens": 1})
        assert all(np.array_equal(a[4], b[0], equal_nan=True) for a, b in zip(got, single, strict=True))


@pytest.mark.parametrize("name", STATES)
def test_state_is_written_where_attention_reads_it(name: str, tmp_path: Path) -> None:
    type, rng = STATES[name], np.random.default_rng(0)

    def body(b: Builder) -> Sequence[Value]:
        state = b.input("state", type)
        k = b.input("k", tensor(TOKENS, type.heads, type.k_dim))
        v = None if type.latent else b.input("v", tensor(TOKENS, type.heads, type.v_dim))
        return [b.emit("kv_write", state, b.emit("mul", k, b.scalar(1.5)), v, b.input("slots", tensor(TOKENS, dtype=DType.I32)))]

    kernels = Kernels("row", {name: body}, tmp_path)
    stride, tokens, blocks = type.bytes_per_block + 128, 45, 5
    pool = aligned(blocks * stride)
    inputs = {"k": rng.standard_normal((tokens, type.heads, type.k_dim)).astype(np.float32),
              "v": rng.standard_normal((tokens, type.heads, type.v_dim)).astype(np.float32),
              "slots": rng.permutation(blocks * type.block_tokens)[:tokens].astype(np.int32)}
    (want,) = kernels.want(name, inputs | {"state": KVArrays.zeros(type, blocks)})
    assert kernels.run(name, inputs | {"state": pool}, {"tokens": tokens}, padded={"tokens": 64}) == []
    got = unpack_state(pool, type, 0, stride)
    assert np.array_equal(got.k, want.k) and np.array_equal(got.v, want.v)
    assert not pool.reshape(blocks, stride)[:, type.bytes_per_block:].any(), "written into another layer's state"


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_embeddings(dtype: DType, tmp_path: Path) -> None:
    def body(b: Builder) -> Sequence[Value]:
        ids, table = b.input("ids", tensor(TOKENS, dtype=DType.I32)), b.input("table", tensor(7, 50, dtype=dtype))
        packed = b.input("packed", tensor(7, 64, 1, 1, dtype=dtype))
        return [b.emit("embedding", ids, table), b.emit("packed_embedding", ids, packed, n=7, k=50)]

    kernels = Kernels("row", {"embeddings": body}, tmp_path)
    inputs = random_inputs(kernels.graphs["embeddings"], COUNTS)
    kernels.check("embeddings", inputs | {k: cast_array(inputs[k], dtype) for k in ("table", "packed")}, COUNTS)


def test_angles_of_late_positions(tmp_path: Path) -> None:
    """float32 angles up to 131071 radians are turned exactly."""
    def body(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, 64))
        return [b.emit("sin", x), b.emit("cos", x)]

    kernels = Kernels("row", {"turn": body}, tmp_path)
    x = (np.random.default_rng(2).random((9, 64)) * 262142 - 131071).astype(np.float32)
    sin, cos = kernels.run("turn", {"x": x}, {"tokens": 9})
    assert np.abs(sin - np.sin(x.astype(np.float64))).max() < 2e-7
    assert np.abs(cos - np.cos(x.astype(np.float64))).max() < 2e-7


def test_what_cannot_be_lowered_names_its_line(tmp_path: Path) -> None:
    def power(b: Builder) -> Sequence[Value]:
        return [b.emit("pow", b.input("x", tensor(TOKENS, 8)), b.scalar(1.5), loc="model.py:12")]

    def middle(b: Builder) -> Sequence[Value]:
        return [b.emit("sum", b.input("x", tensor(TOKENS, 4, 8, 3)), axes=(2,), loc="model.py:3")]

    with pytest.raises(UnsupportedError, match="model.py:12.*pow"):
        Kernels("row", {"k": power}, tmp_path)
    with pytest.raises(UnsupportedError, match="model.py:3.*trailing"):
        Kernels("row", {"k": middle}, tmp_path)
