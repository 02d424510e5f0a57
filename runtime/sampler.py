"""Sampling a token from one row of logits, in NumPy.

A draw depends on the row, the parameters, the sequence's own tokens and (seed, sample index, position) alone: never
on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from math import isfinite

import numpy as np

from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import Logprob
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.top import TopRow, TopRows

#: f32 [rows, vocab], or the largest of each row.
Rows = np.ndarray | TopRows


def best_of(logits: Rows) -> tuple[list[int], list[bool]]:
    """The most likely token of each row, the lowest id of equals; and whether its logit is finite: a NaN counts as the
    largest of its row."""
    if isinstance(logits, TopRows):
        return logits.best()
    best = [int(row.argmax()) for row in logits]
    return best, np.isfinite(logits[np.arange(len(best)), best]).tolist()


_NONE_LEFT = "no token is left to draw: bias, bans or a grammar leave none"


def sample(logits: np.ndarray | TopRow, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int],
           seed: int, index: int, banned: Sequence[int] = (),
           allowed: np.ndarray | None = None) -> tuple[int, dict[int, Logprob] | None]:
    """Pick a token from `logits` f32 [vocab]; also its log-probabilities if they were asked for.

    Of a `TopRow` only the largest logits are looked at where they decide; else the whole row is fetched.

    `seed` and `index` (of the sample) key the draw together with the position. `banned` tokens cannot be
    drawn (those that would end the sequence before min_tokens), nor what is not `allowed` (bool [vocab]).
    Log-probabilities are those of the logits after penalties and bias, before temperature.
    """
    key = (seed, index, len(generated))
    drawn = None if params.greedy else _uniform(key)
    if isinstance(logits, TopRow):
        if params.logprobs is None and allowed is None and not _adjusts(params, generated, banned):
            found = _from_top(logits, params, drawn)
            if found is not None:
                return found, None
        logits = logits.row()
    row = _adjusted(logits, params, prompt, generated, banned)
    if allowed is not None:
        row = np.where(allowed, row, np.float32(-np.inf))
    token = int(np.argmax(row)) if drawn is None else _draw(row, params, drawn)
    if row[token] == -np.inf:
        raise RequestError(_NONE_LEFT)
    return token, None if params.logprobs is None else _logprobs(row, token, params.logprobs)


def _uniform(key: tuple[int, int, int]) -> float:
    """From 0 to 1 (exclusive), 53 bits of a hash: a generator of its own for each token would take 20 times as long to make."""
    return (int.from_bytes(blake2b(b"%d %d %d" % key, digest_size=8).digest()) >> 11) * 2.0**-53


def _adjusts(params: SamplingParams, generated: Sequence[int], banned: Sequence[int]) -> bool:
    """Whether `_adjusted` may change the row."""
    return bool(params.repetition_penalty != 1 or params.logit_bias or banned
                or (generated and (params.presence_penalty or params.frequency_penalty)))


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


def _draw(row: np.ndarray, params: SamplingParams, drawn: float) -> int:
    wide = row.astype(np.float64)
    top = wide.max()
    if not np.isfinite(top):
        raise RequestError(_NONE_LEFT)
    with np.errstate(over="ignore"):
        scaled = (wide - top) / params.temperature  # from the top, so that a tiny temperature cannot overflow
    ids: np.ndarray = np.arange(len(scaled))
    if 0 < params.top_k < len(scaled):
        # Ties at the edge go to the lower token id, so that the choice does not depend on how they are sorted.
        edge = np.partition(scaled, -params.top_k)[-params.top_k]
        above, equal = np.flatnonzero(scaled > edge), np.flatnonzero(scaled == edge)
        ids = np.concatenate([above, equal[:params.top_k - len(above)]])
        scaled = scaled[ids]
    return _pick(scaled, ids, params, drawn)


def _from_top(row: TopRow, params: SamplingParams, drawn: float | None) -> int | None:
    """What `_draw` would draw, if the largest logits decide it."""
    if not len(row.ids) or not isfinite(row.values[0]):
        return None
    if drawn is None:
        return int(row.ids[0])
    if params.top_k <= 0 and params.min_p == 0 and params.top_p == 1:
        return None if row.sums is None else _from_sums(row, row.sums, params, drawn)
    with np.errstate(over="ignore"):
        scaled = (row.values.astype(np.float64) - np.float64(row.values[0])) / params.temperature
    ids = row.ids
    if 0 < params.top_k <= len(ids):
        ids, scaled = ids[:params.top_k], scaled[:params.top_k]
        order = np.lexsort((ids, scaled == scaled[-1]))  # as `_draw` has them: those above the edge, then those at it
        return _pick(scaled[order], ids[order], params, drawn)
    if params.top_k > 0:
        return None
    probs = np.exp(scaled - row.log_sum)
    if params.min_p > 0 and probs[-1] < params.min_p * probs[0]:
        kept = probs >= params.min_p * probs[0]
    elif params.min_p == 0 and params.top_p < 1 and probs[:-1].sum() >= params.top_p:
        kept = np.cumsum(probs) - probs < params.top_p
        params = replace(params, top_p=1.0)
    else:
        return None
    order = np.argsort(ids[kept])
    return _pick(scaled[kept][order], ids[kept][order], params, drawn)


def _from_sums(row: TopRow, sums: np.ndarray, params: SamplingParams, drawn: float) -> int:
    """One of all tokens: the run that the draw falls in, and then the token in it."""
    ends = sums.cumsum(dtype=np.float64)
    drawn *= ends[-1]
    run = _last(sums, int(ends.searchsorted(drawn, side="right")))
    first = run * row.columns
    logits = row.row()[first:first + row.columns].astype(np.float64)
    with np.errstate(over="ignore"):
        weights = np.exp((logits - np.float64(row.values[0])) / params.temperature)
    choice = int(weights.cumsum().searchsorted(drawn - (ends[run - 1] if run else 0.0), side="right"))
    return first + _last(weights, choice)


def _last(weights: np.ndarray, choice: int) -> int:
    """`choice`, or the last with a weight if rounding put the draw behind it."""
    return choice if choice < len(weights) and weights[choice] > 0 else min(choice, int(np.flatnonzero(weights)[-1]))


def _pick(scaled: np.ndarray, ids: np.ndarray, params: SamplingParams, drawn: float) -> int:
    """One of `ids` with logits `scaled`, after min-p and top-p."""
    weights = np.exp(scaled)
    probs = weights / weights.sum()
    if params.min_p > 0:
        probs = np.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if params.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p * probs.sum()]] = 0.0
    return int(ids[_last(probs, int(probs.cumsum().searchsorted(drawn * probs.sum(), side="right")))])


def token_logprobs(logits: np.ndarray | TopRow, token: int, count: int) -> dict[int, Logprob]:
    """Log-probabilities of the `count` most likely tokens and of `token`, from one row of logits."""
    return _logprobs(logits.row() if isinstance(logits, TopRow) else logits, token, count)


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
