"""Same tokens, same bits: on the demo model, a request's logits are those of the request run alone, with drafts or not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferloom.cache import CompileOptions, compile_cached
from inferloom.runtime.device.base import StepBatch, check_batch
from inferloom.runtime.draft_model import DraftModel
from inferloom.runtime.engine import Engine
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.scheduler import Limits, Work
from inferloom.runtime.speculative import NgramProposer, Proposer, SpeculativeConfig
from tests.conftest import DEMO

TRACES = 100
#: Schemes by their names for `quant`.
WEIGHTS_ALONE = ("int8-wo", "int4-wo", "fp8")


class Recording(Engine):
    """Keeps every row of logits that a token of a sequence was sampled from."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows: dict[str, list[np.ndarray]] = {}

    def _next(self, item: Work, logits: Any, row: int, *rest: Any) -> Any:
        self.rows.setdefault(item.sequence.request.id, []).append(logits[row].row().copy())
        return super()._next(item, logits, row, *rest)


class Fewer:
    """A device that offers only some of its blocks, so that requests are preempted."""

    def __init__(self, device: Any, blocks: int) -> None:
        self._device, self.num_blocks = device, blocks

    def step(self, batch: StepBatch) -> Any:
        check_batch(replace(batch, made=False), self._device.manifest, self.num_blocks)  # what the engine makes is right
        return self._device.step(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8", "int4", "int8_kv", *(
    pytest.param(name, marks=pytest.mark.slow) for name in (*WEIGHTS_ALONE, "fp8_kv"))])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, LLM]]:
    """The demo model, and the same in another precision to draft for it."""
    names = (request.param, "fp32" if request.param == "bf16" else "bf16")
    paths = [compile_cached(DEMO, CompileOptions(quant=name)) if name in WEIGHTS_ALONE
             else request.getfixturevalue(f"demo_{name}") for name in names]
    with LLM(paths[0], memory_bytes=600 * 2**20) as llm, LLM(paths[1], memory_bytes=600 * 2**20, threads=1) as draft:
        yield llm, draft


def engine(llm: LLM, tokens: int, seqs: int, blocks: int, caching: bool, proposer: Proposer | None = None) -> Recording:
    m = llm.manifest
    limits = Limits.of(m, tokens, seqs)
    return Recording(Fewer(llm.device, blocks), limits, m.model.vocab_size, None, (), caching, b"", 0, proposer=proposer)


def drafts(kind: str, draft: LLM, count: int, caching: bool) -> Proposer | None:
    if kind == "ngram":
        return NgramProposer(SpeculativeConfig("ngram", count, prompt_lookup_min=1))
    vocabulary = draft.manifest.model.vocab_size
    return None if kind == "none" else DraftModel(draft.device, Limits.of(draft.manifest), vocabulary, vocabulary, count,
                                                  caching)


def test_logits_are_bit_equal_to_running_alone(models: tuple[LLM, LLM]) -> None:
    llm, draft = models
    text = llm.encode(Path(__file__).read_text())
    preemptions = hits = accepted = rejected = 0
    for seed in range(TRACES):
        r = random.Random(seed)
        start = r.randrange(len(text) - 200)
        requests = {}
        for i in range(r.randrange(2, 6)):
            prompt = text[start:start + r.randrange(1, 90)] + text[i * 7:i * 7 + r.randrange(1, 9)]
            requests[str(i)] = prompt, SamplingParams(temperature=r.choice([0, 1]), seed=i, ignore_eos=True,
                                                      max_tokens=r.randrange(1, 16))
        proposer = drafts(r.choice(["none", "ngram", "model"]), draft, r.randrange(1, 5), r.random() < 0.5)
        batched = engine(llm, r.choice([3, 17, 64, 300]), r.randrange(1, 5), r.randrange(5, 9), r.random() < 0.7, proposer)
        waiting = list(requests)
        while waiting or batched.has_unfinished:
            if waiting and (r.random() < 0.5 or not batched.has_unfinished):
                name = waiting.pop(0)
                batched.add_request(name, *requests[name])
            batched.step()
        stats = batched.stats()
        preemptions, hits = preemptions + stats.preemptions, hits + stats.prefix_hits
        accepted, rejected = accepted + stats.accepted, rejected + stats.drafted - stats.accepted
        for name, (prompt, params) in requests.items():
            alone = engine(llm, 2048, 1, 16, False)
            alone._arrivals = iter([int(name)])  # type: ignore[assignment]
            alone.add_request(name, prompt, params)
            while alone.has_unfinished:
                alone.step()
            got, want = batched.rows[name], alone.rows[name]
            assert len(got) == len(want) and all(np.array_equal(g, w) for g, w in zip(got, want, strict=True)), (
                f"trace {seed}, request {name}")
    assert preemptions > 0 and hits > 0 and accepted > 50 and rejected > 50


def test_logits_do_not_depend_on_threads(demo_bf16: Path) -> None:
    made = []
    for threads in (1, 2, 3, 8, 64):
        with LLM(demo_bf16, memory_bytes=600 * 2**20, threads=threads, pin=threads == 3) as llm:
            recording = engine(llm, 48, 4, 64, False)
            for i in range(4):
                recording.add_request(str(i), llm.encode(Path(__file__).read_text()[100 * i:100 * i + 150]),
                                      SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
            while recording.has_unfinished:
                recording.step()
            made.append(recording.rows)
    assert all(len(rows) == 6 for rows in made[0].values())
    for rows in made[1:]:
        assert rows.keys() == made[0].keys()
        for name, expected in made[0].items():
            np.testing.assert_array_equal(rows[name], expected)
