"""Sliding window (Mistral): a query sees itself and the `window - 1` keys before it."""

from __future__ import annotations

from inferloom.compiler.attention.spec import K_POS, Q_POS, AttentionSpec, Variant
from inferloom.ir.expr import Const, maximum
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    window = int(str(node.attrs["window"]))
    if not window:
        return spec
    return spec.see_only(Q_POS - K_POS < window, maximum(Q_POS - (window - 1), Const(0)))


VARIANT = Variant("sliding-window", apply, frozenset({"window"}))
