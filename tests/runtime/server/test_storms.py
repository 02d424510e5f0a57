"""Many clients that leave, engines that are killed again and again, ten times more load than fits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime.server.conftest import Server
from tests.runtime.server.test_lifecycle import LONG, metric, until

pytestmark = pytest.mark.slow


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_storm_of_leaving_clients(start: Callable[..., Server]) -> None:
    """In every state, streaming or not; those that stay get what they get alone."""
    server, r = start("--max-queue", "1000"), random.Random(5)
    bodies = [LONG | {"prompt": f"def f{i}():", "max_tokens": 24, "seed": i} for i in range(8)]
    alone = [httpx.post(server.url + "/v1/completions", json=b, timeout=60).json()["choices"][0]["text"] for b in bodies]

    async def leaves(gate: asyncio.Semaphore) -> None:
        async with gate:
            data = json.dumps(r.choice(bodies) | {"max_tokens": r.choice([24, 900]), "stream": r.random() < 0.5,
                                                  "n": r.choice([1, 1, 3])}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
            writer.write((head + data)[:r.choice([10, 10_000, 10_000, 10_000])])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(r.choice([1, 1000, 100_000])), r.random() * 0.5)
            writer.transport.abort()

    async def stays(client: httpx.AsyncClient, at: int) -> bool:
        await asyncio.sleep(r.random() * 50)
        answer = await client.post(server.url + "/v1/completions", json=bodies[at], timeout=120)
        return bool(answer.json()["choices"][0]["text"] == alone[at])

    async def storm() -> list[bool]:
        gate = asyncio.Semaphore(50)
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
            return (await asyncio.gather(asyncio.gather(*(stays(client, i % 8) for i in range(100))),
                                         *(leaves(gate) for _ in range(10_000))))[0]

    assert all(asyncio.run(storm()))
    until(lambda: metric(server, "num_requests_running") + metric(server, "num_requests_waiting") == 0)
    assert metric(server, "kv_cache_usage_perc") == 0 and metric(server, "engine_restarts_total") == 0
    assert [httpx.post(server.url + "/v1/completions", json=b, timeout=60).json()["choices"][0]["text"]
            for b in bodies] == alone
    assert server.close() == 0


def test_an_engine_that_is_killed_again_and_again(start: Callable[..., Server]) -> None:
    """Every request ends with an answer or an error, and in the end all is well."""
    server, r = start(), random.Random(1)
    seen, ended = Counter[int](), False

    async def asks(client: httpx.AsyncClient) -> None:
        while not ended:
            answer = await client.post(server.url + "/v1/completions", json=LONG | {"max_tokens": 40}, timeout=30)
            seen[answer.status_code] += 1
            await asyncio.sleep(0.05 if answer.status_code == 503 else 0)

    async def kills() -> None:
        nonlocal ended
        for _ in range(12):
            before = seen[200]
            while seen[200] < before + 5:
                await asyncio.sleep(0.05)
            await asyncio.sleep(r.random() * 0.3)
            for pid in server.engines():
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.05)
        ended = True

    async def storm() -> None:
        async with httpx.AsyncClient() as client:
            await asyncio.gather(kills(), *(asks(client) for _ in range(6)))

    asyncio.run(asyncio.wait_for(storm(), 200))
    assert seen.keys() <= {200, 500, 503} and seen[200] >= 60 and seen[500] >= 12
    until(lambda: httpx.get(server.url + "/health").status_code == 200)
    assert metric(server, "engine_restarts_total") == 12 and len(server.engines()) == 1


def test_ten_times_more_than_fits(start: Callable[..., Server]) -> None:
    """What is answered stays near what can be answered, memory and files stay bounded, nobody gets nothing."""
    server = start("--max-num-seqs", "8", "--max-queue", "8")
    body = json.dumps(LONG | {"max_tokens": 32}).encode()  # by hand: a client library costs more than the server
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def load(clients: int, seconds: float) -> tuple[float, Counter[int]]:
        seen, end = Counter[int](), time.monotonic() + seconds

        async def asks() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            while time.monotonic() < end:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
                seen[status := int(head.split()[1])] += 1
                if status == 429:
                    await asyncio.sleep(int(head.partition(b"retry-after: ")[2].split()[0]) * (0.5 + random.random() / 2))
            writer.close()

        start = time.monotonic()
        await asyncio.gather(*(asks() for _ in range(clients)))
        return seen[200] / (time.monotonic() - start), seen

    async def both() -> tuple[float, float, Counter[int]]:
        await load(8, 2)
        capacity, _ = await load(8, 20)
        goodput, seen = await load(80, 120)
        return capacity, goodput, seen

    before = resident(server.process.pid), resident(server.engines()[0])
    capacity, goodput, seen = asyncio.run(both())
    assert seen.keys() == {200, 429}
    assert goodput >= 0.8 * capacity, (goodput, capacity)
    assert resident(server.process.pid) - before[0] < 64 << 20 and resident(server.engines()[0]) - before[1] < 300 << 20
    until(lambda: files(server.process.pid) < 40, 30)
    assert server.close() == 0


def test_idle_connections_are_cheap(start: Callable[..., Server]) -> None:
    server = start()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(5000, hard - 200)

    async def idle() -> None:
        async def one() -> Any:
            return await asyncio.open_connection("127.0.0.1", server.port)

        held = []
        for _ in range(0, count, 250):
            held += await asyncio.gather(*(one() for _ in range(250)))
        async with httpx.AsyncClient() as client:
            answer = await client.post(server.url + "/v1/completions", json=LONG | {"max_tokens": 4}, timeout=30)
            assert answer.status_code == 200
        assert len(held) >= count - 250
        for _, writer in held:
            writer.transport.abort()

    before = resident(server.process.pid)
    asyncio.run(idle())
    assert resident(server.process.pid) - before < count * 20_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
