"""Spans of requests, as a collector would get them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

import anyio
import httpx
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from inferloom.cli import serve
from inferloom.errors import MissingExtraError
from inferloom.runtime.server.guard import Guard
from inferloom.runtime.server.settings import Settings
from inferloom.runtime.server.spans import Spans
from inferloom.runtime.server.ticket import Ticket
from inferloom.runtime.server.wire import Sample, Update
from tests.runtime.server.conftest import Server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ask(path: str, headers: dict[str, str] | None = None, method: str = "POST") -> list[Any]:
    exporter = InMemorySpanExporter()
    spans = Spans(processor=SimpleSpanProcessor(exporter))
    observe = spans.of("demo")

    def ticket() -> Ticket:
        made = Ticket(1, 1, 12)
        made.put(Update(1, [Sample(0, "ab", [5, 6], finish_reason="length")], finished=True, queued=0.25))
        return made

    async def chat(request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            observe(ticket(), "length")

        return StreamingResponse(stream())

    async def twice(request: Request) -> Response:
        async with anyio.create_task_group() as group:
            for reason in ("stop", "length"):
                async def one(reason: str = reason) -> None:
                    observe(ticket(), reason)

                group.start_soon(one)
        return JSONResponse({})

    async def broken(request: Request) -> Response:
        return JSONResponse({}, 503)

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST", "GET"]),
                            Route("/v1/completions", twice, methods=["POST"]), Route("/tokenize", twice, methods=["POST"]),
                            Route("/v1/messages", broken, methods=["POST"])])
    whole = spans.middleware(Guard(app, Settings(), lambda path, status: None))

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(whole), base_url="http://localhost") as client:
            await client.request(method, path, headers=headers)

    anyio.run(run)
    observe(ticket(), "abort")  # of no request: nothing happens
    spans.close()
    return list(exporter.get_finished_spans())


def test_a_stream_is_a_span_of_its_callers_trace() -> None:
    (span,) = ask("/v1/chat/completions", {"traceparent": PARENT, "x-request-id": "mine"})
    assert span.name == "chat demo" and span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1] and f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    about = dict(span.attributes)
    assert about["gen_ai.operation.name"] == "chat" and about["gen_ai.request.model"] == "demo"
    assert (about["gen_ai.usage.input_tokens"], about["gen_ai.usage.output_tokens"]) == (12, 2)
    assert about["gen_ai.response.finish_reasons"] == ("length",) and about["http.response.status_code"] == 200
    assert about["gen_ai.latency.time_in_queue"] == 0.25 and about["gen_ai.request.id"] == "mine"
    assert about["gen_ai.server.time_to_first_token"] >= 0 and span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "inferloom"


def test_prompts_of_one_request_add_up() -> None:
    (span,) = ask("/v1/completions")
    assert span.name == "text_completion demo" and span.parent is None
    assert (span.attributes["gen_ai.usage.input_tokens"], span.attributes["gen_ai.usage.output_tokens"]) == (24, 4)
    assert sorted(span.attributes["gen_ai.response.finish_reasons"]) == ["length", "stop"]


def test_failures_are_errors_and_refusals_are_not() -> None:
    (span,) = ask("/v1/messages")
    assert span.status.status_code is StatusCode.ERROR and span.attributes["error.type"] == "503" and span.name == "chat"
    (span,) = ask("/v1/chat/completions", {"origin": "https://evil.example"})
    assert span.attributes["http.response.status_code"] == 403 and span.status.status_code is StatusCode.UNSET


def test_other_requests_have_none() -> None:
    assert ask("/tokenize") == [] and ask("/v1/chat/completions", method="GET") == []


def test_a_server_sends_them(start: Callable[..., Server]) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        server = start("--otel-endpoint", f"http://127.0.0.1:{collector.server_port}",
                       env={"OTEL_EXPORTER_OTLP_COMPRESSION": "none"})
        ask = {"prompt": "a secret prompt", "max_tokens": 3}
        httpx.post(server.url + "/v1/completions", json=ask, headers={"traceparent": PARENT}).raise_for_status()
        assert server.close() == 0
        collector.shutdown()
    ((path, data),) = got
    assert path == "/v1/traces" and b"text_completion demo" in data and bytes.fromhex(PARENT.split("-")[1]) in data
    assert b"gen_ai.usage.output_tokens" in data and b"secret" not in data


def test_nothing_is_loaded_when_it_is_off() -> None:
    code = "import sys, inferloom.cli.serve, inferloom.runtime.server.serve; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_endpoint_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_OTEL", "opentelemetry.not_there.at_all")
    with pytest.raises(MissingExtraError, match=r"inferloom\[otel\]"):
        serve.collector("http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    with pytest.raises(MissingExtraError):
        serve.collector(None)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert serve.collector(None) is None


def test_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    assert serve.collector(None) is None
    assert serve.collector("http://127.0.0.1:1") == "http://127.0.0.1:1"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:2/v1/traces")
    assert serve.collector(None) == "http://127.0.0.1:2/v1/traces"
