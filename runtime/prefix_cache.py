"""Prefix caching: a block's key is a SHA-256 chain over all tokens up to its end, and a salt.

Keys of 256 bits over the exact tokens make a false hit impossible in practice; the salt holds apart artifacts and
whoever must not share (or time) a cache.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.state import ALL_KEYS, Group, Held


class PrefixCache:
    """Finds and records the state of full blocks of token sequences in a pool, group by group."""

    def __init__(self, pool: BlockPool, block_tokens: int, salt: bytes, groups: Sequence[Group] = ALL_KEYS) -> None:
        self.pool, self.block_tokens, self.groups = pool, block_tokens, tuple(groups)
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
        keys = self._chain(tokens, root)
        while keys and not self._resumes(keys):
            keys.pop()
        held = [self._held(number, group, keys) for number, group in enumerate(self.groups)]
        for each in held:
            for blocks in each:
                for block in blocks:
                    self.pool.retain(block)
        return held, keys

    def _chain(self, tokens: Sequence[int], root: bytes | None) -> list[bytes]:
        """Hashes of the full blocks before the last token, as far as groups that keep all keys have them."""
        size, keys = self.block_tokens, list[bytes]()
        whole = [i for i, g in enumerate(self.groups) if not g.recurrent and not g.window]
        for start in range(0, len(tokens) - size, size):
            key = self.key(keys[-1] if keys else root, tokens[start:start + size])
            if any(self.pool.lookup((i, key)) is None for i in whole):
                break
            keys.append(key)
        return keys

    def _resumes(self, keys: list[bytes]) -> bool:
        """Whether every other group has what the token after these blocks needs."""
        for number, group in enumerate(self.groups):
            needed = keys[-1:] if group.recurrent else keys[self._first(group, keys):] if group.window else []
            if any(self.pool.lookup((number, key)) is None for key in needed):
                return False
        return True

    def _first(self, group: Group, keys: list[bytes]) -> int:
        return group.first(len(keys) * self.block_tokens, self.block_tokens)

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
