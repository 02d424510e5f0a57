"""dce: drop nodes and parameters that no output depends on.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   param %w: f32[4] = "w"
    ...   %unused = mul %x, %w
    ...   %y = neg %x
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      %y = neg %x : f32[tokens,4]
      return %y
    }

Inputs stay: they are the graph's interface.
"""

from __future__ import annotations

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import drop_dead_nodes
from inferloom.ir.graph import Graph

NAME = "dce"


def run(graph: Graph, report: Report | None = None) -> Graph:
    trimmed = drop_dead_nodes(graph)
    read = {v for n in trimmed.nodes for v in n.operands} | set(trimmed.outputs)
    params = tuple(p for p in trimmed.params if p.value in read)
    if len(params) == len(trimmed.params):
        return trimmed
    return Graph(trimmed.name, trimmed.inputs, params, trimmed.nodes, trimmed.outputs)
