"""AsyncLLM on the demo model: streams, cancellation, errors of one request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from inferloom.runtime.async_llm import AsyncLLM
from inferloom.runtime.errors import RequestError
from inferloom.runtime.params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_streams_grow_and_equal_the_sync_answer(demo_fp32: Path) -> None:
    async def main(llm: AsyncLLM) -> None:
        async def one(prompt: str) -> tuple[int, ...]:
            lengths, last = [], ()
            async for output in llm.generate(prompt, GREEDY):
                last = output.outputs[0].token_ids
                lengths.append(len(last))
            assert lengths == sorted(lengths) and lengths[-1] == 12
            return last

        together = await asyncio.gather(one("import os"), one("def read("), one("class A:"))
        assert await one("def read(") == together[1]

    llm = AsyncLLM(demo_fp32)
    try:
        asyncio.run(main(llm))
        llm.llm.engine.check_integrity()
    finally:
        llm.close()
        llm.close()


def test_leaving_early_aborts_and_bad_requests_stay_alone(demo_fp32: Path) -> None:
    async def main(llm: AsyncLLM) -> None:
        long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        stream = llm.generate("import os", long, request_id="a")
        await anext(stream)
        with pytest.raises(RequestError, match="in use"):
            await anext(llm.generate("x", GREEDY, request_id="a"))
        with pytest.raises(RequestError, match="vocabulary"):
            await anext(llm.generate([10**8], GREEDY))
        await stream.aclose()
        async for output in llm.generate("import sys", GREEDY):
            pass
        assert output.finished and output.outputs[0].finish_reason == "length"

    llm = AsyncLLM(demo_fp32)
    try:
        asyncio.run(main(llm))
        assert not llm.llm.engine.has_unfinished
        llm.llm.engine.check_integrity()
    finally:
        llm.close()
    with pytest.raises(RequestError, match="closed"):
        asyncio.run(anext(llm.generate("x", GREEDY)))  # type: ignore[arg-type]
