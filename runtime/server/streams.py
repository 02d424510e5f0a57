"""Several requests of one client as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from inferloom.runtime.server.wire import Update


async def merged(streams: Sequence[AsyncIterator[Update]]) -> AsyncIterator[tuple[int, Update]]:
    """News of all streams with the stream's number, as they come. One that fails, or an end to this, ends them all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:  # type: ignore[type-var]
            async for update in only:
                yield 0, update
        return
    news: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(number: int, stream: AsyncIterator[Update]) -> None:
        try:
            async with contextlib.aclosing(stream) as mine:  # type: ignore[type-var]
                async for update in mine:
                    await news.put((number, update))
            await news.put((number, None))
        except Exception as error:
            await news.put((number, error))

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        open_ = len(tasks)
        while open_:
            number, item = await news.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_ -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
