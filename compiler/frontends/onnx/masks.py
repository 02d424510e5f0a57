"""What a mask of an ONNX graph means, proved by evaluating it.

A mask is evaluated whole for short sequences, and for lengths past the sum of all numbers that it is computed from, by
where its rule would change. Each query must see an unbroken range of keys that ends at itself; where it starts gives a
causal mask, a sliding window or chunks. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from inferloom.compiler.frontends.onnx.structure import Sample, Structure
from inferloom.ir.errors import UnsupportedError

#: An additive mask hides with this or less; exp of it is 0 in float32. Beside a bias it must be lower.
HIDDEN, HIDDEN_FROM_BIAS = -1e4, -1e9
#: What masks are filled with in half precision: these integers are not lengths.
_FILLS = frozenset({HIDDEN, -65504.0})
#: Longest sequence for which a whole mask is evaluated, in tokens.
LONGEST = 8192


@dataclass(frozen=True, slots=True)
class MaskRef:
    """A mask of the graph: bool (True: visible), or additive, times `factor` (0: visible); `inverted` bool masks hide."""

    name: str
    inverted: bool = False
    factor: float = 1.0


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
    """Causal attention with a sliding `window` or within a `chunk` of positions (0: none), and ALiBi `slopes` by head."""

    window: int = 0
    chunk: int = 0
    slopes: tuple[float, ...] = ()


def prove(structure: Structure, masks: tuple[Mask, ...], max_len: int) -> Rule:
    """The rule that all masks together follow; UnsupportedError when it is none of ours."""
    first: dict[int, int] = {}
    slopes: np.ndarray | None = None
    for sample in _samples(structure, masks, max_len):
        seen, bias = _evaluated(structure, masks, sample)
        for query, start in zip(sample.positions.tolist(), _starts(masks, sample, seen)):
            if first.setdefault(query, start) != start:
                raise UnsupportedError(f"{_named(masks)}: what the token at position {query} sees depends on how the "
                                       "sequence is cut into steps")
        if bias is not None:
            slopes = _slopes(masks, sample, seen, bias, slopes)
    rule = fit(first, masks)
    return rule if slopes is None or not slopes.any() else replace(rule, slopes=tuple(slopes.tolist()))


def _slopes(masks: tuple[Mask, ...], sample: Sample, seen: np.ndarray, bias: np.ndarray, slopes: np.ndarray | None) -> np.ndarray:
    """How much a bias f64 [heads, tokens or 1, keys] grows from one visible key to the next, if always as much."""
    if slopes is None:
        last = np.flatnonzero(seen[-1])
        slopes = (bias[:, -1, last[-1]] - bias[:, -1, last[0]]) / max(1, last[-1] - last[0])
    if len(slopes) != len(bias):
        raise UnsupportedError(f"{_named(masks)} has {len(bias)} heads here and {len(slopes)} there")
    distance = np.arange(sample.keys)[None] - sample.positions[:, None]
    for slope, head in zip(slopes, bias):
        added = np.broadcast_to(head, seen.shape)
        own = added[np.arange(sample.tokens), sample.positions][:, None]
        if np.abs(added - own - slope * distance)[seen].max() > 1e-6 * (1 + np.abs(added[seen]).max()):
            raise UnsupportedError(f"{_named(masks)} adds a bias to scores that is not ALiBi's slope times the distance; no "
                                   "other bias is supported")
    return slopes


def fit(first: dict[int, int], masks: tuple[Mask, ...] = ()) -> Rule:
    """The rule by which the token at a position sees all from `first[position]` to itself.

    >>> fit({0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 9: 7})
    Rule(window=3, chunk=0, slopes=())
    >>> fit({0: 0, 1: 0, 2: 2, 3: 2, 4: 4})
    Rule(window=0, chunk=2, slopes=())
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
    """Lengths that show every change of rule: short ones, the longest, and past the sum of all numbers in the masks."""
    numbers = [m.window for m in masks if isinstance(m, Band)]
    for mask in masks:
        if isinstance(mask, MaskRef):
            numbers += (min(n, max_len) for n in _numbers(structure, mask.name))
    reach = min(max_len, sum(numbers) + 9)
    usual = [s for s in structure.samples if s.keys <= 64]
    if structure.roles.caches:
        lengths = {max_len, reach, *(min(max_len, n + 4) for n in numbers)}
        return [*usual, Sample(0, min(max_len, 512)), *sorted(Sample(max(0, n - 8), min(n, 8)) for n in lengths)]
    if reach > LONGEST:
        raise UnsupportedError(f"{_named(masks)} is computed from the number {max(numbers)}, and the graph has no cache inputs; "
                               f"to evaluate it, lower --max-model-len to {LONGEST}, or export with past_key_values")
    return [*usual, Sample(0, max(reach, min(max_len, 2048)))]


