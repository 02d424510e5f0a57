"""recognize-rotary: see rotary position embeddings, however they are spelled.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,2,4]
    ...   input %angle: f32[tokens,2]
    ...   %both = concat %angle, %angle {axis=1}
    ...   %cos = cos %both
    ...   %sin = sin %both
    ...   %c = reshape %cos {shape=[tokens,1,4]}
    ...   %s = reshape %sin {shape=[tokens,1,4]}
    ...   %x1 = slice %x {axis=2, start=0, stop=2}
    ...   %x2 = slice %x {axis=2, start=2, stop=4}
    ...   %m = neg %x2
    ...   %turned = concat %m, %x1 {axis=2}
    ...   %a = mul %x, %c
    ...   %b = mul %turned, %s
    ...   %y = add %a, %b
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,2,4]
      input %angle: f32[tokens,2]
      %0 = cos %angle : f32[tokens,2]
      %1 = sin %angle : f32[tokens,2]
      %2 = rotary %x, %0, %1 : f32[tokens,2,4]
      return %2
    }

Nothing here knows a spelling. Each element of a candidate is written as a sum of products of elements of some x
and of tables, and compared with the definition of `rotary`. A scaling of the tables stays a factor of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Rewriter, apply_rules, tensor
from inferloom.compiler.symbolic import MOVES, Elements, Leaf, Terms
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import Sym

NAME = "recognize-rotary"

_FOLLOWED = MOVES | {"add", "sub", "mul", "neg", "concat"}
_ROOTS = frozenset({"add", "sub", "concat", "reshape"})
_MOST_NODES = 40


@dataclass(frozen=True, slots=True)
class _Table:
    """Columns `index` of `leaf`, times `factor`."""

    leaf: Leaf
    index: np.ndarray
    factor: float


@dataclass(frozen=True, slots=True)
class _Rotation:
    cos: _Table
    sin: _Table
    interleaved: bool


def run(graph: Graph, report: Report | None = None) -> Graph:
    report = report or Report()
    tables: dict[tuple[object, ...], Value] = {}

    def rotation(r: Rewriter, node: Node) -> Value | None:
        shape = tensor(node.result).shape if node.results else ()
        if node.op not in _ROOTS or len(shape) not in (2, 3) or not isinstance(shape[0], Sym) or not _even(shape[-1]):
            return None
        heads = (shape[0], 1, shape[1]) if len(shape) == 2 else shape  # a single head may have lost its axis
        for x in _candidates(r, node):
            found = _rotation(Elements(x, r.producer).of(node.result), Leaf("", x), heads[1:])
            if found is None:
                continue
            cos, sin = (_emit_table(r, t, node, tables) for t in (found.cos, found.sin))
            if cos is None or sin is None:
                report.skipped("rotary embedding", "its tables are not regular columns of a per-token value", node.loc)
                continue
            report.fused(f"rotary embedding ({'interleaved' if found.interleaved else 'half'})", node.loc)
            if heads is shape:
                return r.emit("rotary", x, cos, sin, loc=node.loc, interleaved=found.interleaved)
            x = r.emit("reshape", x, loc=node.loc, shape=heads)
            turned = r.emit("rotary", x, cos, sin, loc=node.loc, interleaved=found.interleaved)
            return r.emit("reshape", turned, loc=node.loc, shape=shape)
        return None

    def partial(r: Rewriter, node: Node) -> Value | None:
        """`concat(rotary(x[:r]), x[r:])` is a rotary of part of x."""
        if node.op != "concat" or len(node.operands) != 2 or node.attrs["axis"] != 2:
            return None
        turned, rest = r.producer(node.operands[0]), r.producer(node.operands[1])
        head = r.producer(turned.operands[0]) if turned is not None and turned.op == "rotary" else None
        if turned is None or head is None or rest is None or head.op != "slice" or rest.op != "slice":
            return None
        x = head.operands[0]
        whole = (head.attrs["axis"] == rest.attrs["axis"] == 2 and head.attrs["start"] == 0
                 and head.attrs["step"] == rest.attrs["step"] == 1 and head.attrs["stop"] == rest.attrs["start"])
        if not whole or rest.operands[0] is not x or x is None or x.type != node.result.type:
            return None
        report.fused("the part of each head that passes rotary unchanged", node.loc)
        return r.emit("rotary", x, *turned.operands[1:], loc=turned.loc, interleaved=turned.attrs["interleaved"])

    return apply_rules(graph, [partial, rotation])


def _even(dim: object) -> bool:
    return isinstance(dim, int) and dim % 2 == 0


def _candidates(r: Rewriter, root: Node) -> list[Value]:
    """Values of root's type that it reads in at least two places, nearest first."""
    uses: dict[Value, int] = {}
    queue, seen = [root], {root}
    for node in queue:
        if len(queue) > _MOST_NODES:
            break
        for value in node.operands:
            if value is None:
                continue
            uses[value] = uses.get(value, 0) + 1
            made = r.producer(value)
            if made is not None and made not in seen and made.op in _FOLLOWED:
                seen.add(made)
                queue.append(made)
    return [v for v, count in uses.items() if count > 1 and v.type == root.result.type]


