"""Document mask: of a sequence that holds several documents, a query sees only its own.

A document ends with an end-of-sequence token; the next token begins another.
"""

from __future__ import annotations

from inferloom.compiler.attention.spec import DOCUMENT_START, K_POS, AttentionSpec, Variant
from inferloom.ir.graph import Node, Value


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    return spec.see_only(K_POS >= DOCUMENT_START, DOCUMENT_START)


VARIANT = Variant("document-mask", apply)
