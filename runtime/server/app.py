"""The ASGI app: endpoints, and what stands before them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from inferloom import __version__
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.server.api.chat import ChatBody, Chats
from inferloom.runtime.server.api.completions import CompletionBody, Completions
from inferloom.runtime.server.api.embeddings import EmbeddingBody, Embeddings
from inferloom.runtime.server.api.listing import Listing
from inferloom.runtime.server.api.messages import Asked, MessageBody, Messages
from inferloom.runtime.server.api.responses import ResponseBody, Responses
from inferloom.runtime.server.api.sessions import PauseBody, SessionBody, Sessions
from inferloom.runtime.server.api.tokens import DetokenizeBody, TokenizeBody, Tokens
from inferloom.runtime.server.api.view import View
from inferloom.runtime.server.endpoint import Bodies, Endpoint
from inferloom.runtime.server.engine import EngineProcess
from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.guard import Guard
from inferloom.runtime.server.health import Health
from inferloom.runtime.server.metrics import Metrics
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.openapi import OpenApi
from inferloom.runtime.server.page.files import PATHS, File
from inferloom.runtime.server.parsers.choice import reasoning_parser, tool_parser
from inferloom.runtime.server.settings import ModelSettings, Settings
from inferloom.runtime.server.ticket import Ticket

#: Told a request and why it has ended.
Observe = Callable[[Ticket, str], None]


def open_models(wanted: Sequence[ModelSettings], settings: Settings, metrics: Metrics,
                also: Callable[[str], Observe] | None = None) -> Models:
    """Open artifacts, without starting engines; `also` makes who is told of a model's requests besides the metrics.

    ArtifactError, RequestError when one cannot be served.
    """
    made, names = list[Model](), set[str]()
    artifacts = [Artifact.open(each.path) for each in wanted]
    times = Counter(artifact.identity for artifact in artifacts)
    for each, artifact in zip(wanted, artifacts, strict=True):
        if twice := names & set(each.names):
            raise ArtifactError(f"two artifacts are both called {sorted(twice)[0]}: give --served-model-name")
        names |= set(each.names)
        if each.state_dir is not None:
            each = replace(each, state_dir=str(_folder(each, artifact.identity, times[artifact.identity] > 1)))
        observers = [of(each.names[0]) for of in (metrics.of, also) if of is not None]
        engine = EngineProcess(each, settings, _all(observers))
        metrics.engines.append(engine)
        model = Model(artifact, each.names, engine, None, None)
        source = None if model.template is None else model.template.source
        model.tool_parser = tool_parser(each.tool_parser, source)
        model.reasoning_parser = reasoning_parser(each.reasoning_parser, source)
        made.append(model)
    return Models(made)


def _folder(model: ModelSettings, identity: str, shared: bool) -> Path:
    """Where a model's sessions are saved: a folder by the artifact's hash, and by its name if it is served under several."""
    assert model.state_dir is not None
    folder = Path(model.state_dir).expanduser().absolute() / identity[:32]
    if not shared:
        return folder
    return folder.with_name(f"{folder.name}-{hashlib.sha256(model.names[0].encode()).hexdigest()[:16]}")


def _all(observers: Sequence[Observe]) -> Observe:
    def observe(ticket: Ticket, reason: str) -> None:
        for each in observers:
            each(ticket, reason)

    return observers[0] if len(observers) == 1 else observe


def make_app(models: Models, settings: Settings, metrics: Metrics) -> Starlette:
    """The app that answers for these models."""
    health, listing, tokens, messages = Health(models), Listing(models), Tokens(models), Messages(models)
    sessions, bodies = Sessions(models), Bodies(settings)
    posts: dict[str, Endpoint[Any]] = {
        "/v1/completions": Endpoint(CompletionBody, Completions(models, settings.max_logprobs), settings, bodies),
        "/v1/chat/completions": Endpoint(ChatBody, Chats(models, settings.max_logprobs), settings, bodies),
        "/v1/responses": Endpoint(ResponseBody, Responses(models), settings, bodies),
        "/v1/messages": Endpoint(MessageBody, messages, settings, bodies, anthropic=True),
        "/v1/messages/count_tokens": Endpoint(Asked, messages.count, settings, bodies, anthropic=True),
        "/v1/embeddings": Endpoint(EmbeddingBody, Embeddings(models), settings, bodies),
        "/v1/sessions/{id:path}/pause": Endpoint(PauseBody, sessions.pause, settings, bodies),
        "/v1/sessions/{id:path}/resume": Endpoint(SessionBody, sessions.resume, settings, bodies),
        "/tokenize": Endpoint(TokenizeBody, tokens.tokenize, settings, bodies),
        "/detokenize": Endpoint(DetokenizeBody, tokens.detokenize, settings, bodies),
    }
    gets = {"/health": health.ready, "/health/ready": health.ready, "/health/live": health.live, "/ping": health.live,
            "/metrics": metrics.answer, "/version": _version, "/v1/models": listing.all,
            "/v1/models/{name:path}": listing.one, "/v1/sessions": sessions.all, "/v1/sessions/{id:path}": sessions.one,
            "/v1/engine": View(models).__call__}
    deletes = {"/v1/sessions/{id:path}": sessions.delete}
    whose = ("model", "cache_salt")
    described = OpenApi({path: e.body for path, e in posts.items()}, list(gets), __version__, list(deletes),
                        {"/v1/sessions": (*whose, "limit"), "/v1/sessions/{id:path}": whose})
    gets["/openapi.json"] = described.answer
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    routes += [Route(path, function, methods=["GET"]) for path, function in gets.items()]
    routes += [Route(path, function, methods=["DELETE"]) for path, function in deletes.items()]
    routes += [Route(path, File(file).__call__, methods=["GET"]) for path, file in PATHS.items()]
    return Starlette(routes=routes, exception_handlers={404: _missing, 405: _missing, HttpError: _refused},
                     middleware=[Middleware(Guard, settings=settings, observe=metrics.answered)])


async def _version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _missing(request: Request, error: Exception) -> Response:
    status, headers, path = getattr(error, "status_code"), getattr(error, "headers", None), request.url.path
    asked = f"{request.method} {path[:200]}"
    made = (HttpError(404, f"there is no {asked} here: /openapi.json lists what there is", "not_found_error") if status == 404
            else HttpError(405, f"{asked} is not answered: this path takes {(headers or {}).get('Allow', 'another method')}"))
    return JSONResponse(made.anthropic() if path.startswith("/v1/messages") else made.openai(), status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return JSONResponse(error.openai(), error.status,
                        {} if error.retry_after is None else {"retry-after": str(error.retry_after)})
