"""`/v1/sessions`: what waits of a caller's conversations, and where; each caller sees only its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inferloom.runtime.server.api.fields import Body, Name, Salt, salted
from inferloom.runtime.server.api.wishes import MAX_ID, owner
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import HttpError, bad_request
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.wire import Told
from inferloom.runtime.sessions import LONGEST_ON_DISK, SessionInfo

MAX_LIST, USUAL_LIST = 1000, 100


class SessionBody(Body):
    """Which session of that name: of which model (the first that has it), under which `cache_salt`."""

    model: Name | None = None
    cache_salt: Salt | None = None


class PauseBody(SessionBody):
    seconds: Annotated[float, Field(gt=0, le=LONGEST_ON_DISK)] = 300.0
    place: Literal["auto", "keep", "ram", "disk", "discard"] = "auto"
    returns_in: Annotated[float, Field(ge=0, le=LONGEST_ON_DISK)] | None = None


class Sessions:
    """Lists, pauses, resumes and closes the sessions of whoever asks."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def all(self, request: Request) -> Response:
        query, found, more = request.query_params, list[dict[str, Any]](), False
        limit = query.get("limit", str(USUAL_LIST))
        if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_LIST:
            raise bad_request(f"limit is 1 to {MAX_LIST}", "limit")
        for model in self._asked(query.get("model")):
            told = await model.engine.ask("list", owner(_salt(request)), most=int(limit) - len(found))
            found += [_entry(model, info) for info in told.sessions]
            more = more or told.more
        return JSONResponse({"object": "list", "data": found, "has_more": more})

    async def one(self, request: Request) -> Response:
        model, told = await self._ask(request.query_params.get("model"), request.path_params["id"], _salt(request), "info")
        return JSONResponse(_entry(model, told.sessions[0]))

    async def delete(self, request: Request) -> Response:
        name = request.path_params["id"]
        await self._ask(request.query_params.get("model"), name, _salt(request), "close")
        return JSONResponse({"id": name, "object": "session.deleted", "deleted": True})

    async def pause(self, body: PauseBody, call: Call) -> Answer:
        return _outcome((await self._ask(body.model, call.path["id"], salted(call.salt, body.cache_salt), "pause",
                                         seconds=body.seconds, place=body.place, returns_in=body.returns_in))[1])

    async def resume(self, body: SessionBody, call: Call) -> Answer:
        return _outcome((await self._ask(body.model, call.path["id"], salted(call.salt, body.cache_salt), "resume"))[1])

    async def _ask(self, model: str | None, name: str, salt: bytes, what: str, **more: Any) -> tuple[Model, Told]:
        """The first model's answer that has such a session. HttpError 404 when none has."""
        for each in self._asked(model) if 0 < len(name) <= MAX_ID else ():
            told = await each.engine.ask(what, owner(salt), name, **more)
            if told.there:
                return each, told
        raise HttpError(404, f"there is no session {name[:MAX_ID]!r}", "not_found_error", "id", code="session_not_found")

    def _asked(self, name: str | None) -> tuple[Model, ...]:
        return self._models.all if name is None else (self._models[name],)


def _salt(request: Request) -> bytes:
    return salted(request.scope["state"]["salt"], request.query_params.get("cache_salt"))


def _entry(model: Model, info: SessionInfo) -> dict[str, Any]:
    return {"object": "session", "id": info.name, "model": model.name, "tokens": info.tokens, "blocks": info.blocks,
            "pooled": info.pooled, "in_ram": info.in_ram, "on_disk": info.on_disk,
            "leased_seconds": round(info.leased, 3), "saved": info.saved}


def _outcome(told: Told) -> dict[str, Any]:
    made = told.outcome
    assert made is not None
    return {"status": made.status, "why": made.why, "blocks": made.blocks, "place": made.place, "seconds": made.seconds}
