"""Tile sizes: chosen from the chip's data until they are measured.

A measured choice stands in `tuned/<chip>.json`: a list of `{"op", "dtype", "n", "k", "rows", "config", "us", ...}`,
written by `benchmarks/gpu/run.py`. `rows` is the upper end of one of `ROW_RANGES`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from inferloom.ir.types import DType
from inferloom.targets.chips import GpuChip
from inferloom.targets.triton.source import INT32_MAX, next_power_of_2

TUNED = Path(__file__).with_name("tuned")
#: Rows (least, most) that have a matmul kernel of their own.
ROW_RANGES = ((0, 16), (17, 64), (65, 256), (257, INT32_MAX))


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """Tile m x n x k of one block; `splits` blocks share the k of one tile; `group` rows of blocks run together.

    `reduce_n`: columns that one block adds up after a split. `most_rows`: rows that partial sums have room for.
    `persistent`: that many blocks take tile after tile, loaded by the tensor memory accelerator (0: a block a tile).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1
    group: int = 1
    precision: str = ""
    reduce_n: int = 1024
    most_rows: int = 64
    persistent: int = 0
    extra: tuple[tuple[str, int], ...] = ()

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that the pipeline's buffers take."""
        return (self.m + self.n) * self.k * itemsize * max(self.stages - 1, 1)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Rows (tokens x heads of a group) and keys of a tile; `splits`: the most parts a sequence is cut into."""

    m: int
    n: int
    warps: int
    stages: int
    splits: int = 1
    extra: tuple[tuple[str, int], ...] = ()


def matmul(chip: GpuChip, dtype: DType, n: int, k: int, least: int, most: int) -> list[MatmulConfig]:
    """Configurations to try in order: the measured one, the static choice, then smaller and smaller ones."""
    choices = [_static(chip, dtype, n, k, least, most)]
    if chip.tma and most > 256 and dtype is not DType.F32:
        first = replace(choices[0], stages=min(choices[0].stages, 3), persistent=chip.units)
        choices = [first, replace(first, n=first.n // 2), *choices]
    measured = _tuned(chip.name).get(("matmul", str(dtype), n, k, most))
    if measured is not None:
        choices.insert(0, MatmulConfig(**measured))
    # What breaks a limit is most often the accumulators, so tiles shrink first, then the pipeline.
    last = choices[-1]
    while last.n > 16 or last.m > 16 or last.stages > 2:
        if last.n >= last.m and last.n > 16:
            last = replace(last, n=last.n // 2)
        elif last.stages > 2:
            last = replace(last, stages=last.stages - 1)
        else:
            last = replace(last, m=last.m // 2)
        choices.append(last)
    return [c for c in choices if c.shared(dtype.itemsize) <= chip.shared]


def _static(chip: GpuChip, dtype: DType, n: int, k: int, least: int, most: int) -> MatmulConfig:
    depth = min(64 if most > 16 else 128, max(32, next_power_of_2(k)))
    nvidia = chip.driver == "cuda"
    extra: tuple[tuple[str, int], ...] = ()
    if dtype is DType.F32:
        # TF32 in three parts keeps float32's precision on the tensor cores; AMD multiplies float32 itself.
        precision = "tf32x3" if nvidia else "ieee"
        m = 16 if most <= 16 else 32
        return MatmulConfig(m, 32, 32, 4, 2, group=8 if most > 64 else 1, precision=precision)
    if chip.driver == "hip":
        extra = (("matrix_instr_nonkdim", 16),) if chip.matrix == "mfma" else ()
    if most <= 64:
        # Weights are read once whatever the tile, so many narrow blocks, each with a deep pipeline.
        m = 16 if most <= 16 else max(least - 1, most)
        width = 16
        while width < 128 and ceil(n / (width * 2)) >= 0.9 * chip.units:
            width *= 2
        if m == 64:
            width = max(width, 32)
        blocks = ceil(n / width)
        splits = 1
        while blocks * splits < 0.75 * chip.units and splits < 8 and k // (splits * 2) >= 4 * depth:
            splits *= 2
        stages = 5 if nvidia else 2
        return MatmulConfig(m, width, depth, 4, stages, splits, most_rows=most, extra=extra)
    if chip.arch == "gfx1100":
        return MatmulConfig(64, 64, 32, 4, 2, group=8)
    if most <= 256:
        return MatmulConfig(64, 128 if n >= 4096 else 64, 64, 4, 4 if nvidia else 2, group=4, extra=extra)
    if chip.matrix in ("wgmma", "tcgen05"):
        return MatmulConfig(128, 256 if n >= 4096 else 128, 64, 8, 4, group=8)
    if nvidia:
        return MatmulConfig(128, 128, 64 if chip.shared > 130_000 else 32, 8, 4, group=8)
    return MatmulConfig(128, 128, 64, 8, 2, group=8, extra=extra)


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """Tile m x n x k of rows that chose one expert."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def experts(dtype: DType) -> list[ExpertConfig]:
    """Configurations of products by expert to try in order."""
    if dtype is DType.F32:
        return [ExpertConfig(32, 32, 32, 4, 2), ExpertConfig(16, 32, 32, 4, 1)]
    return [ExpertConfig(64, 128, 64, 4, 3), ExpertConfig(64, 128, 64, 8, 2), ExpertConfig(64, 64, 64, 4, 2),
            ExpertConfig(32, 32, 32, 4, 1)]


