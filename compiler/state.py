"""Which blocks hold which layer's state.

All state lives in one pool of blocks of one size, so that any block can serve any layer. Layers whose state lives and
dies alike form a group: those that keep all keys, those that keep a window of the same length, those whose state has a
fixed size. What a group keeps of `block_tokens` tokens (of a whole sequence, where its size is fixed) takes one block in
each of the group's tables, and a layer has its place in one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferloom.ir.expr import Expr
from inferloom.ir.types import RecurrentType, StateType

#: States start at multiples of this many bytes within a page.
ALIGN = 64
PAGED, WINDOW, RECURRENT = "paged_kv", "window_kv", "recurrent"
#: What one more table costs, as a share of the bytes of a block: it is filled on the host and read by kernels.
TABLE_COST = 0.01


@dataclass(frozen=True, slots=True)
class Need:
    """State of one layer: `size` bytes of a block; `window` keys are kept (0: all)."""

    size: int
    kind: str = PAGED
    window: int = 0


def need(type: StateType | RecurrentType, window: int = 0, by_block: bool = False) -> Need:
    """What a layer's state needs; `window` as `window_of` gives it. `by_block`: a page for each block of tokens."""
    if isinstance(type, RecurrentType):
        return Need(_align(type.bytes), PAGED if by_block else RECURRENT)
    return Need(_align(type.bytes_per_block), WINDOW if window else PAGED, window)


def window_of(first: object, longest: int) -> int:
    """How many keys, its own included, the query that looks back farthest sees; 0: all, of `longest` tokens.

    `first` is the first key that a query at `q_pos` sees; what it loads of a query counts as 0.
    """
    if not isinstance(first, Expr):
        raise TypeError(first)
    q_pos = np.arange(longest)
    env = defaultdict(lambda: np.zeros(longest, np.int32), q_pos=q_pos, token=q_pos)
    window = int(np.max(q_pos - np.asarray(first.evaluate(env)), initial=0)) + 1
    return window if window < longest else 0


def widest(a: int, b: int) -> int:
    """The window that holds what both windows do (0: all)."""
    return max(a, b) if a and b else 0


def _align(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Place:
    """Table (counted over all groups of keys and values, or over all of fixed size), byte offset in its blocks."""

    table: int
    offset: int


@dataclass(frozen=True, slots=True)
class Group:
    """`members` are indices into the needs; `tables` are those that are the group's own."""

    kind: str
    window: int
    tables: range
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StatePlan:
    """Bytes of a block; a place for each need."""

    block: int
    groups: tuple[Group, ...]
    places: tuple[Place, ...]


def plan_state(needs: Sequence[Need]) -> StatePlan:
    """Group the needs and choose the size of a block that wastes least.

    >>> plan_state([Need(64), Need(64)]).block
    128
    >>> made = plan_state([Need(64, WINDOW, 32)] * 3 + [Need(64)])
    >>> made.block, [(g.kind, list(g.tables)) for g in made.groups]
    (64, [('paged_kv', [0]), ('window_kv', [1, 2, 3])])
    """
    kinds = {(n.kind, n.window): None for n in needs}
    order = sorted(kinds, key=lambda k: ((PAGED, WINDOW, RECURRENT).index(k[0]), k[1]))
    members = {kind: [i for i, n in enumerate(needs) if (n.kind, n.window) == kind] for kind in order}
    largest = max((n.size for n in needs), default=0)
    sizes = set[int]()
    for group in members.values():
        total = 0
        for i in group:
            total += needs[i].size
            sizes.add(max(total, largest))

    def cost(block: int) -> float:
        tables = [len(_pack([needs[i].size for i in group], block)) for group in members.values()]
        return sum(t * block * (1 + TABLE_COST * t) for t in tables)

    block = min(sorted(sizes, reverse=True), key=cost, default=0)
    places: dict[int, Place] = {}
    groups = []
    counts = {True: 0, False: 0}
    for (kind, window), group in members.items():
        packed = _pack([needs[i].size for i in group], block)
        first = counts[kind == RECURRENT]
        for number, layers in enumerate(packed):
            offset = 0
            for at in layers:
                places[group[at]] = Place(first + number, offset)
                offset += needs[group[at]].size
        counts[kind == RECURRENT] += len(packed)
        groups.append(Group(kind, window, range(first, first + len(packed)), tuple(group)))
    return StatePlan(block, tuple(groups), tuple(places[i] for i in range(len(needs))))


def _pack(sizes: Sequence[int], block: int) -> list[list[int]]:
    """Bins of at most `block` bytes, first fit."""
    bins: list[tuple[list[int], int]] = []
    for i, size in enumerate(sizes):
        for number, (held, used) in enumerate(bins):
            if used + size <= block:
                bins[number] = ([*held, i], used + size)
                break
        else:
            bins.append(([i], size))
    return [held for held, _ in bins]
