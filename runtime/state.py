"""What a sequence holds of each group of state (manifest.StateGroup): blocks, and when it may let them go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_

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


#: Columns of block tables are made so many at a time, so that they need not grow at every block.
SPARE = 16
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


class Tables:
    """A step's block_tables [K, S, `width` or fewer] and pages [N, S, 2], kept from one step to the next.

    While the same sequences run, only blocks that are new to them are written. Of a sequence's blocks, those behind a
    window may be any, as those after its end.
    """

    def __init__(self, groups: Sequence[Group], width: int) -> None:
        self._width = width
        self._kv: list[tuple[int, slice]] = []  # groups of keys and values, and their tables
        self._recurrent: list[tuple[int, slice]] = []
        for number, group in enumerate(groups):
            places = self._recurrent if group.recurrent else self._kv
            first = places[-1][1].stop if places else 0
            places.append((number, slice(first, first + group.tables)))
        self._held: list[Sequence[Held]] = []
        self._known: list[list[int]] = []  # blocks of each group of keys and values that are in the table, by sequence
        self._tables, self._pages = np.zeros((0, 0, 0), np.int32), np.zeros((0, 0, 2), np.int32)
        self.changes = 0  # how often block_tables changed

    def of(self, held: list[Sequence[Held]]) -> tuple[Int32, Int32]:
        """The arrays for what each sequence holds; they are overwritten by the next call."""
        lens = [[len(each[number].blocks) for each in held] for number, _ in self._kv]
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            self._begin(held)
        if lens != self._known:
            if max(map(max, lens)) > self._tables.shape[2]:
                self._begin(held)
            self._extend(held)
        for number, part in self._recurrent:
            for i, each in enumerate(held):
                (now,) = each[number].blocks
                self._pages[part, i] = np.array([now, each[number].next or now], np.int32).T
        return self._tables, self._pages

    def _extend(self, held: list[Sequence[Held]]) -> None:
        for (number, part), known in zip(self._kv, self._known):
            for i, each in enumerate(held):
                blocks = each[number].blocks
                if len(blocks) != known[i]:
                    none = (0,) * (part.stop - part.start)
                    new = [none if b is None else b for b in blocks[known[i]:]]
                    self._tables[part, i, known[i]:len(blocks)] = np.array(new, np.int32).T
                    known[i] = len(blocks)
        self.changes += 1

    def _begin(self, held: list[Sequence[Held]]) -> None:
        longest = max((len(each[number].blocks) for number, _ in self._kv for each in held), default=0)
        width = min(self._width, -(-longest // SPARE) * SPARE) if self._kv else self._width
        self._tables = np.zeros((self._kv[-1][1].stop if self._kv else 0, len(held), width), np.int32)
        self._pages = np.zeros((self._recurrent[-1][1].stop if self._recurrent else 0, len(held), 2), np.int32)
        self._held, self._known = held, [[0] * len(held) for _ in self._kv]
        self.changes += 1
