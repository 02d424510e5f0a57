"""The block pool: reference counts, and a cache of finished blocks by content.

A block is free when nobody holds it. A free block may still be cached: it keeps its content until the pool needs
it, least recently used first, and can be taken back by its key.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from inferloom.runtime.errors import RequestError


class OutOfBlocks(RequestError):
    """The pool has no free block; the scheduler preempts on it."""


class BlockPool:
    """`size` blocks, numbered from 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._refs = [0] * size
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(size))
        self._key_of: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

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

    def register(self, block: int, key: bytes) -> None:
        """Cache a held, completely filled block under `key`; the first block of a key stays."""
        if key not in self._by_key:
            self._forget(block)
            self._by_key[key], self._key_of[block] = block, key

    def lookup(self, key: bytes) -> int | None:
        """The block cached under `key`; the caller must `retain` it before anything is allocated."""
        return self._by_key.get(key)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._by_key[key]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise ValueError unless the holders' blocks (one entry a holder) explain every reference count."""
        counts = Counter(held)
        for block in range(self.size):
            if self._refs[block] != counts.get(block, 0):
                raise ValueError(f"block {block} has {self._refs[block]} references, its holders make "
                                 f"{counts.get(block, 0)}")
            if (self._refs[block] == 0) != (block in self._free):
                raise ValueError(f"block {block} is free and held at once, or neither")
        if len(self._key_of) != len(self._by_key) or any(self._by_key[k] != b for b, k in self._key_of.items()):
            raise ValueError("the block cache's two indices disagree")
