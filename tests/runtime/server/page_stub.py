"""A server with the page's real files and invented answers: what no model says on demand, and errors of all kinds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from inferloom.runtime.server.page.files import PATHS, File

#: What would run or be loaded if it were read as HTML.
EVIL = "<img src=x onerror=\"window.hit=1\"><script>window.hit=1</script><b>bold</b> &amp;"
KEY = "stub-key-1"


class Stub:
    """`key`: whether one is wanted. `answers` are what chats get: pieces (text, thought), or an error (status, message)."""

    def __init__(self) -> None:
        self.key = False
        self.asked: list[dict[str, Any]] = []
        self.answer: list[tuple[str, str]] | tuple[int, str] = [("hello", "")]
        self.sessions = {EVIL: self._session(EVIL), "agent": self._session("agent")}
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.app = Starlette(routes=[
            *(Route(path, File(file).__call__) for path, file in PATHS.items()),
            Route("/v1/engine", self.engine), Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/sessions", self.list), Route("/v1/sessions/{name:path}", self.close, methods=["DELETE"]),
            Route("/v1/sessions/{name:path}/{what}", self.act, methods=["POST"])])

    @staticmethod
    def _session(name: str) -> dict[str, Any]:
        return {"object": "session", "id": name, "model": "stub", "tokens": 1234, "blocks": 38, "pooled": 38, "in_ram": 0,
                "on_disk": 0, "leased_seconds": 0.0, "saved": False}

    def _refused(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {KEY}":
            return None
        return JSONResponse({"error": {"message": "a valid API key is needed"}}, 401)

    async def engine(self, request: Request) -> Response:
        now = time.monotonic()
        return self._refused(request) or JSONResponse({"object": "list", "data": [{
            "object": "engine", "name": "stub", "names": ["stub"], "state": "ready", "time": now, "restarts": 0,
            "architecture": "Stub", "dtype": "bf16", "chip": "none", "chat_template": True, "max_model_len": 8192,
            "max_num_seqs": 32, "running": 12, "waiting": 3, "steps": 1, "preemptions": 0,
            "batch": {"sequences": 12, "tokens": 96},
            "tokens": {"prompt": int(now * 900) % 10**9, "generated": int(now * 240)},
            "blocks": {"total": 1000, "in_use": 400, "leased": 150, "cached": 250, "free": 200, "tokens": 32, "bytes": 65536},
            "tiers": {"ram": {"bytes": 1 << 28, "capacity": 1 << 30}, "disk": {"bytes": 0, "capacity": 0}},
            "prefix_cache": {"enabled": True, "queries": 1000, "hits": 815}}]})

    async def chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        if (refused := self._refused(request)) is not None:
            return refused
        if isinstance(self.answer, tuple):
            status, message = self.answer
            return JSONResponse({"error": {"message": message}}, status, {"retry-after": "7"} if status == 429 else {})

        def stream() -> Iterator[str]:
            assert isinstance(self.answer, list)
            for text, thought in self.answer:
                if text == "!error":
                    yield f"data: {json.dumps({'error': {'message': thought, 'code': 500}})}\n\n"
                    continue
                delta = ({"content": text} if text else {}) | ({"reasoning": thought} if thought else {})
                yield ": ping\n\n"
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
                time.sleep(0.01)
            usage = {"prompt_tokens": 200, "completion_tokens": 45, "prompt_tokens_details": {"cached_tokens": 128}}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def list(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": [*self.sessions.values()]})

    async def act(self, request: Request) -> Response:
        name, what = request.path_params["name"], request.path_params["what"]
        body = await request.json()
        self.calls.append((what, name, body))
        session = self.sessions[name]
        kept = what == "pause" and body["place"] == "keep"
        session["leased_seconds"] = body["seconds"] if kept else 0.0
        if what == "pause" and body["place"] == "disk":
            return JSONResponse({"status": "rejected", "why": "there is no disk tier", "blocks": 0, "place": "disk",
                                 "seconds": 0})
        return JSONResponse({"status": "accepted", "why": "", "blocks": 38, "place": "keep",
                             "seconds": body["seconds"] if kept else 0})

    async def close(self, request: Request) -> Response:
        self.calls.append(("close", request.path_params["name"], {}))
        del self.sessions[request.path_params["name"]]
        return JSONResponse({"id": request.path_params["name"], "object": "session.deleted", "deleted": True})


@contextmanager
def running(stub: Stub) -> Iterator[str]:
    """The stub's address."""
    server = uvicorn.Server(uvicorn.Config(stub.app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
