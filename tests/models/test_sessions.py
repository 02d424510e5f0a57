"""Sessions on compiled models: state that was saved by one process gives the same bits in the next."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import inferloom
from inferloom.errors import InferloomError
from inferloom.runtime.async_llm import AsyncLLM
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.models.test_architectures import reference

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=5)


def saved_by_one_and_read_by_another(artifact: Path, folder: Path, ids: list[int]) -> None:
    with LLM(artifact, threads=1, state_dir=folder) as first:
        engine = first.engine
        engine.add_request("turn", ids, GREEDY, session="agent")
        outputs = []
        while engine.has_unfinished:
            outputs += engine.step()
        said = [*ids, *outputs[-1].outputs[0].token_ids]
        outcome = engine.sessions.pause("agent", 60.0, place="disk")  # type: ignore[union-attr]
        assert (outcome.status, outcome.place) == ("deferred", "disk") and outcome.blocks > 0
    more = [*said, 5, 6, 7]
    with LLM(artifact, threads=2, state_dir=folder) as second, LLM(artifact, enable_prefix_caching=False) as cold:
        assert [s.name for s in second.engine.sessions.list()] == ["agent"]  # type: ignore[union-attr]
        (answer,) = second.generate(more, GREEDY)
        size = second.manifest.state.block_tokens
        assert answer.num_cached_tokens == (len(said) - 1) // size * size > 0
        assert answer.outputs == cold.generate(more, GREEDY)[0].outputs  # log-probabilities are equal to the bit
        second.engine.check_integrity()


def test_the_demo_model(demo_bf16: Path, tmp_path: Path) -> None:
    saved_by_one_and_read_by_another(demo_bf16, tmp_path / "state", list(range(3, 120)))


def test_a_hybrid(tmp_path: Path) -> None:
    reference("bamba", tmp_path / "model")
    path = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", max_tokens=32, max_seqs=4,
                             max_model_len=192)
    saved_by_one_and_read_by_another(path, tmp_path / "state", list(range(3, 73)))


def test_state_of_another_artifact_is_refused(demo_bf16: Path, demo_fp32: Path, tmp_path: Path) -> None:
    LLM(demo_bf16, state_dir=tmp_path).close()
    with pytest.raises(InferloomError, match="holds state of something else: identity"):
        LLM(demo_fp32, state_dir=tmp_path)
    LLM(demo_bf16, state_dir=tmp_path).close()


def test_sessions_of_the_asyncio_engine(demo_bf16: Path) -> None:
    async def talk() -> None:
        llm = AsyncLLM(demo_bf16, ram_bytes=64 << 20)
        async for _ in llm.generate(list(range(3, 90)), GREEDY, session="agent"):
            pass
        outcome = await llm.sessions(lambda sessions: sessions.pause("agent", 9.0, place="ram"))
        assert outcome.status == "accepted"
        (info,) = await llm.sessions(lambda sessions: sessions.list())
        assert info.tokens == 126 and 8 < info.leased <= 9
        with pytest.raises(InferloomError, match="no session 'other'"):
            await llm.sessions(lambda sessions: sessions.info("other"))
        llm.close()
        with pytest.raises(InferloomError, match="closed"):
            await llm.sessions(lambda sessions: sessions.list())
        off = AsyncLLM(demo_bf16, enable_prefix_caching=False)
        with pytest.raises(InferloomError, match="switched off"):
            await off.sessions(lambda sessions: sessions.list())
        off.close()

    asyncio.run(talk())
