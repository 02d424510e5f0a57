"""Prefix-LM (Raffel et al. 2020): the tokens of the prompt see each other, those that follow see what is before them."""

from __future__ import annotations

from inferloom.compiler.attention.spec import PREFIX_LEN, Q_POS, AttentionSpec, Variant
from inferloom.ir.expr import maximum
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    return spec.see_until(maximum(Q_POS, PREFIX_LEN - 1))


VARIANT = Variant("prefix-lm", apply)
