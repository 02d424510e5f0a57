"""An endpoint: a bounded body in, JSON or a stream of events out, and an end to both when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import structlog
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from inferloom.runtime.errors import RequestError
from inferloom.runtime.server.errors import HttpError, unavailable
from inferloom.runtime.server.settings import Settings

Body = TypeVar("Body", bound=BaseModel)
#: A whole answer, or events as bytes that are ready to be sent.
Answer = dict[str, Any] | AsyncIterator[bytes]
_PING = b": ping\n\n"
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Call:
    """What an endpoint knows of a request besides its body; `salt` holds apart the caches of different keys,
    `path` has what stands in its path."""

    request_id: str
    salt: bytes
    path: Mapping[str, str] = field(default_factory=dict)


class Bodies:
    """Reads bodies: each is bounded, and so are all together that are being read, which `held` bytes are."""

    def __init__(self, settings: Settings) -> None:
        self._one, self._all, self._patience = settings.max_body_bytes, 8 * settings.max_body_bytes, settings.send_timeout
        self.held = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. HttpError 413 as soon as it is known to be too long, before anything of it is parsed; 408 when
        nothing comes; 503 when too much is being read."""
        too_long = HttpError(413, f"the body is longer than {self._one:,} bytes (--max-body)",
                             "invalid_request_error")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._one:
                raise too_long
        data = bytearray()
        try:
            while True:
                try:
                    async with asyncio.timeout(self._patience):
                        message = await receive()
                except TimeoutError:
                    raise HttpError(408, "the body does not come", "timeout") from None
                if message["type"] == "http.disconnect":
                    raise _ClientGone
                part = message.get("body", b"")
                data += part
                self.held += len(part)
                if len(data) > self._one:
                    raise too_long
                if self.held > self._all:
                    raise unavailable("too many large bodies are being read at once")
                if not message.get("more_body", False):
                    return bytes(data)
        finally:
            self.held -= len(data)


class Endpoint(Generic[Body]):
    """ASGI app for POST with a JSON body of type `body`; `anthropic` decides how errors are said."""

    def __init__(self, body: type[Body], handle: Callable[[Body, Call], Awaitable[Answer]], settings: Settings,
                 bodies: Bodies, anthropic: bool = False) -> None:
        self.body, self._handle, self._settings, self._bodies = body, handle, settings, bodies
        self._anthropic = anthropic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send, self._settings)
        try:
            body = self._parse(await self._bodies.read(scope, receive))
            call = Call(scope["state"]["request_id"], scope["state"]["salt"], scope.get("path_params", {}))
            work = asyncio.create_task(self._answer(body, call, reply))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (work, gone):
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.gather(work, gone, return_exceptions=True)
            if not work.cancelled() and (error := work.exception()) is not None:
                raise error
        except TimeoutError:
            _log.warning("client reads too slowly", request_id=scope["state"]["request_id"])
        except _ClientGone:
            pass
        except HttpError as error:
            await self._fail(error, reply)
        except RequestError as error:
            await self._fail(HttpError(400, str(error)), reply)
        except Exception as error:  # a bug: this request fails, and the log says where
            _log.exception("internal error", request_id=scope["state"]["request_id"])
            await self._fail(HttpError(500, f"internal error: {type(error).__name__}", "server_error"), reply)

    def _parse(self, data: bytes) -> Body:
        try:
            return self.body.model_validate_json(data)
        except ValidationError as error:
            raise _said(error) from None

    async def _answer(self, body: Body, call: Call, reply: _Reply) -> None:
        answer = await self._handle(body, call)
        if isinstance(answer, dict):
            await reply.json(answer)
        else:
            async with contextlib.aclosing(answer) as events:  # type: ignore[type-var]
                await reply.stream(events)

    async def _fail(self, error: HttpError, reply: _Reply) -> None:
        body = error.anthropic() if self._anthropic else error.openai()
        with contextlib.suppress(TimeoutError, OSError):
            if not reply.started:
                await reply.json(body, error)
            else:
                event = b"event: error\n" if self._anthropic else b""
                await reply.send(event + b"data: " + msgspec.json.encode(body) + b"\n\n")
                await reply.end(b"" if self._anthropic else b"data: [DONE]\n\n")


class _Reply:
    """Sends one response. A client that does not take what is sent within `send_timeout` gets no more: TimeoutError."""

    def __init__(self, send: Send, settings: Settings) -> None:
        self._send, self._settings = send, settings
        self.started, self._last = False, 0.0

    async def json(self, body: dict[str, Any], error: HttpError | None = None) -> None:
        data = msgspec.json.encode(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        if error is not None and error.retry_after is not None:
            headers.append((b"retry-after", str(error.retry_after).encode()))
        if error is not None and error.status in (408, 413):  # the rest of the body is not read
            headers.append((b"connection", b"close"))
        await self._start(200 if error is None else error.status, headers)
        await self.end(data)

    async def stream(self, events: AsyncIterator[bytes]) -> None:
        """Send events; while none come, comments, which clients skip and which show who has left."""
        pings = asyncio.create_task(self._ping())
        try:
            async for event in events:
                if not self.started:
                    await self._start_stream()
                await self.send(event)
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
        await self.end(b"")

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(self._settings.send_timeout):
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._last = time.monotonic()

    async def end(self, data: bytes) -> None:
        async with asyncio.timeout(self._settings.send_timeout):
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._settings.keep_alive)
            if not self.started:
                await self._start_stream()
            if time.monotonic() - self._last >= self._settings.keep_alive / 2:
                await self.send(_PING)

    async def _start_stream(self) -> None:
        await self._start(200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                                (b"x-accel-buffering", b"no")])

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


class _ClientGone(Exception):
    """The client left before its request was whole."""


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _said(error: ValidationError) -> HttpError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return HttpError(400, f"{where}: {message}"[:1000] if where else message[:1000], param=where[:200] or None)
