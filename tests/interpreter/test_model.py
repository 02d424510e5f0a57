"""A two-layer model, kernel by kernel, in the interpreter: prefill, decode, ragged batches, any order of programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferloom.compiler.passes.pack_weights import Packing
from inferloom.compiler.pipeline import Options, lower
from inferloom.compiler.report import Report
from inferloom.ir.graph import Graph
from inferloom.ir.types import DType
from tests.compiler.graphs import paged_inputs, random_params, tiny_llama
from tests.interpreter.harness import Compiled, target

BLOCK = 32
DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16}


def lowered(dtype: str, **shape: Any) -> Graph:
    wanted = target().lowering
    packing = Packing(wanted.weight_tile, wanted.weight_k_multiple, dict(wanted.weight_pair))
    graph = tiny_llama(gate_columns=wanted.gate_columns, max_tokens=96, **shape)
    return lower(graph, Options(DTYPES[dtype], packing, wanted.gate_columns, wanted.prologue, BLOCK, 96, 4, 4), Report())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 19])
def test_every_kernel(dtype: str, window: int, tmp_path: Path) -> None:
    graph = lowered(dtype, window=window)
    compiled = Compiled(graph, random_params(graph), tmp_path)
    ids = np.random.default_rng(1).integers(0, 131, 80)
    compiled.run(paged_inputs(graph, ids[:67], 0, None, BLOCK, np.array([66, 3])), check=True)
    compiled.run(paged_inputs(graph, ids[67:79], 67, None, BLOCK, np.array([11])), check=True)
    compiled.run(paged_inputs(graph, ids[79:], 79, None, BLOCK, np.array([0])), check=True, shuffle=3)
