"""What a request gives back, shaped as vLLM's outputs.

Every step makes two of these for each request, so they are not frozen: that would take four times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.leases import Outcome


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token (natural logarithm) and its rank among all, counted from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class TokenIds(Sequence[int]):
    """The ids of a sequence's tokens from `begin` to `end`, without a copy; equal to a tuple of them.

    `tokens` may grow meanwhile, but what is there never changes.
    """

    __slots__ = ("_begin", "_end", "_tokens")

    def __init__(self, tokens: list[int], begin: int, end: int) -> None:
        self._tokens, self._begin, self._end = tokens, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        if isinstance(index, slice):
            return tuple(self._tokens[self._begin:self._end][index])
        return self._tokens[range(self._begin, self._end)[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (TokenIds, tuple)) and self[:] == other[:]

    def __hash__(self) -> int:
        return hash(self[:])

    def __repr__(self) -> str:
        return repr(self[:])


@dataclass(slots=True)
class CompletionOutput:
    """One sample. `finish_reason` is "stop", "length" or "abort", None while it runs; `stop_reason` says which
    stop string or token id ended it."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(slots=True)
class RequestOutput:
    """All samples of a request so far; `error` says why a request failed.

    `prompt_logprobs`, if they were asked for, has an entry for each token of the prompt; the first token has None. `held`:
    what became of the wish to hold its session, once that is known. `embedding` f32 [hidden]: what was pooled, if the
    request was to embed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    held: Outcome | None = None
    embedding: NDArray[np.float32] | None = None
