"""`/openapi.json`: what may be asked, made from the bodies themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_ERROR = {"description": "Refused; the body says why.", "content": {"application/json": {"schema": {
    "type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}}}}


class OpenApi:
    """Describes the endpoints: `posts` maps paths to the models of their bodies, `gets` are read, `deletes` removed; both
    take what `queries` says for their path."""

    def __init__(self, posts: Mapping[str, type[BaseModel]], gets: Sequence[str], version: str, deletes: Sequence[str] = (),
                 queries: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        refs, definitions = models_json_schema([(body, "validation") for body in set(posts.values())],
                                               ref_template="#/components/schemas/{model}")
        paths: dict[str, Any] = {}
        for path, body in posts.items():
            schema = refs[(body, "validation")]
            paths[_shown(path)] = {"post": {
                "parameters": _named(path),
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answer, as JSON or as server-sent events.", "content": {
                    "application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}},
                    **{status: _ERROR for status in ("400", "401", "403", "404", "413", "429", "500", "503")}}}}
        for method, path in [*(("get", p) for p in gets), *(("delete", p) for p in deletes)]:
            asked = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in queries.get(path, ())]
            paths.setdefault(_shown(path), {})[method] = {"parameters": _named(path) + asked, "responses": {
                "200": {"description": "The answer."}, **{status: {"description": "Refused."} for status in (
                    "400", "401", "403", "404", "429", "500", "503")}}}
        self.document = {
            "openapi": "3.1.0", "info": {"title": "inferloom", "version": version}, "paths": paths,
            "components": {"schemas": definitions.get("$defs", {}),
                           "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}}

    async def answer(self, request: Request) -> Response:
        return JSONResponse(self.document)


def _shown(path: str) -> str:
    return path.replace(":path}", "}")


def _named(path: str) -> list[dict[str, Any]]:
    """The parameters that stand in a path."""
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)", path)]
