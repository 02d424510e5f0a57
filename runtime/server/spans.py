"""OpenTelemetry: a span for each request, with the gen_ai attributes. Imported only where spans are wanted.

What is not given here comes from the standard environment variables (OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_TRACES_SAMPLER, ...). Neither prompts nor answers are in a span.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferloom import __version__
from inferloom.runtime.server.ticket import Ticket

#: The requests that get a span, and what they are called.
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/responses": "chat",
              "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


class _Request:
    """A span that is open, and what its sequences have come to."""

    def __init__(self, span: Span, operation: str) -> None:
        self.span, self.operation = span, operation
        self.prompt = self.generated = 0
        self.reasons: list[str] = []


_now: ContextVar[_Request | None] = ContextVar("request", default=None)


class Spans:
    """Makes spans and sends them with `processor`, by default in batches to the collector at `endpoint`."""

    def __init__(self, endpoint: str | None = None, processor: SpanProcessor | None = None) -> None:
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "inferloom"}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        if processor is None:
            url = endpoint and endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
            processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("inferloom", __version__)

    def of(self, model: str) -> Callable[[Ticket, str], None]:
        """What notes the end of a model's requests in the span that they belong to."""

        def observe(ticket: Ticket, reason: str) -> None:
            request = _now.get()
            if request is None:
                return
            request.prompt += ticket.prompt_tokens
            request.generated += ticket.generated
            request.reasons.append(reason)
            span = request.span
            span.update_name(f"{request.operation} {model}")
            span.set_attributes({
                "gen_ai.request.model": model, "gen_ai.response.model": model, "gen_ai.usage.input_tokens": request.prompt,
                "gen_ai.usage.output_tokens": request.generated, "gen_ai.response.finish_reasons": request.reasons})
            if ticket.first:
                span.set_attributes({"gen_ai.server.time_to_first_token": ticket.first - ticket.created,
                                     "gen_ai.latency.time_in_queue": ticket.queued,
                                     "gen_ai.server.request.duration": time.monotonic() - ticket.created})

        return observe

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose requests are spans; a `traceparent` header says what they are part of."""

        async def spanned(scope: Scope, receive: Receive, send: Send) -> None:
            operation = OPERATIONS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
            if operation is None:
                await app(scope, receive, send)
                return
            headers = Headers(scope=scope)
            about: dict[str, Any] = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "inferloom",
                                     "http.request.method": "POST", "url.path": scope["path"], "http.route": scope["path"]}
            span = self._tracer.start_span(operation, extract(headers), SpanKind.SERVER, about)
            status = 0

            async def answer(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            token = _now.set(_Request(span, operation))
            try:
                await app(scope, receive, answer)
            finally:
                _now.reset(token)
                if status:
                    span.set_attribute("http.response.status_code", status)
                if name := scope.get("state", {}).get("request_id"):
                    span.set_attribute("gen_ai.request.id", name)
                if status >= 500 or not status:
                    span.set_attribute("error.type", str(status or 499))
                    span.set_status(Status(StatusCode.ERROR))
                span.end()

        return spanned
