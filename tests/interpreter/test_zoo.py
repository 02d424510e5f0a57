"""Traced architectures in the interpreter: each kernel against its reference, the logits against the traced graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inferloom.compiler.passes.pack_weights import Packing
from inferloom.compiler.pipeline import Options, lower
from inferloom.compiler.report import Report
from inferloom.ir.interpret import interpret
from inferloom.ir.types import DType
from tests import zoo
from tests.compiler.graphs import paged_inputs
from tests.compiler.passes.test_zoo import random_params
from tests.interpreter.harness import Compiled, target

BLOCK = 16
#: A bias of interleaved columns; a bias by distance; norms of heads; soft-caps; an extra logit for each head.
QUICK = {"llama_tied_bias": (DType.F32, DType.F16, DType.BF16), "mpt": (DType.F16,), "qwen3": (DType.F32, DType.BF16),
         "gemma2": (DType.F16, DType.BF16), "gpt_oss": (DType.F32,)}
TOLERANCE = {DType.F32: 1e-4, DType.F16: 3e-2, DType.BF16: 0.3}


@pytest.mark.parametrize("name,dtypes", [
    *(pytest.param(n, dtypes, id=n) for n, dtypes in QUICK.items()),
    *(pytest.param(n, tuple(TOLERANCE), id=f"{n}-all", marks=pytest.mark.slow) for n in zoo.ZOO)])
def test_architecture(name: str, dtypes: tuple[DType, ...], tmp_path: Path) -> None:
    from inferloom.compiler.frontends.huggingface import trace_config

    traced, _ = trace_config(zoo.config(name))
    before = traced.imported.graph
    params = random_params(before, traced.imported.buffers)
    ids = np.random.default_rng(1).integers(0, 131, 23).astype(np.int32)
    rows = np.array([0, 9, 22], np.int32)
    (want,) = interpret(before, {"tokens": ids, "positions": np.arange(23, dtype=np.int32), "logit_rows": rows}, params)
    wanted = target().lowering
    packing = Packing(wanted.weight_tile, wanted.weight_k_multiple, dict(wanted.weight_pair))
    for dtype in dtypes:
        tolerance = TOLERANCE[dtype]
        graph = lower(before, Options(dtype, packing, wanted.gate_columns, wanted.prologue, BLOCK, 64, 4, 4), Report())
        compiled = Compiled(graph, params, tmp_path)
        whole = compiled.run(paged_inputs(graph, ids, 0, None, BLOCK, rows), check=True)
        assert np.abs(whole - want).max() <= tolerance * want.std()
        compiled.pool[:] = 0
        at, last = 0, whole
        for count in (1, 16, 5, 1):
            inputs = paged_inputs(graph, ids[at:at + count], at, None, BLOCK, np.array([count - 1]))
            last = compiled.run(inputs, shuffle=count)
            at += count
        assert np.abs(last[0] - want[2]).max() <= tolerance * want.std()
