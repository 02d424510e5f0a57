"""What a sequence holds of each group of state (manifest.StateGroup): blocks, and when it may let them go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.manifest import StateGroup

Int32 = NDArray[np.int32]

#: One block in each table of a group.
Blocks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """`window` keys are kept (0: all); `tables` blocks for every `block_tokens` tokens, or for a sequence."""

    tables: int = 1
    window: int = 0
    recurrent: bool = False

    @classmethod
    def of(cls, group: StateGroup) -> Group:
        return cls(group.tables, group.window, group.kind == "recurrent")

    def first(self, computed: int, block_tokens: int) -> int:
        """The first block that the token after `computed` ones needs."""
        return max(0, computed - self.window + 1) // block_tokens if self.window else 0

    def most(self, tokens: int, step: int, block_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds at most, `step` of them computed at once."""
        if self.recurrent:
            return 2 * self.tables  # one that is read and may stay cached, one that is written
        if self.window:
            tokens = min(tokens, self.window + step + 2 * block_tokens)
        return -(-tokens // block_tokens) * self.tables


#: The state of an ordinary model.
ALL_KEYS = (Group(),)


@dataclass(slots=True)
class Held:
    """What a sequence holds of one group.

    Of keys and values, `blocks[i]` has tokens `i * block_tokens` and on; None once they are behind the window. Of a
    recurrent group, `blocks` is empty or [now]: the state after all computed tokens; the step that is under way reads
    that and writes `next`, if there is one.
    """

    blocks: list[Blocks | None] = field(default_factory=list)
    next: Blocks | None = None

    def __iter__(self) -> Iterator[Blocks]:
        yield from (b for b in self.blocks if b is not None)
        if self.next is not None:
            yield self.next


def longest(groups: Sequence[Group], blocks: int, step: int, block_tokens: int, most: int) -> int:
    """How many tokens a sequence may have, at most `most`, so that its state fits into so many blocks."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(g.most(middle, step, block_tokens) for g in groups) <= blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def fill_tables(groups: Sequence[Group], held: Sequence[Sequence[Held]], width: int) -> tuple[Int32, Int32]:
    """A step's block_tables [K, S, width] and pages [N, S, 2] for what each of S sequences holds of each group."""
    tables = np.zeros((sum(g.tables for g in groups if not g.recurrent), len(held), width), np.int32)
    pages = np.zeros((sum(g.tables for g in groups if g.recurrent), len(held), 2), np.int32)
    at = {False: 0, True: 0}
    for number, group in enumerate(groups):
        first, none = at[group.recurrent], (0,) * group.tables
        part = slice(first, first + group.tables)
        at[group.recurrent] += group.tables
        for i, each in enumerate(held):
            blocks = [none if b is None else b for b in each[number].blocks]
            if group.recurrent:
                (now,) = blocks
                pages[part, i] = np.array([now, each[number].next or now], np.int32).T
            elif blocks:
                tables[part, i, :len(blocks)] = np.array(blocks, np.int32).T
    return tables, pages
