"""cse: compute equal things once.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   input %z: f32[tokens,4]
    ...   %a = add %x, %z
    ...   %b = add %z, %x
    ...   %y = mul %a, %b
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      input %z: f32[tokens,4]
      %a = add %x, %z : f32[tokens,4]
      %y = mul %a, %a : f32[tokens,4]
      return %y
    }

The first of equal nodes keeps its name and location. State is never shared: each write makes a new one.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import COMMUTATIVE
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.types import STATES

NAME = "cse"


def run(graph: Graph, report: Report | None = None) -> Graph:
    seen: dict[tuple[object, ...], Sequence[Value]] = {}
    merged = 0

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        nonlocal merged
        if any(isinstance(v.type, STATES) for v in node.results) or any(
                isinstance(a, Graph) for a in node.attrs.values()):
            return None
        places = [0 if v is None else id(v) for v in operands]  # mapped values live as long as the builder
        if node.op in COMMUTATIVE:
            places.sort()
        # repr, since 0 == False == 0.0 and those are different attributes
        key = (node.op, *places, tuple((k, repr(v)) for k, v in node.attrs.items()))
        if key in seen:
            merged += 1
        else:
            seen[key] = builder.copy(node, operands).results
        return seen[key]

    made = rewrite(graph, visit)
    return made if merged else graph
