"""Requests, and the sequences (samples) that they consist of."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.detokenizer import Detokenizer
from inferloom.runtime.facts import Facts
from inferloom.runtime.guide import Guide
from inferloom.runtime.leases import Outcome
from inferloom.runtime.outputs import Logprob
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.pooling import Pool
from inferloom.runtime.state import Held


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request: its tokens, and which of them are in the cache.

    `computed` tokens have state in what is `held` of each group, which has `room` for so many without a change;
    `keys` are the hashes of the full blocks among them. `draft` are guesses of what comes after `tokens`, to be checked in
    the next step. Of `tokens`, the last `speculated` may still be taken back.
    """

    request: Request
    index: int
    tokens: list[int]
    running: bool = False
    computed: int = 0
    room: int = 0
    held: list[Held] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    speculated: int = 0
    facts: Facts | None = None
    guide: Guide | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    text: Detokenizer | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    def rows(self, count: int) -> range:
        """Positions among the next `count` whose logits say how likely the prompt's next token was, if that is asked; or
        whose hidden states are wanted for a mean."""
        request = self.request
        if not request.scores or self.index:
            return range(0)
        return range(max(self.computed, request.scored),
                     min(self.computed + count, len(request.prompt_ids) - 1))

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids):]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt with `n` samples. Lower `priority` runs first; ties go by arrival. Only requests with the same `salt`
    share cached prefixes. What its first sample computed is remembered as `session`, and held for `hold` seconds in `place`;
    `held` is what became of that.

    A sample ends with one of the tokens `ends`, but not before it has `least` tokens; or when it has `most`; its prompt's
    count too. With a `pool` nothing is sampled: the prompt is embedded.
    """

    id: str
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    arrival: int
    priority: int = 0
    salt: bytes = b""
    session: str | None = None
    hold: float = 0.0
    place: str = "auto"
    seed: int = 0
    ends: frozenset[int] = frozenset()
    least: int = 0
    most: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    sequences: list[Sequence] = field(default_factory=list)
    error: str | None = None
    held: Outcome | None = None
    pool: Pool | None = None
    embedding: NDArray[np.float32] | None = None
    plain: bool = field(init=False)
    sharpness: float = field(init=False)  # 1 / temperature, 1 if that is 0
    scores: bool = field(init=False)  # whether all rows of the prompt are wanted

    def __post_init__(self) -> None:
        self.plain, self.sharpness = self.params.plain and self.pool is None, 1 / (self.params.temperature or 1)
        self.scores = self.params.prompt_logprobs is not None if self.pool is None else self.pool.mean
        self.sequences = [Sequence(self, i, list(self.prompt_ids)) for i in range(self.params.n)]

    @property
    def scored(self) -> int:
        """Rows of the prompt that were wanted and have come."""
        return len(self.prompt_logprobs) - 1 if self.pool is None else self.pool.count

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)
