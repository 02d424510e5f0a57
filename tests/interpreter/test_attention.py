"""Attention kernels in the interpreter: variants, groupings and head sizes; prefill, split decode and both at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import DType
from tests.interpreter.single import Kernels
from tests.targets.attention_cases import CASES, Batch, Case, body
from tests.targets.single import STORED, aligned

COLUMNS = 24
#: New tokens of each sequence, and its tokens in all: short and long, within a block and across many.
COUNTS, LENS = (1, 40, 3, 1, 9, 1, 33, 4), (700, 53, 640, 18, 300, 257, 33, 4)
GPU_CASES = {**CASES, "f16": Case(dtype=DType.F16, k_dim=32, v_dim=32),
             # As in latent attention of large models, whose sums fill the registers with few heads.
             "latent_wide": Case(32, 1, 288, 272, DType.BF16, latent=True),
             "window_bf16": replace(CASES["window"], dtype=DType.BF16), "wide_bf16": replace(CASES["wide"], dtype=DType.BF16)}

#: Whose bits are compared with those of programs in order; the others meet the reference in random order.
IN_ORDER_TOO = {"causal", "window_bf16", "chosen", "latent"}


def pack(held: KVArrays, stride: int) -> np.ndarray:
    """The pool's bytes for arrays of state: K [heads, tokens, dim] and then V of each block."""
    t = held.type
    parts = [x.reshape(-1, t.block_tokens, t.heads, x.shape[-1]).transpose(0, 2, 1, 3)
             for x in (held.k, held.v)[:1 if t.latent else 2]]
    data = np.concatenate([p.reshape(len(p), -1) for p in parts], -1)
    pool = aligned(len(data) * stride)
    pool.reshape(len(data), stride)[:, :t.bytes_per_block] = np.ascontiguousarray(data.astype(STORED[t.dtype])).view(np.uint8)
    return pool


def checked(kernels: Kernels, case: Case, batch: Batch, **options: object) -> np.ndarray:
    """The kernel's result for a batch, compared with the reference."""
    pool = {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)}
    counts = {"tokens": len(batch.q), "seqs": len(batch.lens)}
    (got,) = kernels.run("attention", batch.inputs() | pool, counts, **options)  # type: ignore[arg-type]
    (want,) = kernels.want("attention", batch.inputs() | {"state": batch.state})
    relative = {DType.F32: 1e-5, DType.F16: 2.0**-9, DType.BF16: 2.0**-7}[case.dtype]
    assert np.abs(got - want).max() <= relative * np.abs(want).max()
    return got


@pytest.mark.parametrize("name", GPU_CASES)
def test_matches_reference(name: str, tmp_path: Path) -> None:
    case = GPU_CASES[name]
    kernels = Kernels("attention", {"attention": body(case, COLUMNS)}, tmp_path)
    prefill, decode = kernels.picked.tiles
    assert prefill >= decode >= 1
    batch = Batch(case, COLUMNS, LENS, COUNTS)
    shuffled = checked(kernels, case, batch, shuffle=4, padded={"d_tiles": 8, "q_tiles": 9})
    if name in IN_ORDER_TOO:
        assert np.array_equal(shuffled, checked(kernels, case, batch))


OTHER = [("causal", "mi300x", 0), ("window_bf16", "rx7900xtx", 1), ("sinks_window", "h100", 4)]


@pytest.mark.parametrize("name,chip,level", [*OTHER, *(
    pytest.param(name, *tiles, marks=pytest.mark.slow) for name, *_ in OTHER for _, *tiles in OTHER
    if (name, *tiles) not in OTHER)])
def test_other_tiles(name: str, chip: str, level: int, tmp_path: Path) -> None:
    kernels = Kernels("attention", {"attention": body(GPU_CASES[name], COLUMNS)}, tmp_path, chip, level)
    checked(kernels, GPU_CASES[name], Batch(GPU_CASES[name], COLUMNS, LENS, COUNTS))


def test_batch_invariant_tokens_are_independent(tmp_path: Path) -> None:
    case = GPU_CASES["bf16"]
    kernels = Kernels("attention", {"attention": body(case, COLUMNS)}, tmp_path, batch_invariant=True)
    assert kernels.picked.tiles[1] == 0
    batch = Batch(case, COLUMNS, LENS, COUNTS)
    got = checked(kernels, case, batch)
    pool = {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)}
    for seq, token in ((0, 0), (1, 7), (1, 39), (4, 3)):
        (alone,) = kernels.run("attention", batch.one(seq, token) | pool, {"tokens": 1, "seqs": 1})
        assert np.array_equal(alone[0], got[batch.starts[seq] + token])


def test_pages_that_no_query_sees_are_not_read(tmp_path: Path) -> None:
    """Blocks outside the window hold NaN: had they been read, the result would be NaN."""
    case = replace(GPU_CASES["window"])
    kernels = Kernels("attention", {"attention": body(case, COLUMNS)}, tmp_path)
    batch = Batch(case, COLUMNS, LENS, COUNTS)
    for seq, (count, length) in enumerate(zip(COUNTS, LENS, strict=True)):
        first = max(length - count - 4, 0)
        tile = 32  # keys of a tile: from there on, keys may be read
        for column in range(first // tile * tile // 32):
            block = batch.tables[seq, column]
            batch.state.k[block * 32:block * 32 + 32] = batch.state.v[block * 32:block * 32 + 32] = np.nan
    (got,) = kernels.run("attention", batch.inputs() | {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)},
                         {"tokens": len(batch.q), "seqs": len(batch.lens)})
    assert np.isfinite(got).all()


def test_blocks_that_nobody_chose_are_not_read(tmp_path: Path) -> None:
    case = GPU_CASES["chosen"]
    kernels = Kernels("attention", {"attention": body(case, COLUMNS)}, tmp_path)
    batch = Batch(case, COLUMNS, LENS, COUNTS)
    want = checked(kernels, case, batch)
    batch.spoil_blocks_that_nobody_chose(case)
    (got,) = kernels.run("attention", batch.inputs() | {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)},
                         {"tokens": len(batch.q), "seqs": len(batch.lens)})
    assert np.array_equal(got, want)


@pytest.mark.parametrize(("heads", "size", "parts"), [(130, 26, 5), (128, 64, 2), (7, 7, 1)])
def test_large_groups_are_worked_on_in_parts(heads: int, size: int, parts: int, tmp_path: Path) -> None:
    case = Case(heads, 1, 16, 16, DType.BF16)
    kernels = Kernels("attention", {"attention": body(case, COLUMNS)}, tmp_path)
    assert {k.grid[2] % parts for k in kernels.picked.kernels} == {0}
    assert any(f"x {size} heads" in str(k.notes) for k in kernels.picked.kernels)
    checked(kernels, case, Batch(case, COLUMNS, LENS[:3], COUNTS[:3]))
