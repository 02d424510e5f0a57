"""Chat templates: the artifact's own, in Jinja's sandbox. No request can bring a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.errors import ArtifactError, RequestError

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_MESSAGES = 4096
MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024


class ChatTemplate:
    """Renders messages into a prompt."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise ArtifactError(f"the chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ArtifactError(f"the chat template does not parse: {error}") from None
        self._special = dict(special_tokens)

    @staticmethod
    def of(artifact: Artifact) -> ChatTemplate | None:
        """The artifact's template, or None when it has none."""
        config = json.loads(_read(artifact, "tokenizer/tokenizer_config.json") or "{}")
        source = _read(artifact, "tokenizer/chat_template.jinja") or config.get("chat_template")
        if not isinstance(source, str):
            return None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
        return ChatTemplate(source, special)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt. RequestError when messages are malformed or the template refuses them."""
        if not messages or len(messages) > MAX_MESSAGES:
            raise RequestError(f"messages must be 1 to {MAX_MESSAGES}, got {len(messages)}")
        for i, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise RequestError(f"messages[{i}] needs a role and a content, both strings")
        try:
            text = self._template.render(messages=[dict(m) for m in messages],
                                         add_generation_prompt=add_generation_prompt, **self._special)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise RequestError(f"the prompt is longer than {MAX_PROMPT_CHARACTERS} characters")
        return text


def _raise(message: str) -> None:
    raise TemplateError(message)


def _read(artifact: Artifact, name: str) -> str | None:
    if name not in artifact.manifest.files:
        return None
    try:
        return artifact.read(name).decode()
    except UnicodeDecodeError:
        raise ArtifactError(f"{name} is not UTF-8") from None
