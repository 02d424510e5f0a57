"""What a variant produces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from inferloom.ir.expr import Const, Expr, Load, Var
from inferloom.ir.graph import Node, Value

SCORE, Q_POS, K_POS, HEAD = Var("score"), Var("q_pos"), Var("k_pos"), Var("head")


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Meaning of one attention: see the op `paged_attention` for the fields."""

    score: Expr = SCORE
    visible: Expr = K_POS <= Q_POS
    first: Expr = Const(0)
    tables: tuple[Value, ...] = ()
    sink: int = -1

    def see_only(self, visible: Expr, first: Expr) -> AttentionSpec:
        """Narrow what a query sees; `first` bounds the range from below."""
        from inferloom.ir.expr import maximum

        lower = first if self.first == Const(0) else maximum(self.first, first)
        return replace(self, visible=self.visible & visible, first=lower)

    def with_table(self, table: Value) -> tuple[AttentionSpec, str]:
        """Add a table; returns its name for `Load`."""
        return replace(self, tables=(*self.tables, table)), f"t{len(self.tables)}"


@dataclass(frozen=True, slots=True)
class Variant:
    """A named step: `apply(node, operands, spec)` and the attributes and operand places that it gives meaning to."""

    name: str
    apply: Callable[[Node, tuple[Value | None, ...], AttentionSpec], AttentionSpec]
    consumes: frozenset[str] = frozenset()


__all__ = ["HEAD", "K_POS", "Q_POS", "SCORE", "AttentionSpec", "Load", "Variant"]
