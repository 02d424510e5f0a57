"""How a request wants its tokens sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from inferloom.runtime.errors import RequestError

MAX_SAMPLES = 128
MAX_LOGPROBS = 1024
MAX_STOPS = 64
MAX_BIAS = 1e6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters with vLLM's names and meanings.

    `temperature` 0 is greedy. `top_k` 0 or -1 means all tokens. `logprobs` asks for that many most likely tokens
    a position, `prompt_logprobs` the same of the prompt. Out of range values raise RequestError.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            _check(_whole(getattr(self, name)), f"{name} must be an integer, got {getattr(self, name)!r}")
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or _whole(value), f"{name} must be an integer or None, got {value!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        _check(isinstance(stop, Sequence), f"stop must be a string or a list of them, got {self.stop!r}")
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        _check(isinstance(ids, Sequence) and all(map(_whole, ids)), "stop_token_ids must be a list of token ids")
        bias = {} if self.logit_bias is None else self.logit_bias
        _check(isinstance(bias, Mapping) and all(map(_whole, bias)), "logit_bias must map token ids to numbers")
        stop = tuple(stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "logit_bias", dict(bias))
        _check(1 <= self.n <= MAX_SAMPLES, f"n must be between 1 and {MAX_SAMPLES}, got {self.n}")
        _check(_finite(self.temperature) and self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}")
        _check(_finite(self.top_p) and 0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _check(self.top_k >= -1, f"top_k must be -1, 0 or positive, got {self.top_k}")
        _check(_finite(self.min_p) and 0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        _check(_finite(self.repetition_penalty) and self.repetition_penalty > 0,
               f"repetition_penalty must be positive, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_finite(value) and -2 <= value <= 2, f"{name} must be in [-2, 2], got {value}")
        _check(len(stop) <= MAX_STOPS and all(isinstance(s, str) and s for s in stop),
               f"stop must be at most {MAX_STOPS} non-empty strings")
        _check(self.max_tokens is None or self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        _check(self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
               f"min_tokens must be between 0 and max_tokens, got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS,
                   f"{name} must be between 0 and {MAX_LOGPROBS}, got {value}")
        _check(self.seed is None or 0 <= self.seed < 2**64, "seed must be an unsigned 64-bit integer")
        _check(all(_finite(b) and abs(b) <= MAX_BIAS for b in self.logit_bias.values()),
               f"logit_bias must be numbers of at most {MAX_BIAS}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the most likely token is taken as the model gives it, and nothing else is asked of its logits."""
        return self.greedy and self.logprobs is None and self.repetition_penalty == 1 and not (
            self.presence_penalty or self.frequency_penalty or self.logit_bias)


def _finite(value: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RequestError(message)
