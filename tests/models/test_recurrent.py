"""Models with recurrent layers: answers equal transformers', and state that was kept gives the same bits as none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import inferloom
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests import zoo
from tests.models.test_architectures import _greedy, reference

QUICK = {"bamba", "recurrent_gemma"}
HYBRIDS = [name for name in zoo.RECURRENT if name not in ("mamba", "mamba2", "rwkv")]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.RECURRENT])
def test_state_is_found_again_and_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = reference(name, tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 131, 70).tolist()
    path = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", max_tokens=32, max_seqs=4,
                             max_model_len=192)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)
    with LLM(path, threads=2) as llm, LLM(path, threads=1, enable_prefix_caching=False) as cold:
        assert "recurrent" in {g.kind for g in llm.manifest.state.groups}
        assert (name in HYBRIDS) == (len(llm.manifest.state.groups) > 1)
        block = llm.manifest.state.block_tokens
        (answer,) = llm.generate(ids, params)
        first = list(answer.outputs[0].token_ids)
        assert answer.num_cached_tokens == 0 and first == _greedy(model, ids, 24)
        # The next turn of the same conversation, among others, resumes at a block's end.
        more = [*ids, *first, 7, 8, 9]
        others = [np.random.default_rng(i).integers(3, 131, 20 + i).tolist() for i in range(2)]
        again = llm.generate([others[0], more, others[1]], params)[1]
        assert again.num_cached_tokens == (len(more) - 4) // block * block > 0
        assert again.outputs == cold.generate(more, params)[0].outputs
        # Two that part ways after the same start: neither sees what the other wrote.
        turns = [[*more, 5], [*more, 6]]
        branches = llm.generate(turns, params)
        assert all(b.num_cached_tokens for b in branches)
        assert [b.outputs for b in branches] == [cold.generate(t, params)[0].outputs for t in turns]
        llm.engine.check_integrity()
