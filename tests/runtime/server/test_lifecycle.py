"""Either process dies, clients leave, too many come, the end is asked for."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.conftest import DEMO
from tests.runtime.server.conftest import Server

LONG = {"prompt": "def f():", "max_tokens": 900, "temperature": 0.9, "ignore_eos": True, "seed": 1}


def metric(server: Server, name: str) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"inferloom_{name}{{"))


def until(holds: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def open_stream(server: Server, body: dict[str, object]) -> socket.socket:
    """A request on a plain socket, so that the client can be as rude as it likes."""
    data = json.dumps(body).encode()
    made = socket.create_connection(("127.0.0.1", server.port))
    made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + str(len(data)).encode()
                 + b"\r\n\r\n" + data)
    return made


def test_an_engine_that_is_killed_comes_back(start: Callable[..., Server]) -> None:
    server = start()
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        (engine,) = server.engines()
        os.kill(engine, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert "the request was lost" in rest[-2] and rest[-1] == "data: [DONE]"
    states = set()
    for _ in range(500):
        answer = httpx.get(server.url + "/health")
        states.add((answer.status_code, answer.json()["engines"]["demo"]))
        if answer.status_code == 200:
            break
        time.sleep(0.01)
    assert (200, "ready") in states and states <= {(200, "ready"), (503, "dead"), (503, "loading")}
    assert httpx.get(server.url + "/health/live").status_code == 200
    assert httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert server.engines() != [engine] and metric(server, "engine_restarts_total") == 1
    assert server.close() == 0


def test_an_engine_ends_with_its_server(start: Callable[..., Server]) -> None:
    """Killed in the middle of work, so that nothing can be said goodbye to."""
    server = start()
    (engine,) = server.engines()
    with open_stream(server, LONG | {"stream": True}) as stream:
        assert any(line.startswith(b"data: ") for line in stream.makefile("rb"))  # the head may come alone
        server.process.kill()
        until(lambda: gone(engine), 3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(start: Callable[..., Server], stream: bool) -> None:
    server = start("--max-num-seqs", "2")
    clients = [open_stream(server, LONG | {"stream": stream}) for _ in range(4)]  # two run, two wait
    until(lambda: metric(server, "num_requests_running") == 2 and metric(server, "num_requests_waiting") == 2)
    assert metric(server, "kv_cache_usage_perc") > 0
    for client in clients[2:]:  # one that waits leaves, and nobody else is disturbed
        client.close()
    until(lambda: metric(server, "num_requests_waiting") == 0)
    assert metric(server, "num_requests_running") == 2
    steps = metric(server, "steps_total")
    for client in clients[:2]:
        client.close()
    until(lambda: metric(server, "num_requests_running") == 0)
    assert metric(server, "kv_cache_usage_perc") == 0
    assert metric(server, "steps_total") - steps < 300
    assert server.close() == 0


def test_too_many_are_told_to_come_again(start: Callable[..., Server]) -> None:
    server = start("--max-num-seqs", "2", "--max-queue", "3")

    async def ask(client: httpx.AsyncClient, delay: float) -> httpx.Response:
        await asyncio.sleep(delay)
        return await client.post(server.url + "/v1/completions", json=LONG | {"max_tokens": 40}, timeout=60)

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
            return await asyncio.gather(*(ask(client, i * 0.002) for i in range(40)))

    answers = asyncio.run(crowd())
    good = [a for a in answers if a.status_code == 200]
    refused = [a for a in answers if a.status_code == 429]
    assert len(good) + len(refused) == 40 and len(good) >= 5 and refused
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert len({a.json()["choices"][0]["text"] for a in good}) == 1
    assert httpx.get(server.url + "/health").status_code == 200


def test_what_runs_is_finished_after_sigterm(start: Callable[..., Server]) -> None:
    server = start()
    engines = server.engines()
    with httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True, "max_tokens": 300},
                      timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        texts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert texts[-1]["finish_reason"] == "length" and len(texts) > 100
    assert server.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")
    assert all(gone(pid) for pid in engines)


def test_a_stalled_engine_is_not_ready_and_is_replaced(start: Callable[..., Server]) -> None:
    server = start("--stall-timeout", "2")
    (engine,) = server.engines()
    os.kill(engine, signal.SIGSTOP)
    until(lambda: httpx.get(server.url + "/health").json()["engines"]["demo"] == "stalled")
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 503 and answer.headers["retry-after"] and "stalled" in answer.text
    until(lambda: httpx.get(server.url + "/health").status_code == 200, 30)
    assert gone(engine) and server.engines() != [engine]
    assert httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_pause_of_all_is_no_stall(start: Callable[..., Server]) -> None:
    """As when a machine is suspended: nobody was silent, all were."""
    server = start("--stall-timeout", "0.6")
    processes = [server.process.pid, *server.engines()]
    with open_stream(server, LONG):
        until(lambda: metric(server, "num_requests_running") == 1)
        for each in (signal.SIGSTOP, signal.SIGCONT):
            for pid in processes:
                os.kill(pid, each)
            time.sleep(3 if each == signal.SIGSTOP else 0.5)
        assert [server.process.pid, *server.engines()] == processes
    assert metric(server, "engine_restarts_total") == 0
    assert not any(e["event"] == "engine hangs and is killed" for e in server.events)


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_dropped(start: Callable[..., Server]) -> None:
    """Its socket's buffers are small, so what it does not take stays with the server."""
    server = start("--send-timeout", "0.5")
    data = json.dumps(LONG | {"stream": True, "n": 8, "logprobs": 20}).encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect(("127.0.0.1", server.port))
        lazy.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                     + str(len(data)).encode() + b"\r\n\r\n" + data)
        until(lambda: metric(server, "num_requests_running") == 8)
        until(lambda: metric(server, "num_requests_running") == 0, 30)
    assert any(e["event"] == "client reads too slowly" for e in server.events)
    assert metric(server, "kv_cache_usage_perc") == 0