def _rotation(terms: Terms, x: Leaf, shape: tuple[object, ...]) -> _Rotation | None:
    """How `terms` (of a value [tokens, heads, dim]) rotate x, or None if they do not."""
    heads, dim = (int(str(d)) for d in shape)
    turning = [t for t in terms if len(t.factors) == 2]
    if len(turning) < 2 or len(turning) + sum(t.leaves == (x,) for t in terms) != len(terms):
        return None
    leaves: dict[Leaf, int] = {}
    coef, source, table, column = [], [], [], []
    for term in turning:
        (a, i), (b, j) = term.factors if term.factors[0][0] == x else term.factors[::-1]
        if a != x or b == x:
            return None
        coef.append(term.coef.reshape(heads, dim))
        source.append(np.broadcast_to(i, term.coef.shape).reshape(heads, dim))
        column.append(np.broadcast_to(j, term.coef.shape).reshape(heads, dim))
        table.append(np.full((heads, dim), leaves.setdefault(b, len(leaves))))
    present = np.stack(coef) != 0
    counts = present.sum(0)
    turned = int((counts[0] > 0).sum())
    passed = [t for t in terms if len(t.factors) == 1]
    if turned == 0 or turned % 2 or (counts[:, :turned] != 2).any() or (counts[:, turned:] != 0).any():
        return None
    if not _passes(passed, heads, dim, turned):
        return None
    first = present[:, :, :turned].argmax(0)
    last = len(turning) - 1 - present[::-1, :, :turned].argmax(0)
    fields = [np.stack(f)[:, :, :turned] for f in (coef, source, table, column)]
    one, two = ([np.take_along_axis(f, w[None], 0)[0] for f in fields] for w in (first, last))
    for interleaved in (False, True):
        found = _as_pairs(one, two, dim, turned, interleaved, list(leaves))
        if found is not None:
            return found
    return None


def _passes(terms: list, heads: int, dim: int, turned: int) -> bool:  # type: ignore[type-arg]
    """Whether the terms without a table are exactly x itself beyond the turned elements."""
    own = np.arange(heads * dim).reshape(heads, dim)
    coef = np.zeros((heads, dim))
    for term in terms:
        now = term.coef.reshape(heads, dim)
        index = np.broadcast_to(term.factors[0][1], term.coef.shape).reshape(heads, dim)
        if ((now != 0) & (index != own)).any():
            return False
        coef += now
    return bool((coef[:, :turned] == 0).all() and (coef[:, turned:] == 1).all())


def _as_pairs(one: list[np.ndarray], two: list[np.ndarray], dim: int, turned: int, interleaved: bool,
              leaves: list[Leaf]) -> _Rotation | None:
    """Check `a*cos - b*sin, b*cos + a*sin` for every pair (a, b) of every head."""
    heads, half = one[0].shape[0], turned // 2
    places = np.arange(turned).reshape(half, 2).T if interleaved else np.arange(turned).reshape(2, half)
    own = np.arange(heads)[:, None] * dim + np.arange(turned)
    partner = np.empty_like(own)
    partner[:, places[0]], partner[:, places[1]] = own[:, places[1]], own[:, places[0]]
    straight = one[1] == own  # whether the first of the two terms is the element's own
    if not np.where(straight, two[1] == partner, (one[1] == partner) & (two[1] == own)).all():
        return None
    cos = [np.where(straight, a, b) for a, b in zip(one, two)]
    sin = [np.where(straight, b, a) for a, b in zip(one, two)]
    sin[0][:, places[0]] *= -1
    made = []
    for coef, _, table, column in (cos, sin):
        index = column[0, places[0]]
        same = (coef == coef.flat[0]).all() and (table == table.flat[0]).all()
        if not same or (column[:, places[0]] != index).any() or (column[:, places[1]] != index).any():
            return None
        made.append(_Table(leaves[int(table.flat[0])], index, float(coef.flat[0])))
    return _Rotation(made[0], made[1], interleaved)


def _emit_table(r: Rewriter, table: _Table, node: Node, made: dict[tuple[object, ...], Value]) -> Value | None:
    """The table as a value [tokens, r/2], made once per graph."""
    base = table.leaf.value
    tokens, *rest = tensor(base).shape or (None,)
    if tokens != tensor(node.result).shape[0] or not isinstance(tokens, Sym):
        return None
    width = int(np.prod([int(str(d)) for d in rest]))
    steps = np.unique(np.diff(table.index)) if len(table.index) > 1 else np.array([1])
    if len(steps) != 1 or steps[0] < 1:
        return None
    start, stop, step = int(table.index[0]), int(table.index[-1]) + 1, int(steps[0])
    key = (table.leaf, start, stop, step, table.factor)
    if key not in made:
        value = base if len(rest) == 1 else r.emit("reshape", base, loc=node.loc, shape=(tokens, width))
        if (start, stop, step) != (0, width, 1):
            value = r.emit("slice", value, loc=node.loc, axis=1, start=start, stop=stop, step=step)
        if table.leaf.function:
            value = r.emit(table.leaf.function, value, loc=node.loc)
        if table.factor != 1.0:
            value = r.emit("mul", value, r.builder.scalar(table.factor), loc=node.loc)
        made[key] = value
    return made[key]
