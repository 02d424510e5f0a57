"""kv_write in row kernels: keys and values land where the attention kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.ir.graph import Builder, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import DType, StateType
from tests.targets.single import TOKENS, Body, aligned, tensor
from tests.targets.tvm.bodies import Kernels
from tests.targets.tvm.harness import unpack_state

BLOCK, BLOCKS = 32, 5
TYPES = {
    "f32": StateType(DType.F32, 2, 16, 16, BLOCK), "bf16": StateType(DType.BF16, 2, 16, 32, BLOCK),
    "odd": StateType(DType.F32, 3, 5, 7, BLOCK), "odd_bf16": StateType(DType.BF16, 1, 6, 9, BLOCK),
    "latent": StateType(DType.F32, 1, 40, 32, BLOCK, latent=True),
    "int8": StateType(DType.I8, 2, 16, 32, BLOCK), "odd_int8": StateType(DType.I8, 3, 5, 7, BLOCK),
    "fp8": StateType(DType.F8, 2, 16, 32, BLOCK), "odd_fp8": StateType(DType.F8, 3, 5, 7, BLOCK),
    "latent_int8": StateType(DType.I8, 1, 40, 32, BLOCK, latent=True),
    "latent_bf16": StateType(DType.BF16, 1, 22, 6, BLOCK, latent=True),
}


def body(type: StateType) -> Body:
    """Only a state comes out: the rows must be found from what goes in. Keys are scaled on their way."""

    def emit(b: Builder) -> Sequence[Value]:
        state = b.input("state", type)
        k = b.input("k", tensor(TOKENS, type.heads, type.k_dim))
        v = None if type.latent else b.input("v", tensor(TOKENS, type.heads, type.v_dim))
        slots = b.input("slots", tensor(TOKENS, dtype=DType.I32))
        return [b.emit("kv_write", state, b.emit("mul", k, b.scalar(1.5)), v, slots)]

    return emit


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("row", {name: body(type) for name, type in TYPES.items()})


@pytest.mark.parametrize("name", TYPES)
def test_written_where_the_reference_does(kernels: Kernels, name: str) -> None:
    type, rng = TYPES[name], np.random.default_rng(0)
    stride, tokens = type.bytes_per_block + 128, 45
    pool = aligned(BLOCKS * stride)
    inputs = {"k": rng.standard_normal((tokens, type.heads, type.k_dim)).astype(np.float32),
              "v": rng.standard_normal((tokens, type.heads, type.v_dim)).astype(np.float32),
              "slots": rng.permutation(BLOCKS * BLOCK)[:tokens].astype(np.int32)}
    (want,) = kernels.want(name, inputs | {"state": KVArrays.zeros(type, BLOCKS)})
    assert kernels.run(name, inputs | {"state": pool}, {"tokens": tokens}) == []
    got = unpack_state(pool, type, 0, stride)
    assert np.array_equal(got.k, want.k) and np.array_equal(got.v, want.v)
    assert not pool.reshape(BLOCKS, stride)[:, type.bytes_per_block:].any(), "written into another layer's state"