def test_it_says_so_while_nothing_comes(start: Callable[..., Server]) -> None:
    """Keep-alives are comments, which clients skip; they are sent while a request waits, too."""
    server = start("--max-num-seqs", "1", "--keep-alive", "0.1")
    with open_stream(server, LONG):
        until(lambda: metric(server, "num_requests_running") == 1)
        with open_stream(server, LONG | {"stream": True}) as waiting:
            waiting.settimeout(10)
            seen = b""
            while seen.count(b": ping") < 2:
                seen += waiting.recv(4096)
            assert b"text/event-stream" in seen and b"data:" not in seen


def test_what_cannot_start_says_why(chat_artifact: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "inferloom.cli", "serve", *arguments], capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 1, done.stderr
        return done.stderr.replace("\n", " ")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in run(str(chat_artifact), "--port", str(taken.getsockname()[1]))
    assert "give --api-key" in run(str(chat_artifact), "--host", "0.0.0.0")
    assert "at least 8" in run(str(chat_artifact), "--api-key", "short")
    assert "does not exist" in run(str(tmp_path / "nothing"))
    assert "must be 1 to" in run(str(chat_artifact), "--max-num-seqs", "100000", "--port", "0")
    assert "parser 'x' is not known" in run(str(chat_artifact), "--tool-call-parser", "x", "--port", "0")
    assert "both called demo" in run(str(chat_artifact), str(chat_artifact), "--port", "0")


@pytest.mark.slow
def test_a_server_does_not_keep_what_compiling_took(tmp_path: Path) -> None:
    """A checkpoint is compiled on first use; the process that then serves has no torch in it."""
    server = Server(str(DEMO), "--threads", "1", env={"XDG_CACHE_HOME": str(tmp_path)})
    try:
        libraries = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" not in libraries and "python" in libraries
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "demo"
    finally:
        assert server.close() == 0
