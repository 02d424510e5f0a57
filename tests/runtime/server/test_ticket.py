"""News wait for their reader in bounded space, and are put together without loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.streams import merged
from inferloom.runtime.server.ticket import MAX_PENDING, Ticket
from inferloom.runtime.server.wire import (
    Add,
    Beat,
    Sample,
    Stop,
    Update,
    Updates,
    frame,
    read_from_engine,
    read_to_engine,
)


def test_what_came_meanwhile_is_one_piece_of_news() -> None:
    async def run() -> None:
        ticket = Ticket(1, 2, 3)
        ticket.put(Update(1, [Sample(0, "a", [1], [[(1, -0.5, 1)]]), Sample(1, "x", [7])], cached=4,
                          prompt_logprobs=[None, [(5, -1.0, 1)]]))
        ticket.put(Update(1, [Sample(0, "b", [2], [[(2, -0.25, 1)]], "stop", "b")], cached=4, finished=True))
        news = await ticket.next()
        assert news == Update(1, [Sample(0, "ab", [1, 2], [[(1, -0.5, 1)], [(2, -0.25, 1)]], "stop", "b"),
                                  Sample(1, "x", [7])], 4, True, prompt_logprobs=[None, [(5, -1.0, 1)]])
        assert ticket.generated == 3 and ticket.finished
        ticket.fail(HttpError(500, "gone"))
        with pytest.raises(HttpError, match="gone"):
            await ticket.next()

    asyncio.run(run())


def test_too_much_is_said_so() -> None:
    async def run() -> None:
        ticket, step = Ticket(1, 1, 3), Update(1, [Sample(0, "a", [1], [[(1, -0.5, 1)] * 19])])
        took = 0
        while ticket.put(step):
            took += 1
        assert took == MAX_PENDING // 20
        await ticket.next()
        assert ticket.put(step)

    asyncio.run(run())


def test_merged_streams_end_together() -> None:
    ended = []

    async def stream(number: int, count: int, fails: bool = False) -> AsyncIterator[Update]:
        try:
            for i in range(count):
                await asyncio.sleep(0)
                yield Update(number, [], i)
            if fails:
                raise HttpError(400, "no")
        finally:
            ended.append(number)

    async def run() -> None:
        got = [(n, u.cached) async for n, u in merged([stream(i, 5) for i in range(3)])]
        assert sorted(got) == [(n, i) for n in range(3) for i in range(5)]
        with pytest.raises(HttpError, match="no"):
            async for _ in merged([stream(0, 10**9), stream(1, 3, fails=True)]):
                pass
        async for _ in merged([stream(0, 10**9), stream(1, 10**9)]):
            break
        await asyncio.sleep(0.01)
        assert sorted(ended) == [0, 0, 0, 1, 1, 1, 2]

    asyncio.run(run())


def test_messages_survive_the_wire() -> None:
    from inferloom.runtime.params import SamplingParams
    from inferloom.runtime.server.wire import HEADER, MAX_FRAME, Grammar

    params = SamplingParams(n=2, stop=("a",), logit_bias={3: -1.5}, seed=2**64 - 1, max_tokens=None)
    for message, read in ((Add(1, [1, 2], params, -3, b"\0salt", Grammar("regex", "a+")), read_to_engine),
                          (Stop(), read_to_engine), (Beat(*range(11)), read_from_engine),
                          (Updates([Update(1, [Sample(0, "ü", [1], None, "stop", 4)])]), read_from_engine)):
        data = frame(message)  # type: ignore[arg-type]
        assert HEADER.unpack(data[:4]) == (len(data) - 4,)
        assert read(data[4:]) == message
    with pytest.raises(ValueError, match="longer than"):
        frame(Add(1, [], params, 0, b"x" * MAX_FRAME))
