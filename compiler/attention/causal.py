"""Causal attention: a query sees itself and what came before it."""

from __future__ import annotations

from inferloom.compiler.attention.spec import AttentionSpec, Variant
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    return spec


VARIANT = Variant("causal", apply, frozenset({"variant"}))
