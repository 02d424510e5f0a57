"""Chunked local attention (Llama 4): a query sees only keys of its own chunk of positions."""

from __future__ import annotations

from inferloom.compiler.attention.spec import K_POS, Q_POS, AttentionSpec, Variant
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    chunk = int(str(node.attrs["chunk"]))
    if not chunk:
        return spec
    start = Q_POS // chunk * chunk
    return spec.see_only(K_POS >= start, start)


VARIANT = Variant("chunked", apply, frozenset({"chunk"}))
