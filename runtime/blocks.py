"""The block pool: reference counts, and a cache of finished blocks by content.

A block is free when nobody holds it. A free block may still be cached: it keeps its content until the pool needs
it, least recently used first, and can be taken back by its key.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from inferloom.runtime.errors import RequestError

#: A group of state, and the hash of all tokens up to the end of what is cached.
Key = tuple[int, bytes]


class OutOfBlocks(RequestError):
    """The pool has no free block; the scheduler preempts on it."""


class BlockPool:
    """`size` blocks, numbered from 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._refs = [0] * size
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(size))
        self._key_of: dict[int, Key] = {}
        self._by_key: dict[Key, tuple[int, ...]] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free)

    def allocate(self) -> int:
        """A block with one holder; blocks that hold no cached content go first. OutOfBlocks when none is free."""
        if not self._free:
            raise OutOfBlocks(f"all {self.size} blocks are held")
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more holder."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block, which stays cached if it has a key."""
        if self._refs[block] <= 0:
            raise ValueError(f"block {block} is released more often than it was held")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None
            if block not in self._key_of:
                self._free.move_to_end(block, last=False)

    def references(self, block: int) -> int:
        return self._refs[block]

    def register(self, blocks: tuple[int, ...], key: Key) -> None:
        """Cache held, completely filled blocks together under `key`; the first blocks of a key stay."""
        if key not in self._by_key:
            for block in blocks:
                self._forget(block)
            self._by_key[key] = blocks
            self._key_of.update((block, key) for block in blocks)

    def lookup(self, key: Key) -> tuple[int, ...] | None:
        """The blocks cached under `key`; the caller must `retain` them before anything is allocated."""
        return self._by_key.get(key)

    def is_cached(self, block: int) -> bool:
        """Whether others may find the block's content, so that it must not change."""
        return block in self._key_of

    def _forget(self, block: int) -> None:
        """Without one of its blocks, what is cached under a key is worth nothing."""
        key = self._key_of.pop(block, None)
        if key is not None:
            for other in self._by_key.pop(key):
                if self._key_of.pop(other, None) is not None and other in self._free:
                    self._free.move_to_end(other, last=False)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise ValueError unless the holders' blocks (one entry a holder) explain every reference count."""
        counts = Counter(held)
        for block in range(self.size):
            if self._refs[block] != counts.get(block, 0):
                raise ValueError(f"block {block} has {self._refs[block]} references, its holders make "
                                 f"{counts.get(block, 0)}")
            if (self._refs[block] == 0) != (block in self._free):
                raise ValueError(f"block {block} is free and held at once, or neither")
        if self._key_of != {block: key for key, blocks in self._by_key.items() for block in blocks}:
            raise ValueError("the block cache's two indices disagree")
