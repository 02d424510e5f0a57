"""The engine process: `python -m inferloom.runtime.server.worker FD`, where FD is one end of a socket pair.

The main thread runs steps. One thread reads messages, one builds grammars, one sends signs of life. When the socket
ends, so does the process, whatever it is doing: nobody is left to work for.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from inferloom.runtime.errors import InferloomError, RequestError
from inferloom.runtime.llm import LLM
from inferloom.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from inferloom.runtime.server import wire
from inferloom.runtime.speculative import SpeculativeConfig
from inferloom.runtime.structured import Grammars
from inferloom.runtime.trace import Recording

#: Failures of a request that come from what it asked for.
_OWN = ("no token is left", "grammar:")


class Worker:
    """Runs one engine for the process at the other end of `connection`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._sending = connection, threading.Lock()
        self._work: queue.SimpleQueue[wire.ToEngine | Callable[[], None]] = queue.SimpleQueue()
        self._grammar_work: queue.SimpleQueue[wire.Add] = queue.SimpleQueue()
        self._sent: dict[int, list[tuple[int, int]]] = {}  # tokens and characters of each sample that have gone out
        self._building: dict[int, bool] = {}  # requests whose grammar is being built; whether they are still wanted
        self._waits: dict[str, float] = {}  # since when requests wait for their first step
        self._queued: dict[str, float] = {}  # how long those that run have waited
        self._moved = time.monotonic()

    def run(self) -> None:
        """Serve until told to stop."""
        first = self._read()
        if not isinstance(first, wire.Load):
            raise RequestError("the first message must be to load an artifact")
        threading.Thread(target=self._listen, daemon=True).start()
        start = time.monotonic()
        drafts = first.options.pop("speculative", None)
        self._llm = LLM(first.path, **first.options, speculative=None if drafts is None else SpeculativeConfig(**drafts))
        self._engine = engine = self._llm.engine
        recording = None if first.trace is None else Recording(engine.trace, first.trace, first.trace_steps)
        self._grammars: Grammars | None = None
        self._send(wire.Ready(self._llm.device.num_blocks, engine.limits.seqs, engine.longest,
                              time.monotonic() - start))
        threading.Thread(target=self._build, daemon=True).start()
        threading.Thread(target=self._beat, args=(first.beat,), daemon=True).start()
        while True:
            while not engine.has_unfinished or not self._work.empty():
                message = self._work.get()
                self._moved = time.monotonic()
                if isinstance(message, wire.Stop):
                    if recording is not None:
                        recording.finish()
                    self._llm.close()
                    return
                self._take(message)
            before = engine.stats().steps
            outputs = engine.step()
            if recording is not None:
                recording.tick()
            if self._waits:
                self._note_starts()
            news = [self._update(output) for output in outputs]
            if engine.stats().steps != before or news:
                self._moved = time.monotonic()
            else:
                time.sleep(0.001)  # nothing could run; `stuck` grows, and the other side will act
            if news:
                self._send(wire.Updates(news))

    # -- messages

    def _take(self, message: wire.ToEngine | Callable[[], None]) -> None:
        if isinstance(message, wire.Add):
            if message.grammar is None:
                self._add(message, None)
            else:
                self._building[message.id] = True
                self._grammar_work.put(message)
        elif isinstance(message, wire.Abort):
            if message.id in self._building:
                self._building[message.id] = False
            if self._engine.abort(str(message.id)) is not None:
                self._forget(message.id)
        elif isinstance(message, wire.Ask):
            self._send(self._tell(message))
        elif callable(message):
            message()

    def _add(self, message: wire.Add, guide: Callable[[], object] | None) -> None:
        try:
            if message.pooling is not None:
                self._engine.add_embedding(str(message.id), message.prompt, message.pooling, message.priority, message.salt)
            else:
                session = message.session or wire.Session("")
                self._engine.add_request(str(message.id), message.prompt, message.params, priority=message.priority,
                                         salt=message.salt, guide=guide,  # type: ignore[arg-type]
                                         session=session.name or None, hold=session.hold, place=session.place)
        except Exception as error:  # the request's own: the engine goes on
            self._send(wire.Refused(message.id, str(error) or repr(error)))
        else:
            self._sent[message.id] = [(0, 0)] * message.params.n
            self._waits[str(message.id)] = time.monotonic()

    def _tell(self, ask: wire.Ask) -> wire.Told:
        sessions, name = self._engine.sessions, ask.owner + ask.name
        try:
            if ask.what == "list":
                found, more = ([], False) if sessions is None else sessions.newest(ask.owner, ask.most)
                return wire.Told(ask.id, True, [replace(s, name=s.name[len(ask.owner):]) for s in found], more)
            if sessions is None or name not in sessions:
                return wire.Told(ask.id, there=False)
            if ask.what == "info":
                return wire.Told(ask.id, sessions=[replace(sessions.info(name), name=ask.name)])
            if ask.what == "pause":
                return wire.Told(ask.id, outcome=sessions.pause(name, ask.seconds, returns_in=ask.returns_in, place=ask.place))
            if ask.what == "resume":
                return wire.Told(ask.id, outcome=sessions.resume(name))
            if ask.what == "close":
                return wire.Told(ask.id, there=sessions.close(name))
            raise RequestError(f"a session cannot {ask.what}")
        except Exception as error:  # whoever asked learns of it: the engine goes on
            return wire.Told(ask.id, error=str(error) or repr(error))

    def _note_starts(self) -> None:
        now = time.monotonic()
        for name in {s.request.id for s in self._engine.scheduler.running} & self._waits.keys():
            self._queued[name] = now - self._waits.pop(name)

    def _forget(self, number: int) -> None:
        self._sent.pop(number, None)
        self._waits.pop(str(number), None)
        self._queued.pop(str(number), None)

    def _built(self, message: wire.Add, guide: Callable[[], object] | str) -> None:
        if not self._building.pop(message.id):
            return
        if isinstance(guide, str):
            self._send(wire.Refused(message.id, guide))
        else:
            self._add(message, guide)

    def _update(self, output: RequestOutput) -> wire.Update:
        name = int(output.request_id)
        sent = self._sent[name]
        first = output.prompt_logprobs if not any(tokens for tokens, _ in sent) else None
        samples = []
        for sample in output.outputs:
            tokens, text = sent[sample.index]
            if len(sample.token_ids) > tokens or len(sample.text) > text or sample.finish_reason is not None:
                samples.append(_news(sample, tokens, text))
                sent[sample.index] = len(sample.token_ids), len(sample.text)
        queued = self._queued.get(output.request_id, 0.0)
        if output.finished:
            self._forget(name)
        error = output.error
        return wire.Update(name, samples, output.num_cached_tokens, output.finished, error,
                           error is not None and error.startswith(_OWN), queued,
                           None if first is None else [None if p is None else _scored(p) for p in first], output.held,
                           None if output.embedding is None else output.embedding.astype("<f4").tobytes())

    # -- the other threads

    def _listen(self) -> None:
        try:
            while True:
                self._work.put(self._read())
        except BaseException as error:  # the socket's end, or a message that makes no sense
            if not isinstance(error, EOFError | OSError):
                print(f"engine process: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)

    def _build(self) -> None:
        while True:
            message = self._grammar_work.get()
            made: Callable[[], object] | str
            try:
                assert message.grammar is not None
                made = self._maker().guide(message.grammar.kind, message.grammar.text)
            except Exception as error:
                made = str(error) or repr(error)
            self._work.put(lambda message=message, made=made: self._built(message, made))  # type: ignore[misc]

    def _maker(self) -> Grammars:
        if self._grammars is None:
            if self._llm.tokenizer is None:
                raise RequestError("structured output needs a tokenizer, and the artifact has none")
            model = self._llm.manifest.model
            self._grammars = Grammars(self._llm.tokenizer.to_str(), model.vocab_size, model.eos_token_ids)
        return self._grammars

    def _beat(self, seconds: float) -> None:
        while True:
            stats, queues = self._engine.stats(), self._engine.scheduler
            stuck = time.monotonic() - self._moved if self._engine.has_unfinished else 0.0
            self._send(wire.Beat(stuck, len(queues.running), len(queues.waiting), stats.blocks, stats.blocks_available,
                                 stats.steps, stats.tokens_computed, stats.tokens_generated, stats.preemptions,
                                 stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens, stats.blocks_cached,
                                 stats.blocks_kept, stats.batch_seqs, stats.batch_tokens, self._tiers(),
                                 self._counts()))
            before = time.monotonic()
            time.sleep(seconds)
            self._moved += max(time.monotonic() - before - 2 * seconds, 0.0)  # the process was paused: that is no stall

    def _tiers(self) -> tuple[wire.Tier, wire.Tier]:
        ram, disk = self._engine.tiers.ram, self._engine.tiers.disk
        return (wire.Tier() if ram is None else wire.Tier(ram.used, ram.capacity),
                wire.Tier() if disk is None else wire.Tier(disk.used, disk.capacity))

    def _counts(self) -> wire.Counts:
        engine, tiers, stats = self._engine, self._engine.tiers, self._engine.stats()
        return wire.Counts(0 if engine.sessions is None else len(engine.sessions), len(engine.leases), engine.leases.blocks,
                           tiers.fetched_ram, tiers.fetched_disk, 0 if tiers.writer is None else tiers.writer.failed,
                           stats.drafted, stats.accepted)

    # -- the socket

    def _read(self) -> wire.ToEngine:
        (length,) = wire.HEADER.unpack(self._exactly(wire.HEADER.size))
        if length > wire.MAX_FRAME:
            raise ValueError(f"a message of {length:,} bytes")
        return wire.read_to_engine(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _send(self, message: wire.FromEngine) -> None:
        data = wire.frame(message)
        with self._sending:
            try:
                self._socket.sendall(data)
            except OSError:
                os._exit(0)


def _news(sample: CompletionOutput, tokens: int, text: int) -> wire.Sample:
    logprobs = None if sample.logprobs is None else [_scored(p) for p in sample.logprobs[tokens:]]
    return wire.Sample(sample.index, sample.text[text:], list(sample.token_ids[tokens:]), logprobs,
                       sample.finish_reason, sample.stop_reason)


def _scored(entries: dict[int, Logprob]) -> list[wire.Scored]:
    return [(token, max(p.logprob, -9999.0), p.rank) for token, p in entries.items()]


def main() -> None:
    """Run a worker; what goes wrong while loading is told to the other side."""
    faulthandler.enable()
    # The HTTP process decides when this one ends; a Ctrl-C in the terminal goes to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker(connection)
    try:
        worker.run()
    except EOFError:
        return
    except BaseException as error:
        said = str(error) if isinstance(error, InferloomError) else f"{type(error).__name__}: {error}"
        connection.sendall(wire.frame(wire.Failed(said)))
        if not isinstance(error, InferloomError):
            raise
        sys.exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
