"""Prefix caching: a block's key is a SHA-256 chain over all tokens up to its end, and a salt.

Keys of 256 bits over the exact tokens make a false hit impossible in practice; the salt holds apart artifacts and
whoever must not share (or time) a cache.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from inferloom.runtime.blocks import BlockPool


class PrefixCache:
    """Finds and records the full blocks of token sequences in a pool."""

    def __init__(self, pool: BlockPool, block_tokens: int, salt: bytes) -> None:
        self.pool, self.block_tokens = pool, block_tokens
        self._root = hashlib.sha256(b"inferloom prefix\0" + salt).digest()
        self.queries = self.hits = 0

    def key(self, parent: bytes | None, tokens: Sequence[int]) -> bytes:
        """The key of a full block of `tokens` that follows the block with key `parent`."""
        return hashlib.sha256((parent or self._root) + struct.pack(f"<{len(tokens)}i", *tokens)).digest()

    def take(self, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Retain the cached blocks that `tokens` starts with; the last token is always left to compute.

        Returns the blocks and their keys.
        """
        size, blocks, keys = self.block_tokens, [], list[bytes]()
        for start in range(0, len(tokens) - size, size):
            key = self.key(keys[-1] if keys else None, tokens[start:start + size])
            block = self.pool.lookup(key)
            if block is None:
                break
            self.pool.retain(block)
            blocks.append(block)
            keys.append(key)
        return blocks, keys

    def count(self, queried: int, hit: int) -> None:
        """Count tokens of a sequence that was started, for statistics."""
        self.queries += queried
        self.hits += hit
