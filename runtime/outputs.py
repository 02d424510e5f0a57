"""What a request gives back, shaped as vLLM's outputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token (natural logarithm) and its rank among all, counted from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample. `finish_reason` is "stop", "length" or "abort", None while it runs; `stop_reason` says which
    stop string or token id ended it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All samples of a request so far; `error` says why a request failed.

    `prompt_logprobs`, if they were asked for, has an entry for each token of the prompt; the first token has None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
