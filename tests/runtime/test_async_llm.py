"""AsyncLLM on the demo model: streams, cancellation, errors of one request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from inferloom.runtime.async_llm import AsyncLLM
from inferloom.runtime.errors import RequestError
from inferloom.runtime.llm import LLM
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


def test_embeddings_are_those_of_the_sync_engine(tiny_embed: Path, tiny_artifact: Path) -> None:
    prompts = [list(range(n, 2 * n)) for n in (1, 30, 64, 90)] + ["import os"]
    with LLM(tiny_embed, threads=1) as sync:
        want = {(p, unit): sync.embed(prompts, p, unit) for p in ("last", "mean") for unit in (True, False)}

    async def main(llm: AsyncLLM) -> None:
        made = await asyncio.gather(*(llm.embed(prompts, *how) for how in want))
        assert all(np.array_equal(got, wanted) for got, wanted in zip(made, want.values(), strict=True))
        assert np.array_equal(await llm.embed("import os"), want["last", True][4:])
        assert (await llm.embed([])).shape == (0, 64)
        for prompt, message in (([[1], [999]], "999 is outside"), ([[1], []], "empty"), ([[1] * 257], "at most 256 fit")):
            with pytest.raises(RequestError, match=message):
                await llm.embed(prompt)
        with pytest.raises(RequestError, match="choose from: last, mean"):
            await llm.embed("a", "max")
        task = asyncio.create_task(llm.embed([[i % 200] * 250 for i in range(200)]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert np.array_equal(await llm.embed("import os"), want["last", True][4:])
        async with asyncio.timeout(10):
            while llm._live:  # the engine's thread forgets a request after its reader has heard
                await asyncio.sleep(0.001)
        assert not llm.llm.engine.has_unfinished and not llm._boxes
        with pytest.raises(RequestError, match="without --task embed"):
            await anext(llm.generate("a"))

    llm = AsyncLLM(tiny_embed, threads=1)
    try:
        asyncio.run(main(llm))
    finally:
        llm.close()
    with pytest.raises(RequestError, match="closed"):
        asyncio.run(llm.embed("a"))
    other = AsyncLLM(tiny_artifact, threads=1)
    try:
        with pytest.raises(RequestError, match="compile the model with --task embed"):
            asyncio.run(other.embed("a"))
    finally:
        other.close()
