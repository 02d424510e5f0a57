"""`/health`: whether the server lives, and whether it can answer."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inferloom.runtime.server.model import Models


class Health:
    """`live`: this process answers. `ready`: every engine is loaded, alive and not stalled; 503 with the reason if not."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        states = {model.name: model.engine.state for model in self._models.all}
        good = all(state == "ready" for state in states.values())
        return JSONResponse({"status": "ready" if good else "unavailable", "engines": states}, 200 if good else 503,
                            {} if good else {"retry-after": "5"})