def prefill(chip: GpuChip, dtype: DType, group: int, kv_heads: int, k_dim: int, v_dim: int) -> list[AttentionConfig]:
    """Configurations of prefill attention to try in order; tiles of m rows, m a multiple of 16."""
    wide = max(k_dim, v_dim) > 128
    if dtype is DType.F32:
        sizes = [(32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)]
    elif chip.arch == "gfx1100":
        sizes = [(64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)]
    elif chip.driver == "hip":
        sizes = [(64 if wide else 128, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)]
    elif v_dim > 256:
        sizes = [(64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)]
    else:
        sizes = [(64 if wide else 128, 64, 4 if wide else 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2),
                 (16, 32, 4, 1), (16, 16, 4, 1)]
    return [*_measured(chip, "prefill", dtype, group, kv_heads, k_dim, v_dim),
            *(AttentionConfig(m, n, warps, stages) for m, n, warps, stages in sizes)]


def decode(chip: GpuChip, dtype: DType, tokens: int, group: int, kv_heads: int, k_dim: int,
           v_dim: int) -> list[AttentionConfig]:
    """Configurations of split decode attention; enough splits that few sequences fill the chip."""
    splits = min(max(next_power_of_2(ceil(chip.units / kv_heads)), 4), 64)
    m = max(16, next_power_of_2(tokens * group))
    extra: tuple[tuple[str, int], ...] = (("waves_per_eu", 1),) if chip.matrix == "mfma" else ()
    if dtype is DType.F32:
        sizes = [(32, 4, 1), (16, 4, 1)]
    elif chip.driver == "hip":
        sizes = [(64, 4, 1), (32, 4, 1), (16, 4, 1)]
    else:
        sizes = [(64, 4, 3), (64, 4, 2), (32, 4, 2), (16, 4, 1)]
    return [*_measured(chip, "decode", dtype, group, kv_heads, k_dim, v_dim),
            *(AttentionConfig(m, n, warps, stages, splits, extra) for n, warps, stages in sizes)]


def _measured(chip: GpuChip, op: str, dtype: DType, group: int, kv_heads: int, k_dim: int, v_dim: int) -> list[AttentionConfig]:
    found = _tuned(chip.name).get((op, str(dtype), group * kv_heads, kv_heads, k_dim)) if k_dim == v_dim else None
    return [AttentionConfig(**found)] if found is not None else []


#: What an entry of a tuned file is found by, after its op and dtype.
KEYS = {"matmul": ("n", "k", "rows"), "prefill": ("q_heads", "kv_heads", "dim"), "decode": ("q_heads", "kv_heads", "dim")}


@cache
def _tuned(chip: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    path = TUNED / f"{chip}.json"
    if not path.exists():
        return {}
    return {(e["op"], e["dtype"], *(e[k] for k in KEYS[e["op"]])): e["config"] for e in json.loads(path.read_text())["entries"]}
