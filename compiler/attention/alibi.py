"""Attention with linear biases (Press et al. 2021): each head adds `slope * (k_pos - q_pos)`."""

from __future__ import annotations

from dataclasses import replace

from inferloom.compiler.attention.spec import HEAD, K_POS, Q_POS, AttentionSpec, Load, Variant
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    slopes = operands[4] if len(operands) > 4 else None
    if slopes is None:
        return spec
    spec, table = spec.with_table(slopes)
    return replace(spec, score=spec.score + Load(table, HEAD) * (K_POS - Q_POS))


VARIANT = Variant("alibi", apply, frozenset({"alibi"}))
