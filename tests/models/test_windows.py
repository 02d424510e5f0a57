"""Models with windows keep few blocks, and answer as transformers does long after the window has moved on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import inferloom
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.models.test_architectures import _greedy, reference

WINDOW, BLOCK = 7, 16


@pytest.mark.parametrize("name,kinds", [("mistral", {"window_kv"}), ("gemma3_text", {"paged_kv", "window_kv"}),
                                        ("cohere2", {"paged_kv", "window_kv"})])
def test_blocks_behind_the_window_are_free(name: str, kinds: set[str], tmp_path: Path) -> None:
    model = reference(name, tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 131, 70).tolist()
    path = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", max_tokens=32, max_seqs=4,
                             block_tokens=BLOCK)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(path, threads=1) as llm:
        groups = {g.kind: g for g in llm.manifest.state.groups}
        assert set(groups) == kinds and groups["window_kv"].window == WINDOW
        whole = groups["paged_kv"].tables if "paged_kv" in groups else 0
        used: list[tuple[int, int]] = []

        def count(output: inferloom.RequestOutput) -> None:
            tokens = len(ids) + len(output.outputs[0].token_ids) - 1
            if llm.engine.scheduler.running:
                used.append((tokens, llm.engine.pool.size - llm.engine.pool.available))

        (answer,) = llm.generate(ids, params, on_output=count)
        tokens, blocks = used[-1]
        # While decoding, the window and the block that is being filled.
        kept = (WINDOW + BLOCK - 2) // BLOCK + 1
        assert tokens == 128 and blocks <= whole * -(-tokens // BLOCK) + groups["window_kv"].tables * kept
        first = list(answer.outputs[0].token_ids)
        assert first == _greedy(model, ids, 60)
        (again,) = llm.generate([*ids, *first], params)
        assert again.num_cached_tokens == 128
        with LLM(path, threads=1, enable_prefix_caching=False) as cold:
            assert again.outputs == cold.generate([*ids, *first], params)[0].outputs
