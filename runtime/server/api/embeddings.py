"""`/v1/embeddings`: texts or tokens become vectors, on models that were compiled to embed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag

from inferloom.runtime.manifest import Pooling
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.pooling import shortened
from inferloom.runtime.server.api.fields import Body, Name, Token
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.model import Model, Models

#: Inputs of one request (OpenAI's limit), and numbers of one answer.
MAX_INPUTS = 2048
MAX_NUMBERS = 1 << 22

Tokens = Annotated[list[Token], Field(min_length=1)]


def _kind(given: Any) -> str:
    """Which of the forms of `input` this is meant to be, so that errors are about that one."""
    if isinstance(given, str):
        return "text"
    first = given[0] if isinstance(given, list) and given else None
    return "tokens" if isinstance(first, int) else "token_lists" if isinstance(first, list) else "texts"


class EmbeddingBody(Body):
    """OpenAI's fields; `pooling`, `normalize` and `add_special_tokens` are ours and vLLM's."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"truncate_prompt_tokens": (), "messages": (), "chat_template": ()}

    model: Name | None = None
    input: Annotated[Annotated[str, Tag("text")] | Annotated[Tokens, Tag("tokens")]
                     | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS), Tag("texts")]
                     | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS), Tag("token_lists")],
                     Discriminator(_kind)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = True
    priority: Annotated[int, Field(ge=-2**31, lt=2**31)] | None = 0


class Embeddings:
    """Answers embeddings; of the inputs of a request, so many are in the engine at once as it runs sequences."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, body: EmbeddingBody, call: Call) -> Answer:
        model = self._models.of(body.model, "embed")
        given: Any = body.input
        many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        hidden = model.manifest.output.vocab
        if (body.dimensions or 0) > hidden:
            raise bad_request(f"dimensions is at most {hidden} with {model.name}", "dimensions")
        if len(many) * (body.dimensions or hidden) > MAX_NUMBERS:
            raise bad_request(f"{len(many)} embeddings of {body.dimensions or hidden} numbers are more than {MAX_NUMBERS:,} "
                              "numbers: ask for fewer at once", "input")
        prompts = [await _tokens(model, i, p, body.add_special_tokens is not False) for i, p in enumerate(many)]
        vectors, cached = await self._all(model, prompts, body, call)
        unit = model.manifest.embedding.normalize if body.normalize is None else body.normalize
        data = [{"object": "embedding", "index": i, "embedding": _encoded(v, body, unit)} for i, v in enumerate(vectors)]
        count = sum(map(len, prompts))
        return {"object": "list", "model": model.name, "data": data, "usage": {
            "prompt_tokens": count, "total_tokens": count, "prompt_tokens_details": {"cached_tokens": cached}}}

    async def _all(self, model: Model, prompts: list[list[int]], body: EmbeddingBody,
                   call: Call) -> tuple[list[NDArray[np.float32]], int]:
        """The pooled states of all prompts, and how many of their tokens were cached. Whatever fails ends them all."""
        seqs = 1 if model.engine.ready is None else model.engine.ready.seqs
        model.engine.admit(min(len(prompts), seqs))
        free, made, cached = asyncio.Semaphore(seqs), dict[int, NDArray[np.float32]](), 0

        async def one(i: int) -> None:
            nonlocal cached
            async with free:
                updates = model.engine.stream(prompts[i], SamplingParams(), body.priority or 0, call.salt,
                                              pooling=body.pooling or model.manifest.embedding.pooling)
                async with contextlib.aclosing(updates):  # type: ignore[type-var]
                    async for update in updates:
                        if update.embedding is not None:
                            made[i], cached = np.frombuffer(update.embedding, "<f4"), cached + update.cached

        try:
            async with asyncio.TaskGroup() as group:
                for i in range(len(prompts)):
                    group.create_task(one(i))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [made[i] for i in range(len(prompts))], cached


async def _tokens(model: Model, number: int, given: str | list[int], special: bool) -> list[int]:
    tokens = await model.encode(given, special) if isinstance(given, str) else given
    if not 1 <= len(tokens) <= model.longest:
        raise bad_request(f"input {number} has {len(tokens)} tokens; it may have 1 to {model.longest}", "input")
    return tokens


def _encoded(vector: NDArray[np.float32], body: EmbeddingBody, normalize: bool) -> str | list[float]:
    made = shortened(vector, body.dimensions, normalize)
    return base64.b64encode(made.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else made.tolist()
