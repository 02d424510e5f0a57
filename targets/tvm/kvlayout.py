"""How the CPU lays paged keys and values out: one place that the kernels which write and read them share.

A block holds, head by head, its tokens in tiles of 16: all that is needed of a tile lies in the order in which attention
reads it, keys first. Of keys, the same element of 16 tokens lies side by side; of bf16, two elements of a token go
together. Of values, a token's lie one after the other; of bf16, those of two tokens alternate: a pair is what a bf16
dot product takes. Keys that are values too (latent) lie as rows. Behind keys, and behind values, there is a scale for
each token if they are of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType, StateType

#: Tokens of a tile.
KEYS = 16
#: Bytes of a scale.
SCALE = 4


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Byte offsets in a block of `type`."""

    type: StateType

    @property
    def pair(self) -> int:
        """Elements that lie together in a word."""
        return 2 if self.type.dtype is DType.BF16 and not self.type.latent else 1

    @property
    def key_scales(self) -> int:
        """Where the scales of a tile's keys begin in it."""
        return KEYS * self.type.k_dim * self.type.dtype.itemsize

    @property
    def values(self) -> int:
        """Where a tile's values begin in it."""
        return 0 if self.type.latent else self.key_scales + (KEYS * SCALE if self.type.scales else 0)

    @property
    def value_scales(self) -> int:
        return self.key_scales if self.type.latent else self.values + KEYS * self.type.v_dim * self.type.dtype.itemsize

    @property
    def tile(self) -> int:
        """Bytes of a tile of one head."""
        return self.type.bytes_per_block // (self.type.heads * self.tiles)

    @property
    def tiles(self) -> int:
        """Tiles of one head in a block."""
        return self.type.block_tokens // KEYS

    def check(self, loc: str) -> None:
        """UnsupportedError for sizes that the layout has no room for."""
        if self.type.dtype is DType.BF16 and self.type.k_dim % 2:
            raise UnsupportedError(f"{loc}: a bf16 cache needs an even head size, not {self.type.k_dim}")
