"""A model that is served: its artifact's facts, tokenizer and chat template, and its engine process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.chat import ChatTemplate
from inferloom.runtime.errors import RequestError
from inferloom.runtime.llm import open_tokenizer
from inferloom.runtime.pooling import check_task
from inferloom.runtime.server.engine import EngineProcess
from inferloom.runtime.server.errors import HttpError, bad_request
from inferloom.runtime.server.token_text import TokenTexts

#: Longer texts are tokenized on another thread, so that the others' streams go on meanwhile.
_LONG = 4096


class Model:
    """One served artifact. `names` are what clients may call it; the first one is what it calls itself."""

    def __init__(self, artifact: Artifact, names: Sequence[str], engine: EngineProcess, tool_parser: str | None,
                 reasoning_parser: str | None) -> None:
        self.artifact, self.manifest, self.names, self.engine = artifact, artifact.manifest, tuple(names), engine
        self.tokenizer: Tokenizer | None = open_tokenizer(artifact)
        self.template = ChatTemplate.of(artifact)
        self.tool_parser, self.reasoning_parser = tool_parser, reasoning_parser
        self.created = int(time.time())
        self.texts = TokenTexts(self.tokenizer)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self.manifest.model.max_model_len if self.engine.ready is None else self.engine.ready.longest

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. HttpError 400 when there is no tokenizer."""
        tokenizer = self._tokenizer()

        def work() -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

        return work() if len(text) < _LONG else await asyncio.to_thread(work)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens. HttpError 400 for ids outside the vocabulary."""
        if any(not 0 <= t < self.manifest.model.vocab_size for t in tokens):
            raise bad_request(f"token ids must be 0 to {self.manifest.model.vocab_size - 1}")
        return str(self._tokenizer().decode(tokens, skip_special_tokens=skip_special_tokens))

    async def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
                   **options: Any) -> tuple[str, list[int]]:
        """The prompt of a conversation as text and as tokens. HttpError 400 when it has no template, or refuses."""
        template = self.template
        if template is None:
            raise bad_request(f"{self.name} has no chat template: use /v1/completions")
        try:
            text = await asyncio.to_thread(lambda: template.render(messages, tools=tools, **options))
        except RequestError as error:
            raise bad_request(str(error), "messages") from None
        return text, await self.encode(text, add_special_tokens=False)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise bad_request(f"{self.name} has no tokenizer: give token ids")
        return self.tokenizer


class Models:
    """The served models by name."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.all = tuple(models)
        self._named = {name: model for model in models for name in model.names}

    def __getitem__(self, name: str | None) -> Model:
        """The model that a request names; the first one if it names none. HttpError 404."""
        if not name:
            return self.all[0]
        if name not in self._named:
            raise HttpError(404, f"the model {name[:200]!r} is not served here; there is {', '.join(self._named)}",
                            "not_found_error", "model", code="model_not_found")
        return self._named[name]

    def of(self, name: str | None, task: str) -> Model:
        """The model that a request names, which must have been compiled for the task; the first such one if it names none.

        HttpError 404, or 400 if it was not.
        """
        model = self[name] if name else next((m for m in self.all if m.manifest.task == task), self.all[0])
        try:
            check_task(model.manifest.task, task)
        except RequestError as error:
            raise bad_request(f"{model.name}: {error}", "model") from None
        return model
