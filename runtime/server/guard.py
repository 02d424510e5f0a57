"""What every request passes first: its id, the hosts and origins it may come from, and its key.

Whatever is not named open here needs a key, when there are keys.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.page.files import PATHS
from inferloom.runtime.server.settings import Settings

#: Paths that say whether the server works, and nothing else; and the page, which is the same for everybody.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", *PATHS})
#: What an open page asks all the time: its requests are logged at level debug.
_POLLED = frozenset({"/v1/engine", "/v1/sessions"})
#: What the salt of a key's owner starts with, before the key's SHA-256; no other does.
KEYED = b"key"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
_HEADERS = re.compile(r"[A-Za-z0-9\-_, ]{1,2000}")
_log = structlog.get_logger()


class Guard:
    """ASGI middleware. Puts `request_id`, `salt` (of the key's owner) and `failed` (an HttpError) into the state."""

    def __init__(self, app: ASGIApp, settings: Settings, observe: Callable[[str, int], None]) -> None:
        self._app, self._settings, self._observe = app, settings, observe
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        hosts = settings.allowed_hosts or (_LOCAL if settings.local else ())
        self._hosts = frozenset(h.lower() for h in hosts)
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = name
        start, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                made = MutableHeaders(scope=message)
                made["x-request-id"] = name
                if origin := self._cors(headers):
                    made["access-control-allow-origin"] = origin
                    made["access-control-expose-headers"] = "x-request-id, retry-after"
                    made["vary"] = "origin"
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and self._cors(headers) is not None:
                await _preflight(scope, receive, answer)
                return
            scope["state"]["salt"] = self._check(scope["path"], headers)
            await self._app(scope, receive, answer)
        except HttpError as error:
            body = error.anthropic() if scope["path"].startswith("/v1/messages") else error.openai()
            extra = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await JSONResponse(body, error.status, extra)(scope, receive, answer)
        finally:
            seconds = time.monotonic() - start
            self._observe(_route(scope), status or 499)
            log = _log.debug if scope["path"] in _POLLED and status == 200 else _log.info
            log("request", request_id=name, method=scope["method"], path=scope["path"], status=status or 499,
                seconds=round(seconds, 4), client=(scope.get("client") or ("",))[0])

    def _check(self, path: str, headers: Headers) -> bytes:
        """The salt of whoever asks. HttpError 403 or 401."""
        if self._hosts and _host(headers.get("host", "")) not in self._hosts:
            raise HttpError(403, "this host name is not served: ask for localhost, or start with --allowed-hosts",
                            "permission_error")
        origin = headers.get("origin")
        if origin is not None and self._cors(headers) is None and not _same(origin, headers.get("host", "")):
            raise HttpError(403, "this origin may not ask: start with --allowed-origins", "permission_error")
        if not self._keys or path in OPEN_PATHS:
            return b""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else scheme)
        digest = hashlib.sha256(given.encode()).digest()
        found = b""
        for key in self._keys:  # all of them, whichever matches
            if hmac.compare_digest(key, digest):
                found = KEYED + key
        if not found:
            raise HttpError(401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error",
                            code="invalid_api_key")
        return found

    def _cors(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        return origin if origin is not None and (origin in self._origins or "*" in self._origins) else None


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    value = value.strip().lower()
    return value[1:].partition("]")[0] if value.startswith("[") else value.rpartition(":")[0] or value


def _same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.strip().lower()
    except ValueError:
        return False


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    # Clients send headers of their own (x-stainless-os, anthropic-beta): an origin that may ask may send any.
    asked = Headers(scope=scope).get("access-control-request-headers", "")
    allowed = {"access-control-allow-methods": "GET, POST, DELETE", "access-control-max-age": "600",
               "access-control-allow-headers": asked if _HEADERS.fullmatch(asked) else "authorization, content-type, x-api-key"}
    await JSONResponse(None, 200, allowed)(scope, receive, send)


def _route(scope: Scope) -> str:
    """The path if it is one of ours, so that strangers' paths do not become metrics."""
    return scope["path"] if "endpoint" in scope else "other"
