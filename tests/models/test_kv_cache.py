"""Keys and values in fewer bits: what that costs on the demo model, what it saves, and what is refused."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inferloom.compiler.build import BuildOptions
from inferloom.errors import UnsupportedError
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.device.cpu import CpuDevice
from inferloom.runtime.llm import LLM
from inferloom.targets.chips import find
from inferloom.targets.select import target_for
from tests.conftest import DEMO

CONTEXT, SCORED, WINDOWS = 256, 64, 4
#: Nats per token that a cache in 8 bits may cost.
BOUND = 0.01


def loss(path: Path, ids: list[int], change: Callable[[CpuDevice], None] = lambda device: None) -> float:
    """Mean loss of the last tokens of windows of text. `change` may change the cache of all that comes before them."""
    artifact = Artifact.open(path)
    m, total = artifact.manifest, 0.0
    size = m.state.block_tokens
    table = np.arange((CONTEXT + SCORED) // size, dtype=np.int32)[None, None]
    with CpuDevice(artifact, num_blocks=table.size) as device:
        for window in range(WINDOWS):
            text = np.array(ids[window * 500:][:CONTEXT + SCORED + 1], np.int32)
            for first, count in ((0, CONTEXT), (CONTEXT, SCORED)):
                at = np.arange(first, first + count, dtype=np.int32)
                rows = np.arange(count, dtype=np.int32)[-SCORED:]
                logits = np.asarray(device.step(StepBatch(text[at], at, at[None], np.array([0, count], np.int32),
                                                          np.array([first + count], np.int32), table, rows)))
                if first == 0:
                    change(device)
            shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
            scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            total -= scores[np.arange(SCORED), text[CONTEXT + 1:]].mean()
    return total / WINDOWS


def in_two_bits(device: CpuDevice) -> None:
    """Round all integers of an int8 cache to multiples of 64."""
    (layer, *_) = device.manifest.state.groups[0].layers
    _, dk, dv = layer.shape
    for block in range(device.num_blocks):
        data = np.frombuffer(device.read_block(block), np.int8).copy().reshape(-1, 16 * (dk + dv) + 128)
        for part in (data[:, :16 * dk], data[:, 16 * dk + 64:-64]):
            part[:] = np.clip(np.rint(part / 64) * 64, -127, 127)
        device.write_block(block, data.tobytes())


def test_eight_bits_cost_next_to_nothing_and_two_would_not(demo_bf16: Path, demo_int8_kv: Path, demo_fp8_kv: Path) -> None:
    """Measured: 3.2751 in bf16, 3.2756 in int8, 3.2722 in fp8; 3.398 with two bits left of each integer."""
    with LLM(demo_bf16, memory_bytes=300 * 2**20) as llm:
        ids = llm.encode(inspect.getsource(ast))
    base = loss(demo_bf16, ids)
    assert abs(loss(demo_int8_kv, ids) - base) < BOUND and abs(loss(demo_fp8_kv, ids) - base) < BOUND
    assert loss(demo_int8_kv, ids, in_two_bits) - base > 5 * BOUND


def test_memory_contract_counts_the_scales(demo_bf16: Path, demo_int8_kv: Path, demo_fp8_kv: Path) -> None:
    for path, dtype, each in ((demo_bf16, "bf16", lambda d: 2 * d), (demo_int8_kv, "i8", lambda d: d + 4),
                              (demo_fp8_kv, "f8", lambda d: d + 4)):
        m = Artifact.open(path).manifest
        layers = [layer for group in m.state.groups for layer in group.layers]
        wanted = [x.shape[0] * m.state.block_tokens * (each(x.shape[1]) + each(x.shape[2])) for x in layers]
        assert [x.bytes for x in layers] == wanted and {x.dtype for x in layers} == {dtype}
        assert m.memory.bytes_per_block == sum(wanted)


@pytest.mark.parametrize("chip,dtype,kv_dtype", [("cpu", "bf16", "fp4"), ("h100", "bf16", "int8")])
def test_what_a_target_lacks_is_refused(chip: str, dtype: str, kv_dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"kv_dtype '{kv_dtype}' is not supported.*choose from: bf16"):
        BuildOptions(dtype, kv_dtype=kv_dtype).check(target_for(find(chip), False))


def test_cache_key_knows_it() -> None:
    from inferloom.cache import CompileOptions, content_key

    assert content_key(DEMO, CompileOptions()) != content_key(DEMO, CompileOptions(kv_dtype="int8"))
