"""`/v1/models`."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.model import Model, Models


class Listing:
    """Says which models there are."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def all(self, request: Request) -> Response:
        made = [_entry(model, name) for model in self._models.all for name in model.names]
        return JSONResponse({"object": "list", "data": made, "first_id": made[0]["id"], "last_id": made[-1]["id"],
                             "has_more": False})

    async def one(self, request: Request) -> Response:
        name = unquote(request.path_params["name"])
        if not name:
            raise HttpError(404, "no model is named", "not_found_error")
        return JSONResponse(_entry(self._models[name], name))


def _entry(model: Model, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": model.created, "owned_by": "inferloom", "root": model.name,
            "max_model_len": model.longest, "type": "model", "display_name": name}
