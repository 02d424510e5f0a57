"""Block-sparse attention (MoBA, Lu et al. 2025): a query reads its own block of keys and those earlier ones that it meets best.

How well it meets a block is its product with the mean of the block's keys, which is kept beside them; queries that
share a key head choose together. Blocks of `size` keys are those of the cache.
"""

from __future__ import annotations

from dataclasses import replace

from inferloom.compiler.attention.spec import AttentionSpec, Variant
from inferloom.ir.graph import Node, Value


def make(blocks: int = 8, size: int = 32) -> Variant:
    """`blocks` earlier blocks of `size` keys each."""

    def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, block=size, blocks=blocks)

    return Variant("block-sparse", apply)
