"""Chat templates: the artifact's own, in Jinja's sandbox. No request can bring a template."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.errors import ArtifactError, RequestError

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_MESSAGES = 4096
MAX_SECONDS = 2.0
MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024
#: What templates may be told besides messages and tools.
OPTIONS = ("enable_thinking", "thinking", "reasoning_effort")


class ChatTemplate:
    """Renders messages into a prompt."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise ArtifactError(f"the chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols", GenerationTag])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        self._template: Template | None = None
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:  # completions work without it: only a chat is refused
            self._broken = str(error)
        self._special = dict(special_tokens)

    @staticmethod
    def of(artifact: Artifact) -> ChatTemplate | None:
        """The artifact's template, or None when it has none."""
        try:
            config = json.loads(_read(artifact, "tokenizer/tokenizer_config.json") or "{}")
        except ValueError as error:
            raise ArtifactError(f"tokenizer/tokenizer_config.json is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ArtifactError("tokenizer/tokenizer_config.json is not an object")
        source = _read(artifact, "tokenizer/chat_template.jinja") or config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
        return ChatTemplate(source, special)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True,
               tools: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> str:
        """The prompt; `tools` are functions that the model may call, `options` are names of `OPTIONS`.

        RequestError when messages are malformed or the template refuses them.
        """
        if unknown := options.keys() - OPTIONS:
            raise RequestError(f"chat templates take no {', '.join(sorted(unknown))}; they take {', '.join(OPTIONS)}")
        if not messages or len(messages) > MAX_MESSAGES:
            raise RequestError(f"messages must be 1 to {MAX_MESSAGES}, got {len(messages)}")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not (
                    isinstance(message.get("content"), str) or message.get("tool_calls")):
                raise RequestError(f"messages[{i}] needs a role and a content, both strings")
        if self._template is None:
            raise RequestError(f"the artifact's chat template does not parse: {self._broken}")
        deadline, parts, size = time.monotonic() + MAX_SECONDS, [], 0
        try:
            for part in self._template.generate(messages=[dict(m) for m in messages],
                                                add_generation_prompt=add_generation_prompt,
                                                **({"tools": [dict(t) for t in tools]} if tools else {}),
                                                **options, **self._special):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT_CHARACTERS or time.monotonic() > deadline:
                    raise RequestError(f"the prompt takes more than {MAX_PROMPT_CHARACTERS} characters or "
                                       f"{MAX_SECONDS} seconds to write")
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None
        return "".join(parts)


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what to train on in some templates; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _read(artifact: Artifact, name: str) -> str | None:
    if name not in artifact.manifest.files:
        return None
    try:
        return artifact.read(name).decode()
    except UnicodeDecodeError:
        raise ArtifactError(f"{name} is not UTF-8") from None
