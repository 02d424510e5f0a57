"""Whole graphs on this CPU: every kernel against the interpreter, and chunking bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.ir.types import DType
from tests.compiler.graphs import paged_inputs, random_params, tiny_llama
from tests.compiler.test_lowering import BLOCK, lowered
from tests.targets.tvm.harness import Compiled

SHAPES = {"vectors": {}, "odd": {"heads": 3, "kv_heads": 1, "dim": 24, "hidden": 72, "inter": 160, "vocab": 200, "window": 5}}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_kernels_match_interpreter_and_chunking_keeps_bits(shape: str, dtype: DType) -> None:
    source = tiny_llama(**SHAPES[shape])  # type: ignore[arg-type]
    graph = lowered(source, dtype)
    compiled = Compiled(graph, random_params(source))
    ids = np.random.default_rng(0).integers(0, 131, 40)
    inputs = paged_inputs(graph, ids, 0, None, BLOCK, np.array([0, 20, 39]))
    whole = compiled.run(inputs, check=True)
    assert np.array_equal(compiled.run(inputs), whole)
    for cut in ([1] * 40, [16, 24], [7, 1, 32]):
        compiled.pool[:] = 0
        at = 0
        for count in cut:
            rows = np.array([count - 1])
            last = compiled.run(paged_inputs(graph, ids[at:at + count], at, None, BLOCK, rows))
            at += count
        assert np.array_equal(last[0], whole[2])


@pytest.mark.parametrize("chip", ["x86-64-v3", "x86-64-v4"])
def test_other_levels_of_this_machine(chip: str) -> None:
    from inferloom.targets.chips import chips, host_features

    if not host_features().issuperset(chips()[chip].requires):
        pytest.skip(f"this machine is not {chip}")
    source = tiny_llama()
    graph = lowered(source, DType.BF16)
    compiled = Compiled(graph, random_params(source), chip=chip)
    compiled.run(paged_inputs(graph, np.arange(40), 0, None, BLOCK, np.array([39])), check=True)


@pytest.mark.parametrize("chip", ["aarch64", "riscv64"])
def test_cross_compiles(chip: str) -> None:
    from inferloom.compiler.kernels import select_kernels
    from inferloom.compiler.plan import Rows, plan_memory
    from inferloom.targets.base import Logits
    from inferloom.targets.chips import find
    from inferloom.targets.tvm.codegen import CpuTarget

    graph = lowered(tiny_llama(layers=1), DType.BF16)
    sources = select_kernels(plan_memory(graph, Rows(64, 4096))).sources
    module = CpuTarget(find(chip)).compile_kernels(sources, Logits(1, 1, 1), print)
    machine = int.from_bytes(module.files["kernels/kernels.so"][18:20], "little")
    assert module.files["kernels/kernels.so"][:4] == b"\x7fELF" and machine == {"aarch64": 183, "riscv64": 243}[chip]
