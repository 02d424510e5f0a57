"""AsyncLLM: streams, aborts, failures and closing."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from inferloom import LLM, AsyncLLM, SamplingParams
from inferloom.runtime.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


async def last_of(llm: AsyncLLM, prompt: str, params: SamplingParams = GREEDY) -> list[int]:
    tokens: list[int] = []
    async for output in llm.generate(prompt, params):
        now = list(output.outputs[0].token_ids)
        assert now[:len(tokens)] == tokens
        tokens = now
    assert output.finished
    return tokens


def test_many_streams_equal_one_batch(tiny_artifact: Path) -> None:
    prompts = [f"prompt {i}" * (i + 1) for i in range(6)]
    with LLM(tiny_artifact) as llm:
        want = [list(r.outputs[0].token_ids) for r in llm.generate(prompts, GREEDY)]

    async def main() -> list[list[int]]:
        async with AsyncLLM(tiny_artifact) as llm:
            return await asyncio.gather(*(last_of(llm, p) for p in prompts))

    assert asyncio.run(main()) == want


def test_leaving_a_stream_frees_its_blocks(tiny_artifact: Path) -> None:
    async def main() -> tuple[int, int]:
        async with AsyncLLM(tiny_artifact, enable_prefix_caching=False) as llm:
            before = llm._llm.engine.pool.available
            stream = llm.generate("hello", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            assert await last_of(llm, "other")
            return before, llm._llm.engine.pool.available

    before, after = asyncio.run(main())
    assert before == after


def test_abort_ends_the_stream(tiny_artifact: Path) -> None:
    async def main() -> str | None:
        async with AsyncLLM(tiny_artifact) as llm:
            reason = None
            params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            async for output in llm.generate("hello", params, request_id="mine"):
                reason = output.outputs[0].finish_reason
                await llm.abort("mine")
            return reason

    assert asyncio.run(main()) == "abort"


def test_a_refused_request_leaves_the_others_alone(tiny_artifact: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(tiny_artifact) as llm:
            good = asyncio.create_task(last_of(llm, "good"))
            with pytest.raises(RequestError, match="tokens"):
                await last_of(llm, "x" * 1000)
            assert len(await good) == 12

    asyncio.run(main())


def test_closing_ends_what_runs_and_refuses_more(tiny_artifact: Path) -> None:
    async def main() -> None:
        llm = AsyncLLM(tiny_artifact)
        running = asyncio.create_task(last_of(llm, "long", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)))
        await asyncio.sleep(0.02)
        await llm.close()
        await llm.close()
        assert len(await running) < 200
        with pytest.raises(RequestError, match="closed"):
            await last_of(llm, "more")

    asyncio.run(main())
    assert not [t for t in threading.enumerate() if t.name == "inferloom-engine"]


def test_a_broken_engine_tells_everyone(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncLLM(tiny_artifact) as llm:
            def broken() -> None:
                raise ZeroDivisionError("oops")

            monkeypatch.setattr(llm._llm.engine, "step", broken)
            with pytest.raises(ZeroDivisionError):
                await last_of(llm, "hello")

    asyncio.run(main())
