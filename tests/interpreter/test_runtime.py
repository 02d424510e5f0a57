"""The whole product without a GPU: an artifact with real code objects, the launcher, the engine; where the mocked
driver is told to launch a kernel, its source runs in the interpreter on the memory that the launcher passed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import inferloom
from inferloom.runtime.device.gpu import GpuDevice
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.interpreter.driver import interpreted
from tests.runtime.toy_gpu import Mock, mock

CHIPS = {"cuda": "h100", "hip": "mi300x"}
PROMPTS = [[5, 9, 17, 30, 31, 32, 90], [7], list(range(40, 75))]


@pytest.fixture(params=["cuda", pytest.param("hip", marks=pytest.mark.slow)])
def driver(request: pytest.FixtureRequest) -> Mock:
    return mock(request.param)


def test_same_tokens_as_the_cpu(driver: Mock, tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = inferloom.compile(tiny_checkpoint, chip=CHIPS[driver.driver], dtype="fp32", out=tmp_path / "gpu",
                                 max_tokens=64, max_seqs=8)
    kernels = interpreted((artifact / "kernels" / "kernels.py").read_text(), tmp_path)
    driver.run(kernels)
    params = [SamplingParams(temperature=0, max_tokens=5), SamplingParams(top_k=20, temperature=0.8, seed=3, max_tokens=4),
              SamplingParams(top_p=0.5, temperature=0.3, seed=4, max_tokens=4)]
    with LLM(artifact) as gpu, LLM(tiny_artifact, threads=1) as cpu:
        assert isinstance(gpu.device, GpuDevice)
        got, want = (llm.generate(PROMPTS, params) for llm in (gpu, cpu))
        assert not driver.errors, driver.errors
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
        logits = gpu.logits(PROMPTS[2][:9]), cpu.logits(PROMPTS[2][:9])
        assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * logits[1].std()
    launched = {launch.name for launch in driver.log}
    assert launched <= set(kernels)
    assert {n for n in kernels if n.endswith(("_split", "_join"))} <= launched and "sample_rows" in launched
