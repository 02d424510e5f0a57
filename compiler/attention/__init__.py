"""Attention variants, one file each.

A variant reads the attributes or operands of an `attention` node that it knows and says what they mean: how a
score is changed, which keys a query sees, where its visible range starts, which tables it loads. Variants
compose in the order of `VARIANTS`; an attribute that no variant consumed is an error, never dropped.
"""

from __future__ import annotations

from inferloom.compiler.attention import alibi, causal, chunked, sinks, sliding_window, softcap
from inferloom.compiler.attention.spec import (
    DOCUMENT_START,
    FACTS,
    HEAD,
    K_POS,
    PREFIX_LEN,
    Q_POS,
    SCORE,
    AttentionSpec,
    Load,
    Variant,
)

#: Softcap acts on the raw score, ALiBi is added to it, masks follow, sinks join the softmax.
VARIANTS: tuple[Variant, ...] = (causal.VARIANT, softcap.VARIANT, alibi.VARIANT, sliding_window.VARIANT,
                                 chunked.VARIANT, sinks.VARIANT)

__all__ = ["DOCUMENT_START", "FACTS", "HEAD", "K_POS", "PREFIX_LEN", "Q_POS", "SCORE", "VARIANTS", "AttentionSpec", "Load",
           "Variant"]
