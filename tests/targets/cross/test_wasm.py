"""The WebAssembly module of an artifact under node: a whole model's steps against this machine's."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inferloom.ir.types import DType
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import WASM_FILE
from inferloom.targets import chips
from tests.compiler.graphs import paged_inputs, random_params, tiny_llama
from tests.compiler.test_lowering import BLOCK, lowered
from tests.targets.cross.conftest import missing, steps
from tests.targets.cross.job import model_job, read_output, run_here
from tests.targets.tvm.harness import Compiled

DRIVER = Path(__file__).with_name("driver.mjs")
#: Type and weights: error of logits relative to their spread.
TOLERANCE = {("fp32", None): 1e-5, ("bf16", None): 0.05, ("fp32", "int4"): 0.15, ("fp32", "int8-g32-wo"): 1e-5}


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_kernels_without_fused_products(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same dialect and register block on this machine, kernel by kernel."""
    there = chips.find("wasm32")
    assert isinstance(there, chips.CpuChip)
    alike = replace(chips.host(), fused=there.fused, matmul_rows=there.matmul_rows, matmul_vectors=1, bf16_dot="", i8_dot="")
    monkeypatch.setitem(chips.chips(), "alike", alike)
    source = tiny_llama(layers=1)
    graph = lowered(source, dtype)
    compiled = Compiled(graph, random_params(source), chip="alike")
    compiled.run(paged_inputs(graph, np.arange(40), 0, None, BLOCK, np.array([39])), check=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,quant", TOLERANCE)
def test_step(dtype: str, quant: str | None, compiled, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    node = shutil.which("node") or missing("node")
    here, there = compiled("cpu", dtype, quant), compiled("wasm32", dtype, quant)
    batches = steps(there.manifest)
    (tmp_path / "job").write_bytes(model_job(there, batches))
    done = subprocess.run([str(node), DRIVER, there.path / WASM_FILE, tmp_path / "job", tmp_path / "out"],
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    got = read_output((tmp_path / "out").read_bytes(), there.manifest, batches)
    for g, w in zip(got, run_here(here.path, batches), strict=True):
        assert np.abs(g - w).max() <= TOLERANCE[dtype, quant] * w.std(), np.abs(g - w).max() / w.std()
    # A sequence's last logits, of chunks and beside another one, and of one prompt alone.
    assert np.array_equal(got[2][1], got[3][0])
    with pytest.raises(ArtifactError, match="wasm32, which this runtime has no device for"):
        there.check_chip()
