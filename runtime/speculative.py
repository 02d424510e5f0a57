"""Speculative decoding: cheap guesses of the next tokens, which one step of the model then checks together.

A sequence's step computes its last token and the drafts behind it, and gives a row of logits for each. Tokens are
sampled from these rows one after the other, just as they would be without drafts: a draw depends on its row, the
sequence's tokens before it, and (seed, sample, position) alone. The first one that is not the draft's token is kept, and
what was computed behind it is forgotten. So where a row's bits do not depend on the batch, a request's tokens and
logprobs are the same with and without speculation, for greedy decoding and for sampling alike.

For drafts that are certain of their token, as those of n-grams are, taking the token that was sampled and comparing is the
rejection rule of Leviathan et al. (https://arxiv.org/abs/2211.17192): a draft x is accepted with probability p(x). A draft
model samples with the numbers that the model will use, so that they agree where their distributions do
(https://arxiv.org/abs/2408.07978 calls this drafter-invariant).
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, Protocol

from inferloom.runtime.errors import RequestError
from inferloom.runtime.request import Sequence
from inferloom.runtime.scheduler import Limits

MAX_DRAFT, DEFAULT_DRAFT = 64, 4


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How drafts are made, with vLLM's names.

    `method` "ngram": what followed the last `prompt_lookup_max` (at least `prompt_lookup_min`) tokens when they came
    before; "draft_model": what the artifact `model` says, which has the same tokenizer. At most
    `num_speculative_tokens` a step. RequestError on what makes no sense.
    """

    method: Literal["ngram", "draft_model"] = "ngram"
    num_speculative_tokens: int = DEFAULT_DRAFT
    model: str | os.PathLike[str] | None = None
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        if self.method not in ("ngram", "draft_model"):
            raise RequestError(f"speculative method {self.method!r} is not known: give 'ngram' or 'draft_model'")
        if (self.model is not None) != (self.method == "draft_model"):
            raise RequestError("the speculative method 'draft_model' needs a model, an artifact; 'ngram' takes none")
        if not 1 <= self.num_speculative_tokens <= MAX_DRAFT:
            raise RequestError(f"num_speculative_tokens={self.num_speculative_tokens} must be 1 to {MAX_DRAFT}")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= MAX_DRAFT:
            raise RequestError(f"prompt_lookup_min={self.prompt_lookup_min} and prompt_lookup_max={self.prompt_lookup_max} "
                               f"must be 1 to {MAX_DRAFT}, in this order")

    @classmethod
    def of(cls, value: SpeculativeConfig | str | os.PathLike[str], tokens: int | None = None) -> SpeculativeConfig:
        """Of a config itself, "ngram", or a draft model's artifact."""
        if isinstance(value, cls):
            return value
        count = DEFAULT_DRAFT if tokens is None else tokens
        return cls("ngram", count) if value == "ngram" else cls("draft_model", count, value)  # type: ignore[arg-type]


class Proposer(Protocol):
    """Makes drafts."""

    def propose(self, sequences: Seq[Sequence]) -> None:
        """Set `draft` of these sequences, each of which has one token that is not computed; what is kept of others may go.

        At most as many tokens are taken as the sequence may still get.
        """
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...


def check_speculation(limits: Limits, what: str) -> None:
    """RequestError unless tokens of this model can be taken back."""
    if any(g.recurrent for g in limits.groups):
        raise RequestError(f"{what} keeps a recurrent state, which cannot be rolled back to before a rejected draft: leave "
                           "speculative out, or take another model")
    if limits.facts:
        raise RequestError(f"{what} asks {', '.join(limits.facts)} of each token, which drafts cannot know: leave "
                           "speculative out, or take another model")


class NgramProposer:
    """Drafts from what the sequence holds: the last place where its newest tokens came before (prompt lookup)."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._sizes = range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1)
        self._count = config.num_speculative_tokens
        self._places: dict[Sequence, tuple[dict[tuple[int, ...], int], list[int]]] = {}

    def propose(self, sequences: Seq[Sequence]) -> None:
        known = self._places
        self._places = {s: known.get(s) or ({}, [0]) for s in sequences}
        for sequence, (after, seen) in self._places.items():
            tokens = sequence.tokens
            for end in range(seen[0] + 1, len(tokens)):
                for size in self._sizes:
                    if size <= end:
                        after[tuple(tokens[end - size:end])] = end
            seen[0] = len(tokens) - 1
            place = next((after[key] for size in self._sizes if (key := tuple(tokens[-size:])) in after), None)
            sequence.draft = [] if place is None else _continue(tokens, place, self._count)

    def close(self) -> None:
        self._places = {}


def _continue(tokens: list[int], place: int, count: int) -> list[int]:
    """`count` tokens from `place` on; where the tokens end, what came from there repeats.

    >>> _continue([1, 2, 3, 1, 2], 2, 5)
    [3, 1, 2, 3, 1]
    """
    made = tokens[place:place + count]
    while len(made) < count:
        made.append(made[len(made) - (len(tokens) - place)])
    return made
