"""Differential attention keeps each key and value once, and answers as transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import inferloom
from inferloom.runtime.llm import LLM
from tests import zoo
from tests.models.test_architectures import TOLERANCE, logits, reference, relative


@pytest.mark.parametrize("name", ["diffllama", "diffllama_pairs"])
def test_the_cache_keeps_pairs_of_heads(name: str, tmp_path: Path) -> None:
    config, model = zoo.config(name), reference(name, tmp_path / "model")
    path = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", max_tokens=32, max_seqs=8)
    ids = np.random.default_rng(0).integers(3, 131, 50).tolist()
    heads, dim = config.num_key_value_heads, config.head_dim
    with LLM(path, threads=1) as llm:
        state = llm.manifest.state
        (group,) = state.groups
        assert [layer.shape for layer in group.layers] == [(heads // 2, 2 * dim, 2 * dim)] * config.num_hidden_layers
        # As much as of plain attention with as many heads; as written by the model it would be twice that.
        assert state.bytes_per_block == state.block_tokens * 2 * heads * dim * 4 * config.num_hidden_layers
        assert relative(llm.logits(ids), logits(model, ids)) <= TOLERANCE["fp32"]
