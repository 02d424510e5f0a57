"""What HTTP costs: tokens per second of a server's streams, against the engine's in this process.

    python -m inferloom.benchmarks.serve.overhead build/demo --out build/overhead.json

Both get the same prompts at once, as many as there are streams, round after round in turns. The client takes its part of the
machine, as little as it can: it reads bytes, and looks only at the last ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

from inferloom.benchmarks.machine import describe
from inferloom.benchmarks.serve.agents import serving
from inferloom.errors import InferloomError
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams


def in_process(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """Generated tokens per second."""
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return len(prompts) * tokens / (time.perf_counter() - start)


async def _stream(host: str, port: int, prompt: list[int], tokens: int) -> None:
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                       "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(body) + body)
    end = b""
    while data := await reader.read(1 << 16):
        end = (end + data)[-2000:]
    writer.close()
    if b'"completion_tokens":%d' % tokens not in end.replace(b" ", b""):
        raise InferloomError(f"a stream did not end as it should: {end[-300:].decode(errors='replace')}")


async def _streams(url: str, prompts: list[list[int]], tokens: int) -> float:
    at = urlsplit(url)
    start = time.perf_counter()
    await asyncio.gather(*(_stream(at.hostname or "", at.port or 80, prompt, tokens) for prompt in prompts))
    return len(prompts) * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--tokens", type=int, default=128, help="tokens out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes, of each")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    r = random.Random(0)
    made: dict[str, list[float]] = {"in_process": [], "server": []}
    with LLM(given.artifact, memory_bytes=given.memory) as llm, serving(
            given.artifact, "--memory", str(given.memory), "--max-queue", str(given.streams)) as url:
        for round in range(given.rounds + 1):  # the first one warms up
            for name in made:
                prompts = [[r.randrange(3, llm.artifact.manifest.model.vocab_size) for _ in range(given.prompt)]
                           for _ in range(given.streams)]
                rate = (in_process(llm, prompts, given.tokens) if name == "in_process"
                        else asyncio.run(_streams(url, prompts, given.tokens)))
                if round:
                    made[name].append(rate)
    median = {name: statistics.median(rates) for name, rates in made.items()}
    print(f"{given.streams} streams, {given.prompt} tokens in, {given.tokens} out: in process {median['in_process']:.0f} "
          f"tokens/s, server {median['server']:.0f}, {median['server'] / median['in_process']:.2f} of it")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"machine": describe(), "streams": given.streams, "prompt": given.prompt,
                                         "tokens": given.tokens, "tokens_per_second": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
