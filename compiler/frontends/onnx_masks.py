"""What a mask of an ONNX graph means, proved by evaluating it.

A mask is evaluated whole for short sequences, and for lengths past every number that it is computed from, since only
there a rule can change. Each query must see an unbroken range of keys that ends at itself; where it starts gives a
causal mask, a sliding window or chunks. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from inferloom.compiler.frontends.onnx_fold import Sample, Structure
from inferloom.ir.errors import UnsupportedError

#: An additive mask hides with this or less; exp of it is 0 in float32.
HIDDEN = -1e4
#: Longest sequence for which a whole mask is evaluated, in tokens.
LONGEST = 8192


@dataclass(frozen=True, slots=True)
class MaskRef:
    """A mask of the graph: bool (True: visible), or additive (0: visible); `inverted` bool masks hide."""

    name: str
    inverted: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A mask that an operator's attributes ask for: causal, and at most `window` keys (0: all).

    `past`: positions count from the cached tokens; otherwise the first query of a step sees the first key only.
    """

    window: int = 0
    past: bool = True


Mask = MaskRef | Band


@dataclass(frozen=True, slots=True)
class Rule:
    """Causal attention with a sliding `window` or within a `chunk` of positions (0: none)."""

    window: int = 0
    chunk: int = 0


def prove(structure: Structure, masks: tuple[Mask, ...], max_len: int) -> Rule:
    """The rule that all masks together follow; UnsupportedError when it is none of ours."""
    first: dict[int, int] = {}
    for sample in _samples(structure, masks, max_len):
        for query, start in zip(sample.positions.tolist(), _starts(structure, masks, sample)):
            if first.setdefault(query, start) != start:
                raise UnsupportedError(f"{_named(masks)}: what the token at position {query} sees depends on how the "
                                       "sequence is cut into steps")
    return fit(first, masks)


def fit(first: dict[int, int], masks: tuple[Mask, ...] = ()) -> Rule:
    """The rule by which the token at a position sees all from `first[position]` to itself.

    >>> fit({0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 9: 7})
    Rule(window=3, chunk=0)
    >>> fit({0: 0, 1: 0, 2: 2, 3: 2, 4: 4})
    Rule(window=0, chunk=2)
    """
    narrow = sorted(q for q, start in first.items() if start > 0)
    if not narrow:
        return Rule()
    turn = narrow[0]
    window, chunk = turn - first[turn] + 1, turn
    if all(start == max(0, q - window + 1) for q, start in first.items()):
        return Rule(window=window)
    if all(start == q // chunk * chunk for q, start in first.items()):
        return Rule(chunk=chunk)
    raise UnsupportedError(f"{_named(masks)} is not causal with a sliding window or chunks: the token at position {turn} "
                           f"sees from {first[turn]} on; export the model without it")


def _samples(structure: Structure, masks: tuple[Mask, ...], max_len: int) -> list[Sample]:
    """Lengths that show every change of rule: short ones, and past each number that the masks are made from."""
    numbers = [1, *(m.window for m in masks if isinstance(m, Band))]
    for mask in masks:
        if isinstance(mask, MaskRef):
            numbers += _numbers(structure, mask.name)
    most = min(max_len, max([n for n in numbers if n < max_len], default=1) + 9)
    usual = [s for s in structure.samples if s.keys <= 64]
    if structure.roles.caches:
        longest = {Sample(max(0, n - 8), min(n, 8)) for n in (max_len, *(min(max_len, n + 4) for n in numbers if n < max_len))}
        return [*usual, Sample(0, min(max_len, 40)), *sorted(longest)]
    if most > LONGEST:
        raise UnsupportedError(f"{_named(masks)} is computed from the number {most - 9}, and the graph has no cache inputs; "
                               f"to evaluate it, lower --max-model-len to {LONGEST}, or export with past_key_values")
    return [*usual, Sample(0, min(max_len, max(40, most)))]


def _numbers(structure: Structure, name: str) -> Iterable[int]:
    for source in structure.ancestors(name):
        tensor = structure.graph.tensors.get(source)
        if tensor is None:
            continue
        if tensor.size > 64:
            yield from (d + extra for d in tensor.shape for extra in (0, 1))
        elif tensor.size:
            values = np.abs(np.asarray(tensor.read(), np.float64)).reshape(-1)
            yield from (int(v) for v in values if v < 2**31 - 1)


def _starts(structure: Structure, masks: tuple[Mask, ...], sample: Sample) -> list[int]:
    """The first key that each query of a sample sees."""
    queries, keys = sample.positions[:, None], np.arange(sample.keys)[None]
    seen = np.ones((sample.tokens, sample.keys), bool)
    for mask in masks:
        seen &= _band(mask, sample) if isinstance(mask, Band) else _visible(structure, mask, sample)
    starts = seen.argmax(1)
    wanted = (keys >= starts[:, None]) & (keys <= queries)
    if (seen != wanted).any():
        row = int((seen != wanted).any(1).argmax())
        raise UnsupportedError(
            f"{_named(masks)} is not causal: with {sample.past} cached tokens and {sample.tokens} more, the token at position "
            f"{sample.past + row} sees the keys {np.flatnonzero(seen[row])[:12].tolist()}; only causal decoders are supported")
    return starts.tolist()


def _band(mask: Band, sample: Sample) -> np.ndarray:
    queries = (sample.positions if mask.past else np.arange(sample.tokens))[:, None]
    distance = queries - np.arange(sample.keys)[None]
    return (distance >= 0) & ((distance < mask.window) if mask.window else True)


def _visible(structure: Structure, mask: MaskRef, sample: Sample) -> np.ndarray:
    """bool [tokens, keys], equal for all heads."""
    array = structure.at(mask.name, sample, keep=False)
    if array.dtype != np.bool_:
        hidden = array <= HIDDEN
        if not (hidden | (array == 0)).all():
            odd = array[~(hidden | (array == 0))].flat[0]
            raise UnsupportedError(f"mask {mask.name!r} adds {odd} to scores; only masks of 0 and {HIDDEN:g} or less are "
                                   "supported (a bias on scores is not)")
        array = ~hidden
    if mask.inverted:
        array = ~array
    array = array.reshape((1,) * (2 - array.ndim) + array.shape)
    heads = array.reshape(-1, *array.shape[-2:])
    if (heads != heads[:1]).any():
        raise UnsupportedError(f"mask {mask.name!r} differs between heads")
    return np.asarray(np.broadcast_to(heads[0], (sample.tokens, sample.keys)))


def _named(masks: tuple[Mask, ...]) -> str:
    named = [f"mask {m.name!r}" for m in masks if isinstance(m, MaskRef)]
    return " with ".join(named) or "the attention"
