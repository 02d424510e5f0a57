"""Same tokens, same bits: on the demo model, a request's logits are those of the request run alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferloom.runtime.device.base import StepBatch, check_batch
from inferloom.runtime.engine import Engine
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.request import Request
from inferloom.runtime.scheduler import Limits, Work

TRACES = 100


class Recording(Engine):
    """Keeps every row of logits that a sequence was sampled from."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows: dict[str, list[np.ndarray]] = {}

    def _sample(self, work: list[Work], logits: np.ndarray) -> Iterable[Request]:
        for item, row in zip([w for w in work if w.samples], logits, strict=True):
            self.rows.setdefault(item.sequence.request.id, []).append(row.copy())
        return super()._sample(work, logits)


class Fewer:
    """A device that offers only some of its blocks, so that requests are preempted."""

    def __init__(self, device: Any, blocks: int) -> None:
        self._device, self.num_blocks = device, blocks

    def step(self, batch: StepBatch) -> Any:
        check_batch(replace(batch, made=False), self._device.manifest, self.num_blocks)  # what the engine makes is right
        return self._device.step(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


@pytest.fixture(scope="module", params=["demo_fp32", "demo_bf16", "demo_int8", "demo_int4"])
def llm(request: pytest.FixtureRequest) -> LLM:
    path: Path = request.getfixturevalue(request.param)
    return LLM(path, memory_bytes=600 * 2**20)


def engine(llm: LLM, tokens: int, seqs: int, blocks: int, caching: bool) -> Recording:
    m = llm.manifest
    limits = Limits(tokens, seqs, m.dims.blocks_per_seq, m.state.block_tokens, m.model.max_model_len)
    return Recording(Fewer(llm.device, blocks), limits, m.model.vocab_size, None, (), caching, b"", 0)


def test_logits_are_bit_equal_to_running_alone(llm: LLM) -> None:
    text = llm.encode(Path(__file__).read_text())
    preemptions = hits = 0
    for seed in range(TRACES):
        r = random.Random(seed)
        start = r.randrange(len(text) - 200)
        requests = {}
        for i in range(r.randrange(2, 6)):
            prompt = text[start:start + r.randrange(1, 90)] + text[i * 7:i * 7 + r.randrange(1, 9)]
            requests[str(i)] = prompt, SamplingParams(temperature=r.choice([0, 1]), seed=i, ignore_eos=True,
                                                      max_tokens=r.randrange(1, 8))
        batched = engine(llm, r.choice([3, 17, 64, 300]), r.randrange(1, 5), r.randrange(5, 16), r.random() < 0.7)
        waiting = list(requests)
        while waiting or batched.has_unfinished:
            if waiting and (r.random() < 0.5 or not batched.has_unfinished):
                name = waiting.pop(0)
                batched.add_request(name, *requests[name])
            batched.step()
        preemptions += batched.stats().preemptions
        hits += batched.stats().prefix_hits
        for name, (prompt, params) in requests.items():
            alone = engine(llm, 2048, 1, 16, False)
            alone._arrivals = iter([int(name)])  # type: ignore[assignment]
            alone.add_request(name, prompt, params)
            while alone.has_unfinished:
                alone.step()
            got, want = batched.rows[name], alone.rows[name]
            assert len(got) == len(want) and all(np.array_equal(g, w) for g, w in zip(got, want, strict=True)), (
                f"trace {seed}, request {name}")
    assert preemptions > 0 and hits > 0
