"""Fields that bodies share, and their bounds. What is not known is ignored, unless it would change the answer's meaning."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from inferloom.runtime.params import MAX_SAMPLES, SamplingParams
from inferloom.runtime.server.api.wishes import MAX_ID, Hint, openai_hint
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.wire import Grammar
from inferloom.runtime.sessions import LONGEST_ON_DISK
from inferloom.runtime.structured_limits import MAX_GRAMMAR_BYTES

MAX_STOPS = 16
MAX_BIASES = 1024
#: Requests with prompts in a list, and sequences that they make together.
MAX_PROMPTS = 256
MAX_SEQUENCES = 1024

Name = Annotated[str, StringConstraints(max_length=256)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A JSON object. `refused` maps fields that would change the meaning to the values that do not."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, harmless in cls.refused.items():
                if name in data and data[name] is not None and data[name] not in harmless:
                    raise ValueError(f"{name} is not supported here: leave it out")
        return data


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    name: Name = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    type: Name
    json_schema: JsonSchema | None = None


class Structured(Body):
    """What the answer must be, as vLLM's `structured_outputs`: one of them."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"structural_tag": ()}
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Annotated[str, StringConstraints(max_length=MAX_GRAMMAR_BYTES)] | None = None
    grammar: Annotated[str, StringConstraints(max_length=MAX_GRAMMAR_BYTES)] | None = None
    choice: Annotated[list[Name], Field(min_length=1, max_length=1024)] | None = None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a session's name has printable characters only")
    return text


class Remembered(Body):
    """How a request's state is remembered when it is done."""

    session_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID), AfterValidator(_printable)] | None = None
    session_hold: Annotated[float, Field(gt=0, le=LONGEST_ON_DISK)] | None = None


class Keyed(Remembered):
    """The same in OpenAI's words, too."""

    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def hint(self) -> Hint:
        """What these say."""
        return openai_hint(self.prompt_cache_key, self.prompt_cache_retention)


class Sampled(Keyed):
    """What completions and chats have in common."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_beam_search": (False,), "logits_processors": ([],), "chat_template": (), "lora_request": (),
        "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "bad_words": ([],),
        "truncate_prompt_tokens": (), "allowed_token_ids": (), "vllm_xargs": ({},), "kv_transfer_params": ({},),
        "length_penalty": (1, 1.0), "spaces_between_special_tokens": (True,), "detokenize": (True,),
        "return_tokens_as_token_ids": (False,), "logprob_token_ids": ([],)}

    model: Name | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    seed: Annotated[int, Field(ge=-2**63, lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOPS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 0
    ignore_eos: bool | None = False
    logit_bias: Annotated[dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")],
                               Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = None
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    priority: Annotated[int, Field(ge=-2**31, lt=2**31)] | None = 0
    cache_salt: Salt | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structured | None = None

    def sampling(self, max_tokens: int, logprobs: int | None = None, prompt_logprobs: int | None = None,
                 **changes: Any) -> SamplingParams:
        """The parameters, with `max_tokens` at most."""
        made: dict[str, Any] = {name: getattr(self, name) for name in (
            "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "include_stop_str_in_output",
            "skip_special_tokens") if getattr(self, name) is not None}
        if self.seed is not None:
            made["seed"] = self.seed % 2**64
        made["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        return SamplingParams(**made | {"max_tokens": max_tokens, "logprobs": logprobs,
                                        "prompt_logprobs": prompt_logprobs} | changes)

    def salted(self, salt: bytes) -> bytes:
        """The salt of whoever asks, and the request's own."""
        return salted(salt, self.cache_salt)

    def grammar(self) -> Grammar | None:
        """What the answer must be. HttpError 400 when that is contradictory or not known."""
        found = [g for g in (_of_format(self.response_format), _of_structured(self.structured_outputs)) if g is not None]
        if len(found) > 1:
            raise bad_request("response_format and structured_outputs are both given", "structured_outputs")
        return found[0] if found else None


def salted(salt: bytes, more: str | None) -> bytes:
    """The salt of whoever asks, divided further by one of its own."""
    return salt if more is None else salt + b"\0" + more.encode("utf-8", "surrogatepass")


def json_schema(schema: dict[str, Any] | str) -> Grammar:
    """Text that fits a JSON schema. HttpError 400 when it is too large."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    if len(text) > MAX_GRAMMAR_BYTES:
        raise bad_request(f"a JSON schema has at most {MAX_GRAMMAR_BYTES:,} bytes", "response_format")
    return Grammar("json_schema", text)


def _of_format(form: ResponseFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_schema({"type": "object"})
    if form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise bad_request("response_format.json_schema.schema is missing", "response_format")
        return json_schema(form.json_schema.schema_)
    raise bad_request(f"response_format.type {form.type!r} is not known: use text, json_object or json_schema",
                      "response_format")


def _of_structured(wanted: Structured | None) -> Grammar | None:
    if wanted is None:
        return None
    found: list[Grammar] = []
    if wanted.json_ is not None:
        found.append(json_schema(wanted.json_))
    if wanted.json_object:
        found.append(json_schema({"type": "object"}))
    if wanted.regex is not None:
        found.append(Grammar("regex", wanted.regex))
    if wanted.grammar is not None:
        found.append(Grammar("lark", wanted.grammar))
    if wanted.choice is not None:
        found.append(Grammar("lark", "start: " + " | ".join(json.dumps(c) for c in wanted.choice)))
    if len(found) != 1:
        raise bad_request("structured_outputs needs exactly one of json, json_object, regex, grammar, choice",
                          "structured_outputs")
    return found[0]
