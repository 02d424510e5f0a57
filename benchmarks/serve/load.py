"""Users who come on their own time (open loop), or so many at once, each as soon as the one before is done (closed loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from inferloom.benchmarks.serve.client import Client, Timing
from inferloom.benchmarks.serve.traces import Conversation


async def run(client: Client, conversations: Sequence[Conversation], concurrency: int | None, seconds: float,
              progress: Callable[[str], None] = lambda _: None, hold: float | None = None) -> list[Timing]:
    """Timings of all turns. With a `concurrency`, arrivals do not count; after `seconds`, nothing new is asked.

    With a `hold`, each conversation is a session, and the server is asked to keep its state for so many seconds after
    every turn but the last.
    """
    made: list[Timing] = []
    client.began = time.perf_counter()
    end = client.began + seconds

    async def talk(conversation: Conversation) -> None:
        if concurrency is None:
            await asyncio.sleep(max(0.0, client.began + conversation.arrival - time.perf_counter()))
        seen = 0
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for number, turn in enumerate(conversation.turns):
            await asyncio.sleep(min(turn.pause, max(0.0, end - time.perf_counter())))
            if time.perf_counter() >= end:
                return
            messages.append({"role": "user", "content": turn.text})
            wishes: dict[str, Any] = {}
            if hold is not None:
                wishes["session_id"] = conversation.name
                if number + 1 < len(conversation.turns):
                    wishes["session_hold"] = hold
            timing = await client.ask(f"{conversation.name}/{number}", messages, turn.max_tokens, wishes)
            timing.seen = seen
            made.append(timing)
            progress(f"{len(made)} answers")
            if timing.error is not None:
                return
            messages.append({"role": "assistant", "content": timing.text})
            seen = timing.prompt_tokens + timing.tokens

    waiting = iter(conversations)

    async def worker() -> None:
        for conversation in waiting:
            await talk(conversation)

    if concurrency is None:
        await asyncio.gather(*map(talk, conversations))
    else:
        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return made
