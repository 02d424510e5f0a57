"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from inferloom.runtime.server.api.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool, plain
from inferloom.runtime.server.api.fields import Body, Name, Token
from inferloom.runtime.server.endpoint import Answer, Call
from inferloom.runtime.server.model import Models


class TokenizeBody(Body):
    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = True
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    model: Name | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 20)]


class Tokens:
    """Answers both."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def tokenize(self, body: TokenizeBody, call: Call) -> Answer:
        model = self._models[body.model]
        if body.prompt is not None:
            tokens = await model.encode(body.prompt, body.add_special_tokens is not False)
        else:
            tools = [t.model_dump(exclude_none=True) for t in body.tools or ()]
            _, tokens = await model.chat([plain(m, i) for i, m in enumerate(body.messages or ())], tools or None,
                                         add_generation_prompt=body.add_generation_prompt is not False)
        made: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": model.longest}
        if body.return_token_strs:
            made["token_strs"] = [model.texts.text(t) for t in tokens]
        return made

    async def detokenize(self, body: DetokenizeBody, call: Call) -> Answer:
        return {"prompt": self._models[body.model].decode(body.tokens, skip_special_tokens=False)}
