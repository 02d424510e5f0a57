"""`AsyncLLM`: the engine for asyncio.

One background thread owns the engine. Callers hand it requests and aborts through a queue, and each request has a
mailbox of one slot: outputs are cumulative, so a slow reader sees the newest and nothing piles up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.errors import RequestError
from inferloom.runtime.llm import LLM, Prompt, as_prompts
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.pooling import shortened
from inferloom.runtime.sessions import Sessions

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Mailbox:
    """Where one request's newest output waits for its reader; touched on the reader's event loop only."""

    loop: asyncio.AbstractEventLoop
    ready: asyncio.Event
    newest: RequestOutput | BaseException | None = None

    def put(self, item: RequestOutput | BaseException) -> None:
        """From any thread; a reader whose loop is gone needs nothing."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._set, item)

    def _set(self, item: RequestOutput | BaseException) -> None:
        self.newest = item
        self.ready.set()


class AsyncLLM:
    """`LLM` for asyncio; takes what `LLM` takes. Installs no signal handlers."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self.llm = LLM(path, **options)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._boxes: dict[str, _Mailbox] = {}  # of all open generators
        self._live: dict[str, _Mailbox] = {}  # of the engine's requests; its thread's own
        self._count, self._closed, self._freed = itertools.count(1), False, False
        self._lock = threading.Lock()  # nothing is queued behind the engine's end
        self._thread = threading.Thread(target=self._run, name="inferloom-engine", daemon=True)
        self._thread.start()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None,
                       priority: int = 0, session: str | None = None, hold: float = 0.0) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows; the last one is finished. `session` and `hold` as for the engine.

        Leaving the iteration early (or cancelling its task) aborts the request. RequestError when it cannot be
        served.
        """
        def add(name: str) -> None:
            self.llm.engine.add_request(name, self._encode(prompt), params or SamplingParams(),
                                        prompt if isinstance(prompt, str) else None, priority, session=session, hold=hold)

        async with contextlib.aclosing(self._outputs(add, request_id)) as outputs:
            async for output in outputs:
                yield output

    async def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str | None = None, normalize: bool | None = None,
                    priority: int = 0) -> NDArray[np.float32]:
        """`LLM.embed`, in the same batches as whatever else runs: f32 [prompts, hidden].

        RequestError when one of the prompts cannot be served, which ends the others, too; so does cancelling the task.
        """
        many, how = as_prompts(prompts), self.llm.manifest.embedding
        pooling, normalize = pooling or how.pooling, how.normalize if normalize is None else normalize

        async def one(number: int) -> NDArray[np.float32]:
            def add(name: str) -> None:
                self.llm.engine.add_embedding(name, self._encode(many[number]), pooling, priority)

            async with contextlib.aclosing(self._outputs(add)) as outputs:
                output = await anext(outputs)
            if output.embedding is None:
                raise RequestError(f"prompt {number} failed: {output.error}")
            return shortened(output.embedding, normalize=normalize)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i)) for i in range(len(many))]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return np.array([task.result() for task in tasks], np.float32).reshape(len(many), self.llm.manifest.output.vocab)

    async def _outputs(self, add: Callable[[str], None], request_id: str | None = None) -> AsyncGenerator[RequestOutput]:
        """The outputs of a request that `add` queues, on the engine's thread; leaving the iteration early aborts it."""
        name = request_id if request_id is not None else f"async-{next(self._count)}"
        box = _Mailbox(asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            if name in self._boxes:
                raise RequestError(f"request id {name!r} is in use")
            self._boxes[name] = box
            self._work.put(lambda: self._add(name, box, add))
        finished = False
        try:
            while not finished:
                await box.ready.wait()
                box.ready.clear()
                item, box.newest = box.newest, None
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                if item is not None:
                    finished = item.finished
                    yield item
        finally:
            with self._lock:
                self._boxes.pop(name, None)
                if not finished:
                    self._work.put(lambda: self._abort(name, box))

    async def abort(self, request_id: str) -> None:
        """End a request now; its reader gets a last output with finish_reason "abort"."""
        self._work.put(lambda: self._abort(request_id))

    async def sessions(self, work: Callable[[Sessions], T]) -> T:
        """What `work` makes of the engine's sessions, on the engine's thread between two steps. RequestError without any."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                done.set_exception(error) if error is not None else done.set_result(result)  # type: ignore[arg-type]

        def task() -> None:
            result, error = None, None
            try:
                if self.llm.engine.sessions is None:
                    raise RequestError("sessions need the prefix cache, which is switched off")
                result = work(self.llm.engine.sessions)
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever asked
                loop.call_soon_threadsafe(settle, result, error)

        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            self._work.put(task)
        return await done

    def close(self) -> None:
        """Abort what runs, stop the thread, give memory back. Closing twice is fine."""
        with self._lock:
            freed, self._freed, self._closed = self._freed, True, True
            self._work.put(None)
        self._thread.join()
        if not freed:
            self.llm.close()

    # -- the engine's thread

    def _run(self) -> None:
        engine = self.llm.engine
        while True:
            # With nothing to compute, sleep until someone asks for something.
            while not engine.has_unfinished or not self._work.empty():
                task = self._work.get()
                if task is None:
                    for name in list(self._live):
                        self._abort(name)
                    return
                task()
            try:
                outputs = engine.step()
            except BaseException as error:  # an engine that broke serves nobody; every reader must learn of it
                with self._lock:
                    self._closed = True
                    for box in self._boxes.values():
                        box.put(error)
                return
            for output in outputs:
                self._deliver(output)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.llm.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _add(self, name: str, box: _Mailbox, add: Callable[[str], None]) -> None:
        try:
            add(name)
        except Exception as error:  # the request's own: the engine goes on
            box.put(error)
        else:
            self._live[name] = box

    def _abort(self, name: str, box: _Mailbox | None = None) -> None:
        """Abort a request; only the one that `box` belongs to, if given: its name may be in use again."""
        if box is None or self._live.get(name) is box:
            output = self.llm.engine.abort(name)
            if output is not None:
                self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        self._live[output.request_id].put(output)
        if output.finished:
            del self._live[output.request_id]


__all__ = ["AsyncLLM"]
