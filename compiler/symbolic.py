"""Values as sums of products of elements of other values, so that a formula is known however it is spelled.

`Elements` follows data movement (reshape, slice, concat, ...) and the arithmetic around it, and says of each
element of a value: it is `coef * leaf[i] * other[j] + ...`. The token axis counts as one, since all of this works
within a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from inferloom.ir import op as ops
from inferloom.ir.graph import Node, Value
from inferloom.ir.types import TensorType

MOVES = frozenset({"reshape", "permute", "slice", "expand"})
FUNCTIONS = frozenset({"cos", "sin"})
_MOST_TERMS = 8


@dataclass(frozen=True, slots=True)
class Leaf:
    """Elements of `function(value)`, the function being "cos", "sin" or "" for the value itself."""

    function: str
    value: Value


@dataclass(frozen=True, slots=True)
class Term:
    """For each element: `coef` times the product of `leaf[index]` over the factors; a coef of 0 is no term."""

    coef: np.ndarray
    factors: tuple[tuple[Leaf, np.ndarray], ...] = ()

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf, _ in self.factors)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Term:
        return Term(change(self.coef), tuple((leaf, change(index)) for leaf, index in self.factors))


Terms = tuple[Term, ...]


class Elements:
    """Evaluates values in terms of `x`; whatever cannot be followed is a leaf of its own."""

    def __init__(self, x: Value, producer: Callable[[Value], Node | None]) -> None:
        self._producer = producer
        self.x = Leaf("", x)
        self._known: dict[Value, Terms] = {x: _leaf(self.x)}

    def of(self, value: Value) -> Terms:
        """The terms of a value, in the order in which they were met."""
        if value not in self._known:
            node = self._producer(value)
            made = self._follow(node) if node is not None and isinstance(value.type, TensorType) else None
            self._known[value] = _leaf(Leaf("", value)) if made is None or len(made) > _MOST_TERMS else made
        return self._known[value]

    def _has_x(self, terms: Terms) -> bool:
        return any(self.x in term.leaves for term in terms)

    def _follow(self, node: Node) -> Terms | None:
        operands = [v for v in node.operands if v is not None]
        if node.op == "constant":
            return (Term(np.full((), float(str(node.attrs["value"])))),)
        if node.op in MOVES:
            def move(array: np.ndarray) -> np.ndarray:
                return ops.run_reference(node.op, [array], node.attrs)[0]

            return tuple(term.map(move) for term in self.of(operands[0]))
        if node.op == "neg":
            return _scaled(self.of(operands[0]), -1.0)
        if node.op == "concat":
            return _joined([self.of(v) for v in operands], int(str(node.attrs["axis"])))
        if node.op in FUNCTIONS:
            return _applied(node.op, self.of(operands[0]))
        if node.op in ("add", "sub", "mul"):
            a, b = self.of(operands[0]), self.of(operands[1])
            if node.op == "mul":
                return self._product(a, b)
            if self._has_x(a) and self._has_x(b):
                return _sum(a, b if node.op == "add" else _scaled(b, -1.0))
        return None

    def _product(self, a: Terms, b: Terms) -> Terms | None:
        numbers = all(not t.factors for t in a) or all(not t.factors for t in b)
        if not numbers and self._has_x(a) == self._has_x(b):
            return None
        made = []
        for s in a:
            for t in b:
                arrays = np.broadcast_arrays(s.coef * t.coef, *(i for _, i in (*s.factors, *t.factors)))
                made.append(Term(arrays[0], tuple(zip((*s.leaves, *t.leaves), arrays[1:]))))
        return tuple(made)


def _leaf(leaf: Leaf) -> Terms:
    shape = tuple(d if isinstance(d, int) else 1 for d in getattr(leaf.value.type, "shape", ()))
    return (Term(np.ones(shape), ((leaf, np.arange(int(np.prod(shape))).reshape(shape)),)),)


def _scaled(terms: Terms, by: float) -> Terms:
    return tuple(Term(t.coef * by, t.factors) for t in terms)


def _applied(function: str, terms: Terms) -> Terms | None:
    """A function of plain elements of one leaf is an element of the function of the leaf."""
    if len(terms) != 1 or len(terms[0].factors) != 1 or not (terms[0].coef == 1).all():
        return None
    ((leaf, index),) = terms[0].factors
    return (Term(terms[0].coef, ((Leaf(function, leaf.value), index),)),) if not leaf.function else None


def _sum(a: Terms, b: Terms) -> Terms:
    shape = np.broadcast_shapes(*(t.coef.shape for t in (*a, *b)))
    return tuple(t.map(lambda array: np.broadcast_to(array, shape)) for t in (*a, *b))


def _joined(parts: list[Terms], axis: int) -> Terms:
    """Terms of a concatenation: those of equal leaves become one, absent ones are 0."""
    leaves = dict.fromkeys((t.leaves, i) for part in parts for i, t in _numbered(part))
    made = []
    for wanted, place in leaves:
        pieces: list[Term] = []
        for part in parts:
            shape = part[0].coef.shape
            found = next((t for i, t in _numbered(part) if t.leaves == wanted and i == place), None)
            pieces.append(found or Term(np.zeros(shape), tuple((leaf, np.zeros(shape, int)) for leaf in wanted)))
        factors = tuple((leaf, np.concatenate([p.factors[k][1] for p in pieces], axis))
                        for k, leaf in enumerate(wanted))
        made.append(Term(np.concatenate([p.coef for p in pieces], axis), factors))
    return tuple(made)


def _numbered(terms: Terms) -> list[tuple[int, Term]]:
    """Each term with how many before it have the same leaves."""
    count: dict[tuple[Leaf, ...], int] = {}
    made = []
    for term in terms:
        made.append((count.setdefault(term.leaves, 0), term))
        count[term.leaves] += 1
    return made
