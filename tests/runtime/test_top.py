"""The largest logits that the device gives decide as the whole row does, and the row is there when it is asked for."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferloom.runtime.engine import Engine
from inferloom.runtime.errors import RequestError
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.scheduler import Limits
from inferloom.runtime.top import TopRows

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0}, "plain": {}, "top_k": {"top_k": 7}, "large top_k": {"top_k": 200},
    "top_p": {"top_p": 0.8}, "flat top_p": {"top_p": 0.99, "temperature": 3.0}, "min_p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7}, "cold": {"temperature": 0.01, "top_p": 0.5},
    "logprobs": {"temperature": 0, "logprobs": 3}, "drawn logprobs": {"top_k": 5, "logprobs": 2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "top_k": 5}, "bias": {"logit_bias": {3: 4.0}},
}


class Device:
    """The artifact's device; `whole`: it gives rows of logits, as one without kernels for sampling does."""

    def __init__(self, device: Any, whole: bool) -> None:
        self._device, self._whole, self.num_blocks = device, whole, device.num_blocks
        self.fetched = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def step(self, batch: Any) -> Any:
        top = self._device.step(batch)
        assert isinstance(top, TopRows)
        if self._whole:
            return np.array(top)
        return TopRows(top._keys, top._stats, self._count(top._fetch), top._runs, top._columns)

    def _count(self, fetch: Any) -> Any:
        def counted(begin: int, end: int) -> np.ndarray:
            self.fetched += 1
            return np.asarray(fetch(begin, end))

        return counted


@pytest.fixture(scope="module")
def llm(demo_bf16: Path) -> LLM:
    return LLM(demo_bf16, memory_bytes=600 * 2**20)


def test_the_same_tokens_are_sampled_as_from_whole_rows(llm: LLM) -> None:
    m = llm.manifest
    limits = Limits(512, 16, m.dims.blocks_per_seq, m.state.block_tokens, m.model.max_model_len)
    made, fetched = [], []
    for whole in (True, False):
        device = Device(llm.device, whole)
        engine = Engine(device, limits, m.model.vocab_size, seed=7)
        for i, (name, params) in enumerate(PARAMS.items()):
            engine.add_request(name, llm.encode(f"def f{i}(x):\n    return")[:30],
                               SamplingParams(max_tokens=24, ignore_eos=True, **params))
        done: dict[str, Any] = {}
        while engine.has_unfinished:
            done |= {out.request_id: out for out in engine.step()}
        assert set(done) == set(PARAMS) and not any(out.error for out in done.values())
        made.append({name: (out.outputs[0].token_ids, out.outputs[0].logprobs) for name, out in done.items()})
        fetched.append(device.fetched)
    assert made[0] == made[1]
    assert fetched[0] == 0 and fetched[1] < 10 * 24  # the others were decided by the largest


def test_rows_are_freed_with_their_last_holder() -> None:
    """What they are fetched from goes then too, without a sweep for cycles."""

    class Source:
        def fetch(self, begin: int, end: int) -> np.ndarray:
            return np.zeros((end - begin, 1), np.float32)

    source = Source()
    gone = weakref.ref(source)
    rows = TopRows(np.full((2, 1), 5 << 32 | 0x7FFFFFFF, np.int64), np.ones((2, 2), np.float32), source.fetch)
    del source
    gc.disable()
    try:
        kept = rows[1]
        assert len(list(rows)) == 2 and kept.row().shape == (1,)
        del rows
        assert gone() is not None
        del kept
        assert gone() is None
    finally:
        gc.enable()


def test_rows_are_gone_after_the_next_step(llm: LLM) -> None:
    class Kept(Device):
        def step(self, batch: Any) -> Any:
            kept.append(self._device.step(batch))
            return kept[-1]

    kept: list[TopRows] = []
    m = llm.manifest
    limits = Limits(64, 1, m.dims.blocks_per_seq, m.state.block_tokens, m.model.max_model_len)
    engine = Engine(Kept(llm.device, False), limits, m.model.vocab_size)
    engine.add_request("a", [5, 6], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    first, last = kept
    assert last[0].row()[last[0].ids[0]] == last[0].values[0]
    with pytest.raises(RequestError, match="gone after the next one"):
        first[0].row()


def test_an_array_of_rows_is_a_copy_where_one_is_asked_for() -> None:
    memory = np.arange(6, dtype=np.float32).reshape(2, 3)
    rows = TopRows(np.zeros((2, 1), np.int64), np.ones((2, 2), np.float32), lambda begin, end: memory[begin:end])
    kept, seen = np.array(rows), np.asarray(rows)
    memory[:] = -1
    assert np.array_equal(kept, np.arange(6).reshape(2, 3)) and np.array_equal(seen, memory)
