"""Sampling a token from one row of logits, in NumPy.

A draw depends on the row, the parameters, the sequence's own tokens and (seed, sample index, position) alone: never
on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import Logprob
from inferloom.runtime.params import SamplingParams


def sample(logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int],
           seed: int, index: int, banned: Sequence[int] = ()) -> tuple[int, dict[int, Logprob] | None]:
    """Pick a token from `logits` f32 [vocab]; also its log-probabilities if they were asked for.

    `seed` and `index` (of the sample) key the generator together with the position. `banned` tokens cannot be
    drawn (those that would end the sequence before min_tokens). Log-probabilities are those of the logits after
    penalties and bias, before temperature.
    """
    row = _adjusted(logits, params, prompt, generated, banned)
    if params.greedy:
        token = int(np.argmax(row))
    else:
        key = (seed, index, len(generated))
        token = _draw(row, params, np.random.Generator(np.random.Philox(np.random.SeedSequence(key))))
    return token, None if params.logprobs is None else _logprobs(row, token, params.logprobs)


def _adjusted(logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int],
              banned: Sequence[int]) -> np.ndarray:
    """Logits after penalties, bias and bans; the row itself when there are none."""
    row = logits
    if params.repetition_penalty != 1:
        row = row.copy()
        seen = np.unique(np.asarray([*prompt, *generated], np.int64))
        x = row[seen]
        row[seen] = np.where(x > 0, x / np.float32(params.repetition_penalty), x * np.float32(params.repetition_penalty))
    if generated and (params.presence_penalty or params.frequency_penalty):
        row = row.copy() if row is logits else row
        seen, counts = np.unique(np.asarray(generated, np.int64), return_counts=True)
        row[seen] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts.astype(np.float32)
    if params.logit_bias or banned:
        row = row.copy() if row is logits else row
        for token, bias in params.logit_bias.items():
            row[token] += np.float32(bias)
        row[list(banned)] = -np.inf
    return row


def _draw(row: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    wide = row.astype(np.float64)
    top = wide.max()
    if not np.isfinite(top):
        raise RequestError("no token is left to draw: bias or bans leave none")
    with np.errstate(over="ignore"):
        scaled = (wide - top) / params.temperature  # from the top, so that a tiny temperature cannot overflow
    ids = None
    if 0 < params.top_k < len(scaled):
        # Ties at the edge go to the lower token id, so that the choice does not depend on how they are sorted.
        edge = np.partition(scaled, -params.top_k)[-params.top_k]
        above, equal = np.flatnonzero(scaled > edge), np.flatnonzero(scaled == edge)
        ids = np.concatenate([above, equal[:params.top_k - len(above)]])
        scaled = scaled[ids]
    weights = np.exp(scaled)
    probs = weights / weights.sum()
    if params.min_p > 0:
        probs = np.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if params.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p * probs.sum()]] = 0.0
    choice = int(np.searchsorted(np.cumsum(probs), rng.random() * probs.sum(), side="right"))
    choice = min(choice, int(np.flatnonzero(probs)[-1]))
    return choice if ids is None else int(ids[choice])


def _logprobs(row: np.ndarray, token: int, count: int) -> dict[int, Logprob]:
    """The `count` most likely tokens and the chosen one."""
    wide = row.astype(np.float64)
    top = wide.max()
    total = top + np.log(np.exp(wide - top).sum())
    best = np.argpartition(-wide, count - 1)[:count] if 0 < count < len(wide) else np.arange(len(wide))[:count]
    best = best[np.argsort(-wide[best], kind="stable")]
    found = {int(t): Logprob(float(wide[t] - total), rank + 1) for rank, t in enumerate(best)}
    if token not in found:
        found[token] = Logprob(float(wide[token] - total), int((wide > wide[token]).sum()) + 1)
    return found
