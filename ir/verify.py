"""The verifier: what must hold of a graph at each level, checked between passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from inferloom.ir import op as ops
from inferloom.ir.errors import InferloomError, VerifyError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.text import print_node
from inferloom.ir.types import STATES

LEVELS = (ops.MODEL, ops.SERVING, ops.KERNEL)
_MOST_SHOWN = 5


def verify(graph: Graph, level: str) -> None:
    """Raise VerifyError, with each fault under the node that has it, unless `graph` is legal at `level`.

    - Inputs have unique names; every value is defined once, and before it is used.
    - Every op is declared and legal at the level, its attributes are the declared ones, and its result types
      are what its type rule gives.
    - State is threaded: a state value is overwritten at most once, and not read afterwards.
    - At the kernel level, what is not a constant expression is a `kernel`, and its body is legal in turn.
    - A symbol has one bound.
    """
    if level not in LEVELS:
        raise VerifyError(f"no level is called {level!r}; there are: {', '.join(LEVELS)}")
    faults = list(_graph_faults(graph))
    constants = _constants(graph) if level == ops.KERNEL else set()
    for node, fault in _node_faults(graph, level, constants):
        faults.append(f"{print_node(graph, node)}\n  ^ {fault}")
    if faults:
        more = f"\n... and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
        raise VerifyError(f"graph {graph.name} is not legal at the {level} level:\n"
                          + "\n".join(faults[:_MOST_SHOWN]) + more)


def _graph_faults(graph: Graph) -> Iterator[str]:
    names: set[str] = set()
    for value in graph.inputs:
        # An input's name is how it is found; a body's inputs are found by place and may go without.
        if value.name and value.name in names:
            yield f"two inputs are called {value.name!r}"
        names.add(value.name)
    sources: set[str] = set()
    for param in graph.params:
        if param.source in sources:
            yield f"two parameters come from {param.source!r}; use one value"
        sources.add(param.source)
    defined: set[Value] = set()
    for value in (*graph.inputs, *(p.value for p in graph.params)):
        if value in defined:
            yield f"{value!r} is defined twice"
        defined.add(value)
    made = defined.union(v for node in graph.nodes for v in node.results)
    for value in graph.outputs:
        if value not in made:
            yield f"output {value!r} is not defined"
    try:
        graph.symbols()
    except VerifyError as error:
        yield str(error)


def _node_faults(graph: Graph, level: str, constants: set[Value]) -> Iterator[tuple[Node, str]]:
    """Faults of each node. What a faulty node makes counts as defined, so that one fault shows once."""
    defined = {*graph.inputs, *(p.value for p in graph.params)}
    later = {v for node in graph.nodes for v in node.results}
    overwritten: dict[Value, Node] = {}
    for node in graph.nodes:
        for value in node.operands:
            if value is not None and value not in defined:
                yield node, f"uses {value!r} " + ("before it is defined" if value in later else "which nothing defines")
            elif value in overwritten:
                yield node, (f"uses the state {value!r} after `{overwritten[value].op}` has overwritten it; "
                             "use the state that it returned")
        for value in node.results:
            if value in defined:
                yield node, f"defines {value!r}, which is already defined"
            defined.add(value)
        yield from ((node, fault) for fault in _op_faults(node, level, constants))
        overwritten.update({v: node for v in _written(node)})


def _op_faults(node: Node, level: str, constants: set[Value]) -> Iterator[str]:
    try:
        declared = ops.get(node.op)
        full = declared.check_attrs(dict(node.attrs))
        missing = [name for name in full if name not in node.attrs]
        if missing:
            yield f"lacks the attribute {', '.join(missing)}; nodes hold defaults too"
            return
        if level == ops.KERNEL and node.op != "kernel" and not all(v in constants for v in node.results):
            yield "is neither a kernel nor a constant expression"
        elif level not in declared.levels:
            yield f"is not legal at this level, only at: {', '.join(declared.levels)}"
        types = ops.infer(node.op, [None if v is None else v.type for v in node.operands], full)
        have = tuple(v.type for v in node.results)
        if types != have:
            yield f"has results {_shown(have)}, but its type rule gives {_shown(types)}"
    except InferloomError as error:
        yield str(error)
        return
    yield from _body_faults(node.attrs)


def _body_faults(attrs: Mapping[str, ops.Attr]) -> Iterator[str]:
    for body in attrs.values():
        if not isinstance(body, Graph):
            continue
        for fault in _graph_faults(body):
            yield f"in its body: {fault}"
        everything = {v for n in body.nodes for v in n.results}  # in a body, no node has to be a kernel
        for inner, fault in _node_faults(body, ops.KERNEL, everything):
            yield f"in its body: {fault}\n      {print_node(body, inner)}"
        if any(inner.op == "kernel" for inner in body.nodes):
            yield "in its body: kernels do not nest"


def _shown(types: tuple[object, ...]) -> str:
    return ", ".join(map(str, types)) or "nothing"


def _constants(graph: Graph) -> set[Value]:
    """`Graph.constants`, for graphs that may name unknown ops."""
    try:
        return graph.constants()
    except InferloomError:
        return set()


def _written(node: Node) -> Iterator[Value]:
    """The states that a node overwrites."""
    body = node.attrs.get("body")
    if isinstance(body, Graph):
        inside = {v for n in body.nodes for v in _written(n)}
        yield from (outer for outer, inner in zip(node.operands, body.inputs) if outer is not None and inner in inside)
    elif any(isinstance(v.type, STATES) for v in node.results):
        yield from (v for v in node.operands[:1] if v is not None and isinstance(v.type, STATES))  # others are only read
