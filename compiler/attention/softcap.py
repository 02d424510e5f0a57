"""Soft-capped scores (Gemma 2): `softcap * tanh(score / softcap)`."""

from __future__ import annotations

from dataclasses import replace

from inferloom.compiler.attention.spec import AttentionSpec, Variant
from inferloom.ir.expr import tanh
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    cap = float(str(node.attrs["softcap"]))
    return replace(spec, score=tanh(spec.score / cap) * cap) if cap else spec


VARIANT = Variant("softcap", apply, frozenset({"softcap"}))
