"""Models with latent attention keep the latent, nothing else, and answer as transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import inferloom
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests import zoo
from tests.models.test_architectures import _greedy, reference


@pytest.mark.parametrize("name", ["minicpm3", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_the_cache_keeps_latents(name: str, tmp_path: Path) -> None:
    config, model = zoo.config(name), reference(name, tmp_path / "model")
    path = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", max_tokens=32, max_seqs=4)
    ids = np.random.default_rng(0).integers(3, 131, 50).tolist()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)
    with LLM(path, threads=1) as llm, LLM(path, threads=1, enable_prefix_caching=False) as cold:
        state = llm.manifest.state
        (group,) = state.groups
        per_token = config.kv_lora_rank + config.qk_rope_head_dim
        assert [layer.shape for layer in group.layers] == [(1, per_token, 0)] * config.num_hidden_layers
        # 40 floats of 4 bytes are no whole number of cache lines, 16 tokens of them are.
        assert llm.manifest.memory.bytes_per_block == state.block_tokens * per_token * 4 * config.num_hidden_layers
        (answer,) = llm.generate(ids, params)
        first = list(answer.outputs[0].token_ids)
        assert first == _greedy(model, ids, 24)
        (again,) = llm.generate([*ids, *first], params)
        assert again.num_cached_tokens == 73 // state.block_tokens * state.block_tokens
        assert again.outputs == cold.generate([*ids, *first], params)[0].outputs
