"""The attention kernel against its NumPy reference: variants, groupings and head sizes, whole and token by token."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import LARGEST, DType
from inferloom.targets.chips import find
from inferloom.targets.tvm import isa
from inferloom.targets.tvm.attention_integers import WIDEST
from tests.targets.attention_cases import BLOCK, KV_CASES, Batch, Case, body
from tests.targets.attention_cases import CASES as SHARED
from tests.targets.single import STORED, aligned
from tests.targets.tvm.bodies import Kernels

CASES = SHARED | KV_CASES | {"widest_int8": Case(1, 1, WIDEST, 16, DType.I8)}
#: An attention kernel takes LLVM seconds.
QUICK = {"causal", "bf16", "odd_bf16", "many_queries_of_one_key", "unclamped_window", "alibi", "sinks_window", "chosen",
         "documents", "prefix", "int8", "fp8"}


def pack(held: KVArrays, stride: int) -> np.ndarray:
    """The pool's bytes for arrays of state; block b begins at b * stride."""
    t = held.type
    if t.scales:
        return pack_scaled(held, stride)
    pair = 2 if t.dtype is DType.BF16 else 1
    tiles = (len(held.k) // t.block_tokens, t.block_tokens // 16, 16, t.heads)
    k = held.k.reshape(*tiles, t.k_dim // pair, pair).transpose(0, 3, 1, 4, 2, 5).reshape(tiles[0], t.heads, tiles[1], -1)
    v = held.v.reshape(*tiles[:2], 16 // pair, pair, t.heads, t.v_dim).transpose(0, 4, 1, 2, 5, 3)
    v = v.reshape(tiles[0], t.heads, tiles[1], -1)
    data = np.concatenate([k, v], -1)
    if t.latent:
        data = held.k.reshape(*tiles, t.k_dim).transpose(0, 3, 1, 2, 4)
    stored = np.ascontiguousarray(data.astype(STORED[t.dtype]))
    pool = aligned(tiles[0] * stride)
    pool.reshape(tiles[0], stride)[:, :t.bytes_per_block] = stored.reshape(tiles[0], -1).view(np.uint8)
    return pool


def pack_scaled(held: KVArrays, stride: int) -> np.ndarray:
    t, blocks = held.type, len(held.k) // held.type.block_tokens
    parts = []
    for x, columns in ((held.k, not t.latent), *(() if t.latent else ((held.v, False),))):
        x = x.reshape(blocks, t.block_tokens // 16, 16, t.heads, -1).transpose(0, 3, 1, 2, 4)
        scale = np.abs(x).max(-1).astype(np.float32) * np.float32(1 / LARGEST[t.dtype])
        with np.errstate(invalid="ignore"):
            steps = np.nan_to_num(x / scale[..., None]).clip(-LARGEST[t.dtype], LARGEST[t.dtype])
        steps = np.rint(steps).astype(np.int8) if t.dtype is DType.I8 else steps.astype(ml_dtypes.float8_e4m3fn)
        steps = steps.swapaxes(-1, -2) if columns else steps
        parts += [np.ascontiguousarray(steps).reshape(*steps.shape[:3], -1).view(np.uint8),
                  np.ascontiguousarray(scale).view(np.uint8)]
    pool = aligned(blocks * stride)
    pool.reshape(blocks, stride)[:, :t.bytes_per_block] = np.concatenate(parts, -1).reshape(blocks, -1)
    return pool


def tiles(starts: np.ndarray) -> np.ndarray:
    return np.array([(s, t, min(16, starts[s + 1] - t)) for s in range(len(starts) - 1)
                     for t in range(starts[s], starts[s + 1], 16)], np.int32)


@cache
def compiled(name: str) -> Kernels:
    return Kernels("attention", {name: body(CASES[name])})


#: A dot product of bf16 pairs that any CPU can do, in place of the instruction.
PORTABLE = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
define linkonce_odr hidden <16 x float> @inferloom_dot_pair(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %al = shl <16 x i32> %a, splat (i32 16)
  %bl = shl <16 x i32> %b, splat (i32 16)
  %ah = and <16 x i32> %a, splat (i32 -65536)
  %bh = and <16 x i32> %b, splat (i32 -65536)
  %afl = bitcast <16 x i32> %al to <16 x float>
  %bfl = bitcast <16 x i32> %bl to <16 x float>
  %afh = bitcast <16 x i32> %ah to <16 x float>
  %bfh = bitcast <16 x i32> %bh to <16 x float>
  %t = call <16 x float> @llvm.fma.v16f32(<16 x float> %afl, <16 x float> %bfl, <16 x float> %c)
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %afh, <16 x float> %bfh, <16 x float> %t)
  ret <16 x float> %r
}
"""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_matches_reference_and_tokens_are_independent(name: str) -> None:
    check(compiled(name), name, Batch(CASES[name]))


@pytest.mark.parametrize("name", ["group_of_eight", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "chosen_bf16", "prefix_bf16", "odd_bf16", "latent_bf16", "latent_odd"))])
def test_dot_products_of_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for chips with the instruction: probabilities are bf16, keys and values are read as they lie."""
    monkeypatch.setitem(isa._BF16_DOTS, "neon", PORTABLE)
    chip = replace(find("x86-64-v3"), matmul_vectors=4, bf16_dot="neon")  # type: ignore[type-var]
    check(Kernels("attention", {name: body(CASES[name])}, chip), name, Batch(CASES[name]))


def check(kernels: Kernels, name: str, batch: Batch) -> None:
    case = CASES[name]
    # Keys and values that no token of a sequence has written may be anything.
    for table, length in zip(batch.tables, batch.lens, strict=True):
        free = slice(table[length // BLOCK] * BLOCK + length % BLOCK, (table[length // BLOCK] + 1) * BLOCK)
        batch.state.k[free] = batch.state.v[free] = np.nan
    pool = {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)}
    inputs = batch.inputs() | pool
    counts = {"tokens": len(batch.q), "seqs": 3}
    (got,) = kernels.run(name, inputs, counts, {"q_tiles": tiles(batch.starts)})
    (want,) = kernels.want(name, inputs | {"state": batch.state})
    relative = 2.0**-7 if case.stored is DType.BF16 else 1e-4 if case.dtype is DType.I8 else 1e-5
    assert np.abs(got - want).max() <= relative * np.abs(want).max()
    for seq, token in ((0, 0), (1, 0), (1, 7), (1, 20), (2, 17)):
        alone = kernels.run(name, batch.one(seq, token) | pool, {"tokens": 1, "seqs": 1},
                            {"q_tiles": np.array([[0, 0, 1]], np.int32)})
        assert np.array_equal(alone[0][0], got[batch.starts[seq] + token])


def test_the_widest_head_stays_in_range() -> None:
    """The largest integers of one sign, and keys whose sign would turn if their sums left int32."""
    name = "widest_int8"
    batch = Batch(CASES[name])
    batch.state.k[:] = np.where(np.arange(len(batch.state.k)) % 3, 1.0, -1.0)[:, None, None]
    batch.q[:] = 0.5
    check(compiled(name), name, batch)


def test_query_heads_are_split() -> None:
    """A chunk for each key head, and for every eight query heads that share one."""
    mult = {name: compiled(name).infos[name].grid.mult for name in ("causal", "many_queries_of_one_key")}
    assert mult == {"causal": 2, "many_queries_of_one_key": 3}


def test_blocks_that_nobody_chose_are_not_read() -> None:
    case, batch = CASES["chosen"], Batch(CASES["chosen"])
    counts, more = {"tokens": len(batch.q), "seqs": 3}, {"q_tiles": tiles(batch.starts)}
    stride = batch.state.type.bytes_per_block + 128
    (want,) = compiled("chosen").run("chosen", batch.inputs() | {"state": pack(batch.state, stride)}, counts, more)
    batch.spoil_blocks_that_nobody_chose(case)
    (got,) = compiled("chosen").run("chosen", batch.inputs() | {"state": pack(batch.state, stride)}, counts, more)
    assert np.array_equal(got, want)
