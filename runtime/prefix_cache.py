"""Prefix caching: a block's key is a SHA-256 chain over all tokens up to its end, and a salt.

Keys of 256 bits over the exact tokens make a false hit impossible in practice; the salt holds apart artifacts and
whoever must not share (or time) a cache.

Below the pool there may be other places for state (`Below`): what the pool gives up goes there, and what a prefix needs
of it is brought back.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inferloom.runtime.blocks import BlockPool, Key
from inferloom.runtime.state import ALL_KEYS, Blocks, Group, Held
from inferloom.runtime.tiers.store import Pages, Store


@dataclass(frozen=True, slots=True)
class Below:
    """Where state is that left the pool, and how a block's bytes are read from and written to the device.

    `worth(keys, tokens)`: whether bringing these keys back is cheaper than computing so many tokens.
    """

    store: Store
    read: Callable[[int], bytes]
    write: Callable[[int, bytes], None]
    worth: Callable[[Sequence[Key], int], bool] = lambda keys, tokens: True


class PrefixCache:
    """Finds and records the state of full blocks of token sequences in a pool, group by group."""

    def __init__(self, pool: BlockPool, block_tokens: int, salt: bytes, groups: Sequence[Group] = ALL_KEYS,
                 below: Below | None = None) -> None:
        self.pool, self.block_tokens, self.groups, self.below = pool, block_tokens, tuple(groups), below
        if below is not None and below.store.keeps:
            pool.evicted = lambda key, blocks: below.store.put(key, self.pages(blocks))
        self._root = hashlib.sha256(b"inferloom prefix\0" + salt).digest()
        self.queries = self.hits = 0

    def salted(self, salt: bytes) -> bytes | None:
        """What keys of those who share `salt` start from; None without a salt of their own."""
        return hashlib.sha256(self._root + b"salt" + salt).digest() if salt else None

    def key(self, parent: bytes | None, tokens: Sequence[int]) -> bytes:
        """The hash of a full block of `tokens` that follows what has hash `parent`."""
        return hashlib.sha256((parent or self._root) + struct.pack(f"<{len(tokens)}i", *tokens)).digest()

    def take(self, tokens: Sequence[int], root: bytes | None = None) -> tuple[list[Held], list[bytes]]:
        """Retain what is cached of the longest prefix of `tokens` from which each group can go on; the last token is
        always left to compute. The first block follows `root`.

        Returns what is held of each group, and the hashes of the prefix's blocks.
        """
        keys = self.prepare(tokens, root)
        held = [self._held(number, group, keys) for number, group in enumerate(self.groups)]
        for each in held:
            for blocks in each:
                for block in blocks:
                    self.pool.retain(block)
        return held, keys

    def needs(self, keys: Sequence[bytes]) -> list[Key]:
        """What the token after blocks with these hashes needs of all groups, first block first."""
        first = [self._first(group, keys) for group in self.groups]
        return [(number, keys[at]) for at in range(min(first), len(keys)) for number in range(len(first)) if at >= first[number]]

    def chain(self, tokens: Sequence[int], root: bytes | None = None) -> list[bytes]:
        """The hashes of all full blocks of `tokens`."""
        size, keys = self.block_tokens, list[bytes]()
        for start in range(0, len(tokens) - size + 1, size):
            keys.append(self.key(keys[-1] if keys else root, tokens[start:start + size]))
        return keys

    def prepare(self, tokens: Sequence[int], root: bytes | None = None) -> list[bytes]:
        """Bring what is worth it back into the pool; hashes of the blocks of the longest prefix that can start from it."""
        pooled = self._longest(tokens, root, self._pooled)
        while self.below is not None and not self.below.store.empty:
            store = self.below.store
            keys = self._longest(tokens, root, lambda key: self._pooled(key) or key in store)
            missing = [key for key in self.needs(keys) if not self._pooled(key)]
            if not missing or not self.below.worth(missing, (len(keys) - len(pooled)) * self.block_tokens):
                break
            found = {key: store.fetch(key) for key in missing}
            whole = {key: pages for key, pages in found.items() if pages is not None}
            if len(whole) == len(found):  # else something was damaged and is forgotten: look again
                if not self.bring(keys, whole):
                    return pooled
                for key in whole:
                    store.moved(key)
                return keys
        return pooled

    def bring(self, keys: Sequence[bytes], pages: Mapping[Key, Pages]) -> bool:
        """Cache `pages` that the prefix `keys` needs in the pool, keeping the rest of it there; False: there is no room."""
        if self.below is None:
            raise ValueError("there is no place below the pool")
        here = [b for key in self.needs(keys) for b in self.pool.lookup(key) or ()]
        for block in here:
            self.pool.retain(block)
        try:
            if sum(map(len, pages.values())) > self.pool.available:
                return False
            for key, each in pages.items():
                blocks = list[int]()
                for page in each:
                    blocks.append(self.pool.allocate())
                    here.append(blocks[-1])
                    self.below.write(blocks[-1], page)
                self.pool.register(tuple(blocks), key)
            return True
        finally:
            for block in reversed(here):
                self.pool.release(block)

    def pages(self, blocks: Blocks) -> Pages:
        """The bytes of blocks on the device."""
        if self.below is None:
            raise ValueError("there is no place below the pool")
        return tuple(map(self.below.read, blocks))

    def _pooled(self, key: Key) -> bool:
        return self.pool.lookup(key) is not None

    def _longest(self, tokens: Sequence[int], root: bytes | None, has: Callable[[Key], bool]) -> list[bytes]:
        """Hashes of the full blocks before the last token, as far as a sequence can go on from what `has` says is there."""
        size, keys = self.block_tokens, list[bytes]()
        whole = [i for i, g in enumerate(self.groups) if not g.recurrent and not g.window]
        for start in range(0, len(tokens) - size, size):
            key = self.key(keys[-1] if keys else root, tokens[start:start + size])
            if not all(has((i, key)) for i in whole):
                break
            keys.append(key)
        some = [(i, g) for i, g in enumerate(self.groups) if g.recurrent or g.window]
        while keys and not all(has((i, key)) for i, g in some for key in keys[self._first(g, keys):]):
            keys.pop()
        return keys

    def _first(self, group: Group, keys: Sequence[bytes]) -> int:
        """The first of these blocks whose state the token after them needs."""
        return max(0, len(keys) - 1) if group.recurrent else group.first(len(keys) * self.block_tokens, self.block_tokens)

    def _held(self, number: int, group: Group, keys: list[bytes]) -> Held:
        if group.recurrent:
            return Held([self.pool.lookup((number, key)) for key in keys[-1:]])
        first = self._first(group, keys)
        return Held([None if i < first else self.pool.lookup((number, key)) for i, key in enumerate(keys)])

    def record(self, held: Sequence[Held], at: int, key: bytes, computed: int) -> None:
        """Block `at`, with this hash, is full; a recurrent state is recorded if it is the one at the block's end."""
        for number, (group, each) in enumerate(zip(self.groups, held, strict=True)):
            index = 0 if group.recurrent else at
            blocks = each.blocks[index] if index < len(each.blocks) else None
            if blocks is not None and (not group.recurrent or computed == (at + 1) * self.block_tokens):
                self.pool.register(blocks, (number, key))

    def count(self, queried: int, hit: int) -> None:
        """Count tokens of a sequence that was started, for statistics."""
        self.queries += queried
        self.hits += hit