def _numbers(structure: Structure, name: str) -> Iterable[int]:
    """The magnitudes of what a mask is computed from, but for what hides; of large tables their sizes."""
    for source in structure.ancestors(name):
        tensor = structure.graph.tensors.get(source)
        if source in structure.dynamic or source in structure.content:
            continue
        if tensor is not None and tensor.size > 64:
            yield from (d + 1 for d in tensor.shape)
            continue
        values = structure.at(source, structure.samples[0]).astype(np.float64).reshape(-1)
        yield from (int(abs(v)) for v in values[:64] if (v > HIDDEN or v.is_integer()) and abs(v) < 2**31 - 1 and v not in _FILLS)


def _evaluated(structure: Structure, masks: tuple[Mask, ...], sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """What all masks let through, bool [tokens, keys], and what they add, f64 [heads, tokens or 1, keys]."""
    seen = np.ones((sample.tokens, sample.keys), bool)
    bias: np.ndarray | None = None
    for mask in masks:
        if isinstance(mask, Band):
            seen &= _band(mask, sample)
            continue
        visible, added = _visible(structure, mask, sample)
        seen &= visible
        if added is not None:
            bias = added if bias is None else bias + added
    return seen, bias


def _starts(masks: tuple[Mask, ...], sample: Sample, seen: np.ndarray) -> list[int]:
    """The first key that each query of a sample sees."""
    queries, keys = sample.positions[:, None], np.arange(sample.keys)[None]
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


def _visible(structure: Structure, mask: MaskRef, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """bool [tokens, keys], equal for all heads, and the bias f64 [heads, tokens or 1, keys] if there is one."""
    array = structure.at(mask.name, sample, keep=False)
    if mask.factor != 1:
        array = array * array.dtype.type(mask.factor)
    array = array.reshape((1,) * (2 - array.ndim) + array.shape)
    array = array.reshape(-1, *array.shape[-2:])
    full = (sample.tokens, sample.keys)
    if array.shape[1] not in (1, full[0]) or array.shape[2] not in (1, full[1]):
        raise UnsupportedError(f"mask {mask.name!r} is {list(array.shape[1:])} where there are {full[0]} queries and {full[1]} "
                               "keys; if it comes from a table, give --max-model-len as long as that")
    bias = None
    if array.dtype != np.bool_:
        hidden = array <= HIDDEN
        if not (hidden | (array == 0)).all():
            hidden = array <= HIDDEN_FROM_BIAS
            bias = np.broadcast_to(np.where(hidden, 0, array).astype(np.float64), (*array.shape[:2], full[1]))
        array = ~hidden
    if mask.inverted:
        array = ~array
    if (array != array[:1]).any():
        raise UnsupportedError(f"mask {mask.name!r} differs between heads")
    return np.broadcast_to(array[0], full), bias


def _named(masks: tuple[Mask, ...]) -> str:
    named = [f"mask {m.name!r}" for m in masks if isinstance(m, MaskRef)]
    return " with ".join(named) or "the attention"
