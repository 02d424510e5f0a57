"""`/v1/embeddings`: refused, with the reason."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from inferloom.runtime.server.api.fields import Body, Name
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.model import Models


class EmbeddingBody(Body):
    model: Name | None = None
    input: str | Annotated[list[Any], Field(max_length=2048)]


class Embeddings:
    """A step of an artifact gives logits, and no hidden states that could be pooled."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, body: EmbeddingBody, call: Call) -> Answer:
        name = self._models[body.model].name
        raise HttpError(400, f"{name} gives logits, not hidden states: there are no embeddings to be had from it",
                        "not_supported_error")
