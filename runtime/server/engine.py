"""An engine process as the HTTP process sees it: started, fed, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.server import wire
from inferloom.runtime.server.errors import HttpError, bad_request, overloaded, unavailable
from inferloom.runtime.server.settings import ModelSettings, Settings
from inferloom.runtime.server.ticket import Ticket

BEAT = 0.25
#: Seconds without a sign of life; those come from a thread of their own, however long a step takes.
MAX_SILENCE = 30.0
#: Deaths in a row, without a token or an embedding between them, after which it is not started again.
MAX_DEATHS = 5
#: Seconds until an engine has answered for its sessions, and how many may be waiting for that.
PATIENCE = 20.0
MAX_ASKED = 64
_log = structlog.get_logger()


class EngineProcess:
    """Requests go in by `stream`, their news come out; `state` says what it is doing.

    States: "loading", "ready", "stalled" (no step for `stall_timeout`, or no sign of life), "dead" (it will be started
    again), "failed" (it died too often), "stopped".
    """

    def __init__(self, model: ModelSettings, settings: Settings,
                 observe: Callable[[Ticket, str], None] = lambda ticket, reason: None) -> None:
        self.model, self.settings, self._observe = model, settings, observe
        self.ready: wire.Ready | None = None
        self.beat: wire.Beat | None = None
        self.beaten = 0.0  # when it came
        self.deaths = 0
        self._useful = False  # whether this process has answered anything: a token, or an embedding
        self._state = "loading"
        self._tickets: dict[int, Ticket] = {}
        self._asked: dict[int, asyncio.Future[wire.Told]] = {}
        self._ids = itertools.count(1)
        self._seconds = 1.0  # that a request takes, by and large
        self._heard = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    # -- life

    async def start(self) -> None:
        """Load the artifact. ArtifactError when that fails."""
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(loaded))
        await loaded

    async def stop(self) -> None:
        """End the process; requests that still run fail."""
        self._state = "stopped"
        self._say(wire.Stop())
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 5)
            process.kill()
        if self._task is not None:
            await self._task

    async def _supervise(self, loaded: asyncio.Future[None]) -> None:
        deaths = 0
        while self._state != "stopped":
            try:
                reason = await self._live(loaded)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if not loaded.done():
                self._state = "failed"
                loaded.set_exception(ArtifactError(reason))
                return
            self._fail_all(reason)
            if self._state == "stopped":
                return
            deaths = 1 if self._useful else deaths + 1
            self.deaths += 1
            self.beat, self.ready, self._useful = None, None, False
            self._state = "failed" if deaths >= MAX_DEATHS else "dead"
            _log.error("engine died", model=self.model.names[0], reason=reason, in_a_row=deaths, state=self._state)
            if self._state == "failed":
                return
            await asyncio.sleep(min(0.1 * 4 ** (deaths - 1), 10))

    async def _live(self, loaded: asyncio.Future[None]) -> str:
        """One process from start to end; the reason of its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "inferloom.runtime.server.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        watch = asyncio.create_task(self._watch(process))
        try:
            self._heard = time.monotonic()
            self._writer.write(wire.frame(wire.Load(self.model.path, self._options(), BEAT,
                                                     self.model.trace, self.model.trace_steps)))
            return await self._read(reader, loaded)
        finally:
            watch.cancel()
            self._writer.close()
            process.kill()  # if the socket broke but the process did not end
            await asyncio.to_thread(process.wait)

    def _options(self) -> dict[str, Any]:
        m = self.model
        return {"memory_bytes": m.memory_bytes, "threads": m.threads, "gpu": m.gpu, "max_num_seqs": m.max_num_seqs,
                "max_num_batched_tokens": m.max_num_batched_tokens, "enable_prefix_caching": m.enable_prefix_caching,
                "seed": m.seed, "pin": m.pin, "ram_bytes": m.ram_bytes, "state_dir": m.state_dir,
                "disk_bytes": m.disk_bytes,
                "speculative": None if m.speculative is None else {
                    name: str(value) if isinstance(value, Path) else value for name, value in asdict(m.speculative).items()}}

    async def _read(self, reader: asyncio.StreamReader, loaded: asyncio.Future[None]) -> str:
        while True:
            try:
                (length,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
                message = wire.read_from_engine(await reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionError):
                return "the engine process ended"
            self._heard = time.monotonic()
            if isinstance(message, wire.Updates):
                self._useful = self._useful or any(map(_answers, message.items))
                for update in message.items:
                    self._deliver(update)
            elif isinstance(message, wire.Beat):
                self.beat, self.beaten = message, self._heard
            elif isinstance(message, wire.Told):
                if (answer := self._asked.get(message.id)) is not None and not answer.done():
                    answer.set_result(message)
            elif isinstance(message, wire.Refused):
                self._end(message.id, bad_request(message.message), "refused")
            elif isinstance(message, wire.Ready):
                self.ready = message
                if self._state != "stopped":
                    self._state = "ready"
                if not loaded.done():
                    loaded.set_result(None)
            else:
                return message.message

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a process that hangs: it is started again."""
        tick = min(1.0, self.settings.stall_timeout / 4)
        while True:
            before = time.monotonic()
            await asyncio.sleep(tick)
            # What this process itself has slept through (a machine that was paused) is not the engine's silence.
            self._heard += max(time.monotonic() - before - 2 * tick, 0.0)
            if self._lateness() > 2:
                _log.error("engine hangs and is killed", model=self.model.names[0])
                process.kill()
                return

    def _lateness(self) -> float:
        """How long nothing has come of it, as a share of what it may take: 1 is a stall."""
        silent = time.monotonic() - self._heard
        if self.ready is None:
            return 2 * silent / self.settings.load_timeout
        stuck = 0.0 if self.beat is None else self.beat.stuck + silent
        return max(silent / min(MAX_SILENCE, self.settings.stall_timeout), stuck / self.settings.stall_timeout)

    @property
    def state(self) -> str:
        if self._state == "ready" and self._lateness() > 1:
            return "stalled"
        return self._state

    # -- requests

    @property
    def sequences(self) -> int:
        """Sequences that were taken and are not finished."""
        return sum(t.samples for t in self._tickets.values())

    def admit(self, sequences: int) -> None:
        """HttpError 503 when the engine is not up, 429 when so many more sequences would overfill its queue."""
        state = self.state
        if state != "ready" or self.ready is None:
            raise unavailable(f"the engine of {self.model.names[0]} is {state}")
        taken = self.sequences
        if taken + sequences > self.ready.seqs + self.settings.max_queue and taken:
            wait = math.ceil(self._seconds * taken / self.ready.seqs)
            raise overloaded(f"{taken} sequences run or wait, {self.ready.seqs + self.settings.max_queue} may: try again "
                             "later", max(1, min(wait, 60)))

    async def stream(self, prompt: list[int], params: SamplingParams, priority: int = 0, salt: bytes = b"",
                     grammar: wire.Grammar | None = None, session: wire.Session | None = None,
                     pooling: str | None = None) -> AsyncIterator[wire.Update]:
        """The news of a request that was admitted, as they come; leaving the iteration early ends it in the engine.

        With a `pooling` it is one that embeds. HttpError when it fails.
        """
        if self.state != "ready":
            raise unavailable(f"the engine of {self.model.names[0]} is {self.state}")
        ticket = Ticket(next(self._ids), params.n, len(prompt))
        self._tickets[ticket.id] = ticket
        reason = "abort"
        try:
            self._say(wire.Add(ticket.id, prompt, params, priority, salt, grammar, session, pooling))
            while True:
                update = await ticket.next()
                if update.error is not None:
                    reason = "error"
                    raise HttpError(400, update.error) if update.own_fault else HttpError(
                        500, f"the request failed in the engine: {update.error}", "server_error")
                if update.finished:
                    reason = next((s.finish_reason for s in update.samples if s.finish_reason), "stop")
                    seconds = time.monotonic() - ticket.created
                    self._seconds += 0.1 * (seconds - self._seconds)
                yield update
                if update.finished:
                    return
        except HttpError:
            reason = "error"
            raise
        finally:
            if self._tickets.pop(ticket.id, None) is not None and not ticket.finished:
                self._say(wire.Abort(ticket.id))
            self._observe(ticket, reason)

    async def ask(self, what: str, owner: str, name: str = "", **more: Any) -> wire.Told:
        """What the engine says of sessions, between two of its steps. HttpError when it says nothing in time."""
        if self.state != "ready":
            raise unavailable(f"the engine of {self.model.names[0]} is {self.state}")
        if len(self._asked) >= MAX_ASKED:
            raise overloaded("too many ask for sessions at once: try again later", 1)
        number = next(self._ids)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._say(wire.Ask(number, what, owner, name, **more))
            async with asyncio.timeout(PATIENCE):
                told = await answer
        except TimeoutError:
            raise unavailable(f"the engine of {self.model.names[0]} has not answered for {PATIENCE:g} s; what was asked for "
                              "may still be done") from None
        finally:
            del self._asked[number]
        if told.error is not None:
            raise HttpError(500, f"the engine failed at it: {told.error}", "server_error")
        return told

    def _say(self, message: wire.ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    def _deliver(self, update: wire.Update) -> None:
        ticket = self._tickets.get(update.id)
        if ticket is None:
            return
        if not ticket.put(update) and not update.finished:
            self._say(wire.Abort(update.id))
            self._end(update.id, HttpError(408, "the client reads too slowly", "timeout"), "slow")

    def _end(self, number: int, error: HttpError, reason: str) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is not None:
            ticket.fail(error)

    def _fail_all(self, reason: str) -> None:
        for number in list(self._tickets):
            self._end(number, HttpError(500, f"the request was lost: {reason}", "server_error"), "error")
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(unavailable(f"the engine ended: {reason}"))


def _answers(update: wire.Update) -> bool:
    """Whether the engine has made anything of the request."""
    return update.embedding is not None or any(sample.tokens for sample in update.samples)
