"""What an artifact is for: "generate" gives logits, "embed" the final hidden states, and needs no LM head.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8, rows<=8) {
    ...   input %x: f32[tokens,4]
    ...   input %logit_rows: i32[rows]
    ...   param %head: f32[16,4] = "lm_head.weight"
    ...   %h = gather_rows %x, %logit_rows
    ...   %y = linear %h, %head, _
    ...   return %y
    ... }'''
    >>> print(print_graph(for_task(parse_graph(before), "embed")), end="")
    graph g (tokens<=8, rows<=8) {
      input %x: f32[tokens,4]
      input %logit_rows: i32[rows]
      %h = gather_rows %x, %logit_rows : f32[rows,4]
      return %h
    }
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from inferloom.compiler.passes import dce
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph, Node

Task = Literal["generate", "embed"]
TASKS: tuple[Task, ...] = ("generate", "embed")


def check_task(task: str) -> Task:
    """The task of this name; UnsupportedError if there is none."""
    if task not in TASKS:
        raise UnsupportedError(f"task {task!r} is not known; choose from: {', '.join(TASKS)}")
    return task


def for_task(graph: Graph, task: Task) -> Graph:
    """The graph of a causal LM as it is, or, to embed, without its head: f32 [rows, hidden], what the head would read.

    Where rows are picked before the head, all that follows is the head's: a model that scales its states there (minicpm3) gives
    them unscaled. Parameters that nothing reads any more are dropped. UnsupportedError when the graph ends in no linear layer.
    """
    if task == "generate":
        return graph
    head, at = _head(graph), {n: i for i, n in enumerate(graph.nodes)}
    gather = next((n for n in graph.nodes if n.op == "gather_rows" and n.operands[1] in graph.inputs), None)
    if head is None or gather is None or head.operands[0] is None:
        raise UnsupportedError(f"{graph.name} does not end in a linear layer over the rows that are asked for: its hidden states "
                               "cannot be told from its logits; compile it with task generate")
    if at[gather] < at[head]:
        return dce.run(replace(graph, outputs=(gather.result,)))
    builder = Builder(graph.name, list(graph.inputs), list(graph.params))
    builder.nodes += graph.nodes
    return dce.run(builder.finish([builder.emit("gather_rows", head.operands[0], gather.operands[1], loc=gather.loc)]))


def _head(graph: Graph) -> Node | None:
    """The linear layer that the output is, but for constants and moves: a scale, a soft-cap, a choice of rows."""
    made_by, known = graph.producers(), graph.constants() | set(graph.inputs)
    node = made_by.get(graph.outputs[0])
    while node is not None and node.op != "linear":
        varying = [v for v in node.operands if v is not None and v not in known]
        node = made_by.get(varying[0]) if len(varying) == 1 else None
    return node
