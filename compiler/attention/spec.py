"""What a variant produces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from inferloom.ir.expr import Const, Expr, Load, Var
from inferloom.ir.graph import Node, Value

SCORE, Q_POS, K_POS, HEAD = Var("score"), Var("q_pos"), Var("k_pos"), Var("head")
#: What the runtime knows of a query besides its position: how many tokens its prompt has, and where the document
#: begins that it belongs to (documents end with an end-of-sequence token).
PREFIX_LEN, DOCUMENT_START = Var("prefix_len"), Var("document_start")
FACTS = (PREFIX_LEN, DOCUMENT_START)
CAUSAL = K_POS <= Q_POS


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Meaning of one attention: see the op `paged_attention` for the fields."""

    score: Expr = SCORE
    visible: Expr = CAUSAL
    first: Expr = Const(0)
    last: Expr = Q_POS
    tables: tuple[Value, ...] = ()
    sink: int = -1
    #: With `blocks`, a query reads its own block of `block` keys and the `blocks` earlier ones that it meets best.
    block: int = 0
    blocks: int = 0

    def see_only(self, visible: Expr, first: Expr) -> AttentionSpec:
        """Narrow what a query sees; `first` bounds the range from below."""
        from inferloom.ir.expr import maximum

        lower = first if self.first == Const(0) else maximum(self.first, first)
        return replace(self, visible=self.visible & visible, first=lower)

    def see_until(self, last: Expr) -> AttentionSpec:
        """Let a query see keys up to `last`, which is not before itself, where causal ones end at itself."""
        return replace(self, visible=self.visible.substitute(CAUSAL, K_POS <= last), last=last)

    def with_table(self, table: Value) -> tuple[AttentionSpec, str]:
        """Add a table; returns its name for `Load`."""
        return replace(self, tables=(*self.tables, table)), f"t{len(self.tables)}"


@dataclass(frozen=True, slots=True)
class Variant:
    """A named step: `apply(node, operands, spec)` and the attributes and operand places that it gives meaning to."""

    name: str
    apply: Callable[[Node, tuple[Value | None, ...], AttentionSpec], AttentionSpec]
    consumes: frozenset[str] = frozenset()


__all__ = ["DOCUMENT_START", "FACTS", "HEAD", "K_POS", "PREFIX_LEN", "Q_POS", "SCORE", "AttentionSpec", "Load", "Variant"]
