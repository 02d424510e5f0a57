"""recognize-activation: see silu and gelu that are spelled out in arithmetic.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   %s = sigmoid %x
    ...   %y = mul %x, %s
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      %0 = silu %x : f32[tokens,4]
      return %0
    }

A candidate is a function of one value and scalar constants that goes through sigmoid, exp, tanh or erf once. It
is recognised by its values on a grid, so the many ways to write the tanh formula of gelu are one to this pass. What
equals none of the known functions (quick gelu, relu squared) stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Rewriter, apply_rules, pointwise_cone
from inferloom.ir import op as ops
from inferloom.ir.graph import Graph, Node, Value

NAME = "recognize-activation"

KNOWN: tuple[tuple[str, Mapping[str, ops.Attr]], ...] = (
    ("silu", {}), ("gelu", {"approximate": "tanh"}), ("gelu", {"approximate": "none"}))
_BENDS = frozenset({"sigmoid", "exp", "tanh", "erf"})
_SPELLED_WITH = _BENDS | {"add", "sub", "mul", "div", "pow", "neg", "constant"}
_GRID = np.linspace(-9.0, 9.0, 241, dtype=np.float32)
_CLOSE = 4e-6  # float32 arithmetic on the grid; the two kinds of gelu differ by 5e-4
_MOST_NODES = 16


def run(graph: Graph, report: Report | None = None) -> Graph:
    report = report or Report()
    wanted = [(name, attrs, ops.run_reference(name, [_GRID], ops.get(name).check_attrs(dict(attrs)))[0])
              for name, attrs in KNOWN]

    def recognise(r: Rewriter, node: Node) -> Value | None:
        if node.op not in ("mul", "div"):
            return None
        for x in _inputs(r, node):
            nodes = pointwise_cone(node.result, {x}, r.producer, _MOST_NODES)
            if nodes is None or not {n.op for n in nodes} <= _SPELLED_WITH or sum(n.op in _BENDS for n in nodes) != 1:
                continue
            got = _evaluate(nodes, x)
            for name, attrs, values in wanted:
                if np.abs(got - values).max() <= _CLOSE:
                    report.fused(" ".join([name, *map(str, attrs.values())]), node.loc)
                    return r.emit(name, x, loc=node.loc, **attrs)
        return None

    return apply_rules(graph, [recognise])


def _inputs(r: Rewriter, root: Node) -> list[Value]:
    """Values of root's type among what it is computed from by pointwise arithmetic, nearest first."""
    found: dict[Value, None] = {}
    queue = [root]
    for node in queue:
        for value in node.operands:
            if value is None or value in found or len(found) > 2 * _MOST_NODES:
                continue
            found[value] = None
            made = r.producer(value)
            if made is not None and made.op in _SPELLED_WITH:
                queue.append(made)
    return [v for v in found if v.type == root.result.type]


def _evaluate(nodes: Sequence[Node], x: Value) -> np.ndarray:
    """The last node's values when `x` runs over the grid."""
    known: dict[Value | None, np.ndarray] = {x: _GRID}
    with np.errstate(all="ignore"):
        for node in nodes:
            (known[node.result],) = ops.run_reference(node.op, [known[v] for v in node.operands], node.attrs)
    return np.asarray(known[nodes[-1].result], np.float32)
