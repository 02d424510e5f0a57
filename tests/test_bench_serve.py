"""Load on a server: what is asked, what is timed, and what a report makes of it."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inferloom.benchmarks.serve import load, report, traces
from inferloom.benchmarks.serve.client import Client, Timing
from inferloom.cli.app import app


class Server:
    """Streams `words` words a request, `gap` seconds apart; every `refuse`-th gets 429, every `cut`-th is cut off."""

    def __init__(self, words: int = 3, gap: float = 0.005, refuse: int = 0, cut: int = 0) -> None:
        self.words, self.gap, self.refuse, self.cut = words, gap, refuse, cut
        self.bodies: list[dict[str, Any]] = []
        self.open = self.most = 0
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        ready.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            data = json.dumps({"data": [{"id": "toy"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        else:
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await self._answer(json.loads(await reader.readexactly(length)), writer)
        await writer.drain()
        writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        self.open += 1
        self.most = max(self.most, self.open)
        number = len(self.bodies)
        try:
            if self.refuse and number % self.refuse == 0:
                writer.write(b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nContent-Length: 4\r\n\r\nfull")
                return
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n: waiting\n\n")
            for i in range(self.words):
                await asyncio.sleep(self.gap)
                text = f"w{i} "
                choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
                writer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                if self.cut and number % self.cut == 0:
                    writer.write(b"data: {\n\n")
                    return
            usage = {"prompt_tokens": 10, "completion_tokens": self.words, "prompt_tokens_details": {"cached_tokens": 4}}
            writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        finally:
            self.open -= 1

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def ask(server: Server, conversations: list[traces.Conversation], endpoint: str = "completions", concurrency: int | None = 4,
        seconds: float = 60.0) -> list[Timing]:
    async def run() -> list[Timing]:
        client = Client(server.url, "toy", endpoint)
        try:
            return await load.run(client, conversations, concurrency, seconds)
        finally:
            await client.close()

    return asyncio.run(run())


def test_traces_are_made_of_a_seed() -> None:
    assert traces.chat(20, seed=3) == traces.chat(20, seed=3) != traces.chat(20, seed=4)
    arrivals = [c.arrival for c in traces.chat(2000, rate=5.0)]
    assert arrivals == sorted(arrivals) and arrivals[-1] / 2000 == pytest.approx(0.2, rel=0.1)
    agents = traces.agent(200, turns=30, speed=2.0)
    assert len({a.system for a in agents}) == 1 and {len(a.turns) for a in agents} == {30}
    pauses = [t.pause for a in agents for t in a.turns[1:]]
    assert statistics.median(pauses) == pytest.approx(5.2 / 2, rel=0.1)
    assert report.percentile(pauses, 99) == pytest.approx(81 / 2, rel=0.2)
    assert all(a.turns[0].pause == 0 for a in agents)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_conversation_goes_on_from_what_was_said(server: Server, endpoint: str) -> None:
    turns = (traces.Turn("one", 5, 0.0), traces.Turn("two", 6, 0.0))
    first, second = ask(server, [traces.Conversation("u", "be brief", turns)], endpoint)
    assert (first.name, first.text, first.tokens, first.cached, len(first.gaps)) == ("u/0", "w0 w1 w2 ", 3, 4, 2)
    assert first.first is not None and 0 < first.first < first.whole and second.start > first.start
    assert [b["max_tokens"] for b in server.bodies] == [5, 6] and server.bodies[0]["stream_options"] == {"include_usage": True}
    last = server.bodies[1]
    said = last["prompt"] if endpoint == "completions" else "\n".join(m["content"] for m in last["messages"]) + "\n"
    assert said == "be brief\none\nw0 w1 w2 \ntwo\n"


def test_loops(server: Server) -> None:
    people = [traces.Conversation(str(i), "", (traces.Turn("a", 1, 0.0),), arrival=i * 0.02) for i in range(12)]
    assert len(ask(server, people, concurrency=3)) == 12 and server.most == 3
    timings = ask(server, people, concurrency=None)
    assert sorted(t.start for t in timings)[-1] >= 11 * 0.02
    late = traces.Conversation("late", "", (traces.Turn("a", 1, 0.0), traces.Turn("b", 1, 1000.0)))
    assert len(ask(server, [late], seconds=0.2)) == 1


def test_sessions_are_held_until_their_last_turn(server: Server) -> None:
    turns = (traces.Turn("one", 5, 0.0), traces.Turn("two", 6, 0.0))

    async def run() -> list[Timing]:
        client = Client(server.url, "toy", "completions")
        try:
            return await load.run(client, [traces.Conversation("u", "", turns)], 1, 60.0, hold=30.0)
        finally:
            await client.close()

    timings = asyncio.run(run())
    assert [(b["session_id"], b.get("session_hold")) for b in server.bodies] == [("u", 30.0), ("u", None)]
    assert [t.seen for t in timings] == [0, 13]
    assert report.summary(timings, report.Slo(1, 1))["recomputed_tokens"] == 9


def test_errors_are_counted_and_end_their_conversation() -> None:
    for options, kind in (({"refuse": 2}, "429"), ({"cut": 2}, "JSONDecodeError"),
                          ({"words": 0}, "the stream ended without a token")):
        server = Server(**options)  # type: ignore[arg-type]
        people = [traces.Conversation(str(i), "", (traces.Turn("a", 1, 0.0),) * 2) for i in range(4)]
        made = report.summary(ask(server, people, concurrency=1), report.Slo(1.0, 1.0))
        assert made["errors"] == {kind: 4} and made["answers"] == (0 if "words" in options else 4)
        assert made["met_slo"] == made["answers"] / (made["answers"] + 4)
        server.stop()


def test_a_summary() -> None:
    timings = [Timing(str(i), start=i, first=0.5 * (i + 1), gaps=[0.1, 0.3], whole=2.0, tokens=3, prompt_tokens=10, cached=5)
               for i in range(4)] + [Timing("x", start=0.0, whole=9.0, error="429 full", status=429)]
    made = report.summary(timings, report.Slo(first=1.0, gap=0.25))
    assert made["seconds"] == 9.0 and made["answers"] == 4 and made["errors"] == {"429": 1}
    assert made["tokens_per_second"] == 12 / 9 and made["goodput"] == 2 / 9 and made["met_slo"] == 0.4
    assert made["first_token"] == {"p50": 1.25, "p90": pytest.approx(1.85), "p99": pytest.approx(1.985), "mean": 1.25}
    assert made["between_tokens"]["p50"] == pytest.approx(0.2) and made["computed_prompt_tokens"] == 20
    assert report.summary([], report.Slo(1, 1))["answers"] == 0
    assert not report.Slo(1.0, 0.15).met(timings[0]) and report.Slo(1.0, 0.25).met(timings[0])


def test_the_command(server: Server, tmp_path: Path) -> None:
    arguments = ["bench-serve", "--base-url", server.url, "--users", "3", "--trace", "agent", "--turns", "2", "--speed", "1000",
                 "--concurrency", "2", "--json", "--out", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["model"] == "toy" and made["answers"] == 6 and made["cached_tokens"] == 24
    assert made["recomputed_tokens"] == 27 and made["session_hold"] is None
    assert len(json.loads((tmp_path / "run.json").read_text())["timings"]) == 6
    assert "first token" in (tmp_path / "run.svg").read_text() or (tmp_path / "run.svg").stat().st_size > 1000
    shown = CliRunner().invoke(app, [a for a in arguments if a != "--json"])
    assert "goodput" in shown.output and "first token" in shown.output


@pytest.mark.parametrize("arguments, message", [
    (["--rate", "1", "--concurrency", "2"], "exclude each other"), (["--trace", "x"], "--trace is chat or agent"),
    (["--scale", "0"], "must be more than 0"), (["--base-url", "http://127.0.0.1:9"], "cannot be asked")])
def test_what_cannot_be(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench-serve", *arguments])
    assert done.exit_code == 1 and message in str(done.exception)
