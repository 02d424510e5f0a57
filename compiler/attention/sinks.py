"""Attention sinks (gpt-oss): each head has one extra logit in the softmax that contributes no value."""

from __future__ import annotations

from dataclasses import replace

from inferloom.compiler.attention.spec import AttentionSpec, Variant
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    sinks = operands[3] if len(operands) > 3 else None
    if sinks is None:
        return spec
    spec, table = spec.with_table(sinks)
    return replace(spec, sink=int(table[1:]))


VARIANT = Variant("sinks", apply, frozenset({"sinks"}))
