"""fold-scalars: compute at compile time what depends on scalar constants alone.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   %a = constant {value=64.0}
    ...   %b = rsqrt %a
    ...   %y = mul %x, %b
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      %0 = constant {value=0.125} : f32[]
      %y = mul %x, %0 : f32[tokens,4]
      return %y
    }
"""

from __future__ import annotations

import numpy as np

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Rewriter, apply_rules, tensor
from inferloom.ir import op as ops
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import cast_array

NAME = "fold-scalars"


def run(graph: Graph, report: Report | None = None) -> Graph:
    return apply_rules(graph, [_fold])


def _fold(r: Rewriter, node: Node) -> Value | None:
    if node.op == "constant" or not node.operands or tensor(node.result).shape:
        return None
    arrays = []
    for value in node.operands:
        made = r.scalar_of(value)
        if value is None or made is None:
            return None
        arrays.append(cast_array(np.asarray(made), tensor(value).dtype))
    (folded,) = ops.run_reference(node.op, arrays, node.attrs)
    return r.emit("constant", value=float(folded), dtype=tensor(node.result).dtype)
