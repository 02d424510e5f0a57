"""The block pool: reference counts, and a cache of finished blocks by content.

A block is free when nobody holds it. A free block may still be cached: it keeps its content until the pool needs
it, least recently used first, and can be taken back by its key. What is under lease goes after all other free blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from inferloom.runtime.errors import RequestError

#: A group of state, and the hash of all tokens up to the end of what is cached.
Key = tuple[int, bytes]


class OutOfBlocks(RequestError):
    """The pool has no free block; the scheduler preempts on it."""


class Leasable(ABC):
    """What holds state that can be leased, and how often each key is; `leased` counts the blocks that are there under lease."""

    def __init__(self) -> None:
        self.leased = 0
        self._leases: Counter[Key] = Counter()

    @abstractmethod
    def lookup(self, key: Key) -> Sequence[object] | None:
        """The blocks under `key`."""
        ...

    @abstractmethod
    def check_leases(self, keys: Iterable[Key]) -> None:
        """Raise ValueError unless these leased keys (one entry a lease) are all that there are."""
        ...

    def lease(self, key: Key) -> None:
        """Take what is under `key` only when nothing else can be taken; as often as it is leased, it must be unleased."""
        self._lease(key, 1)

    def unlease(self, key: Key) -> None:
        """One lease less; the last one makes it ordinary, as recently used as can be."""
        if not self._leases[key]:
            raise ValueError("a key is unleased more often than it was leased")
        self._lease(key, -1)

    def is_leased(self, key: Key) -> bool:
        return key in self._leases

    @abstractmethod
    def _lease(self, key: Key, change: int) -> None:
        """So many leases more; what is under the key goes where it belongs then."""
        ...

    def _count(self, key: Key, change: int) -> None:
        self._leases[key] += change
        if not self._leases[key]:
            del self._leases[key]


class BlockPool(Leasable):
    """`size` blocks, numbered from 0.

    `evicted(key, blocks)` is called before cached content is given up for something else, while it is still there.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.evicted: Callable[[Key, tuple[int, ...]], None] | None = None
        self.cached = 0  # free blocks whose content can be found again
        self._refs = [0] * size
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(size))
        self._key_of: dict[int, Key] = {}
        self._by_key: dict[Key, tuple[int, ...]] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # free blocks under lease

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free) + len(self._kept)

    @property
    def unused(self) -> int:
        """Free blocks that hold nothing that could be found again."""
        return self.available - self.cached

    @property
    def kept(self) -> int:
        """Free blocks under lease."""
        return len(self._kept)

    def allocate(self) -> int:
        """A block with one holder; blocks that hold no cached content go first. OutOfBlocks when none is free."""
        if not self.available:
            raise OutOfBlocks(f"all {self.size} blocks are held")
        block, _ = (self._free or self._kept).popitem(last=False)
        if block in self._key_of:
            self.cached -= 1
            if self.evicted is not None:
                key = self._key_of[block]
                self.evicted(key, self._by_key[key])
        self._forget(block)
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more holder."""
        if self._refs[block] == 0:
            del self._idle(block)[block]
            self.cached -= block in self._key_of
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block, which stays cached if it has a key."""
        if self._refs[block] <= 0:
            raise ValueError(f"block {block} is released more often than it was held")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._idle(block)[block] = None
            if block in self._key_of:
                self.cached += 1
            else:
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
            self.leased += len(blocks) if key in self._leases else 0

    def lookup(self, key: Key) -> tuple[int, ...] | None:
        """The blocks cached under `key`; the caller must `retain` them before anything is allocated."""
        return self._by_key.get(key)

    def is_cached(self, block: int) -> bool:
        """Whether others may find the block's content, so that it must not change."""
        return block in self._key_of

    def _lease(self, key: Key, change: int) -> None:
        before, blocks = key in self._leases, self._by_key.get(key, ())
        idle = [b for b in blocks if self._refs[b] == 0]
        for block in idle:
            del self._idle(block)[block]
        self._count(key, change)
        self.leased += ((key in self._leases) - before) * len(blocks)
        for block in idle:
            self._idle(block)[block] = None

    def _idle(self, block: int) -> OrderedDict[int, None]:
        """Where the block belongs while it is free."""
        return self._kept if self._key_of.get(block) in self._leases else self._free

    def _forget(self, block: int) -> None:
        """Without one of its blocks, what is cached under a key is worth nothing."""
        key = self._key_of.get(block)
        if key is None:
            return
        blocks = self._by_key.pop(key)
        for other in blocks:
            idle = self._idle(other)
            del self._key_of[other]
            if other in idle:
                del idle[other]
                self.cached -= 1
                self._free[other] = None
                self._free.move_to_end(other, last=False)
        self.leased -= len(blocks) if key in self._leases else 0

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise ValueError unless the holders' blocks (one entry a holder) explain every reference count."""
        counts = Counter(held)
        for block in range(self.size):
            if self._refs[block] != counts.get(block, 0):
                raise ValueError(f"block {block} has {self._refs[block]} references, its holders make "
                                 f"{counts.get(block, 0)}")
            if [block in self._free, block in self._kept].count(True) != (self._refs[block] == 0):
                raise ValueError(f"block {block} is free and held at once, or neither")
            if self._refs[block] == 0 and block not in self._idle(block):
                raise ValueError(f"block {block} is free in the wrong place")
        if self.cached != sum(block in self._key_of for block in (*self._free, *self._kept)):
            raise ValueError(f"the pool counts {self.cached} free blocks with content, and has others")
        if self._key_of != {block: key for key, blocks in self._by_key.items() for block in blocks}:
            raise ValueError("the block cache's two indices disagree")

    def check_leases(self, keys: Iterable[Key]) -> None:
        """Raise ValueError unless these leased keys (one entry a lease) are all that there are."""
        if Counter(keys) != self._leases:
            raise ValueError("leases and the pool disagree")
        if self.leased != sum(len(self._by_key.get(key, ())) for key in self._leases):
            raise ValueError(f"the pool counts {self.leased} leased blocks, and has others")
