"""The text form of graphs: what dumps, goldens and bug reports use. `parse_graph(print_graph(g))` is `g` again.

    graph example (tokens<=8) {
      input %x: f32[tokens,4]
      param %w: f32[4] = "norm.weight"
      %y = rms_norm %x, %w {eps=1e-05} : f32[tokens,4] @ "model.py:7"
      %0 = constant {value=2.0} : f32[]
      %1 = mul %y, %0 : f32[tokens,4]
      return %1
    }

Attributes at their default are left out. An absent operand is `_`, a list is `[1, 2]`, an absent attribute
`none`. The body of a `kernel` node is a graph in place of an attribute's value. `#` starts a comment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

from inferloom.ir import op as ops
from inferloom.ir.errors import InferloomError
from inferloom.ir.expr import Expr
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.parser import parse_graph
from inferloom.ir.types import Affine, DType, Sym

__all__ = ["fingerprint", "parse_graph", "print_graph", "print_node", "same_graph"]

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def print_graph(graph: Graph) -> str:
    """The graph as text, with a trailing newline. Values without a name hint are numbered."""
    return "\n".join(_Printer(graph).lines()) + "\n"


def print_node(graph: Graph, node: Node) -> str:
    """One node as `print_graph` shows it, without indentation."""
    return "\n".join(_Printer(graph).node(node))


def fingerprint(graph: Graph, locs: bool = False) -> str:
    """A hash (SHA-256, hex) of what the graph computes, the same in every process.

    The names of graph and values, the sources of parameters and, unless `locs`, source locations do not count;
    symbols and their bounds do. Kernels with equal fingerprints can share their code.
    """
    text = "\n".join(_Printer(graph, names=False, locs=locs, sources=False).lines())
    return hashlib.sha256(text.encode()).hexdigest()


def same_graph(a: Graph, b: Graph) -> bool:
    """Whether two graphs are equal in all but the names of their nodes' results."""
    def key(graph: Graph) -> tuple[object, ...]:
        return (graph.name, [v.name for v in graph.inputs],
                list(_Printer(graph, names=False, locs=True, sources=True).lines()))

    return key(a) == key(b)


class _Printer:
    def __init__(self, graph: Graph, names: bool = True, locs: bool = True, sources: bool = True) -> None:
        self._graph, self._named, self._locs, self._sources = graph, names, locs, sources
        self._names: dict[Value, str] = {}
        self._used: set[str] = set()
        self._count = 0
        for value in (*graph.inputs, *(p.value for p in graph.params), *(v for n in graph.nodes for v in n.results)):
            self._name(value)

    def _name(self, value: Value) -> str:
        if value in self._names:
            return self._names[value]
        hint = re.sub(r"[^A-Za-z0-9_.]", "_", value.name) if self._named else ""
        if hint and not _IDENTIFIER.fullmatch(hint):
            hint = f"_{hint}"
        name = hint
        if hint in ("", "_"):
            name, self._count = str(self._count), self._count + 1
        suffix = 1
        while name in self._used:
            name, suffix = f"{hint}_{suffix}", suffix + 1
        self._used.add(name)
        self._names[value] = f"%{name}"
        return f"%{name}"

    def lines(self) -> Iterator[str]:
        graph = self._graph
        symbols = ", ".join(f"{s.name}<={s.bound}" for s in _symbols(graph))
        yield f"graph {_graph_name(graph) if self._named else '_'} ({symbols}) {{"
        for value in graph.inputs:
            yield f"  input {self._name(value)}: {value.type}"
        for param in graph.params:
            source = f" = {json.dumps(param.source)}" if self._sources else ""
            yield f"  param {self._name(param.value)}: {param.value.type}{source}"
        for node in graph.nodes:
            for line in self.node(node):
                yield f"  {line}"
        yield f"  return {', '.join(map(self._name, graph.outputs))}".rstrip()
        yield "}"

    def node(self, node: Node) -> list[str]:
        """The node's lines: more than one when it holds a body."""
        head = f"{', '.join(map(self._name, node.results))} = " if node.results else ""
        operands = ", ".join("_" if v is None else self._name(v) for v in node.operands)
        text = head + node.op + (f" {operands}" if operands else "")
        attrs = [f"{name}={self._attr(value)}" for name, value in _shown_attrs(node)]
        if attrs:
            text += f" {{{', '.join(attrs)}}}"
        if node.results:
            text += " : " + ", ".join(str(v.type) for v in node.results)
        if node.loc and self._locs:
            text += f" @ {json.dumps(node.loc)}"
        return text.split("\n")

    def _attr(self, value: object) -> str:
        if isinstance(value, Graph):
            return "\n".join(_Printer(value, self._named, self._locs, self._sources).lines())
        if value is None:
            return "none"
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (DType, Sym, Affine, Expr)):
            return str(value)
        if isinstance(value, str):
            return json.dumps(value)
        if isinstance(value, tuple):
            return f"[{', '.join(map(self._attr, value))}]"
        return repr(value)


def _graph_name(graph: Graph) -> str:
    return graph.name if _IDENTIFIER.fullmatch(graph.name) else json.dumps(graph.name)


def _shown_attrs(node: Node) -> list[tuple[str, ops.Attr]]:
    """Attributes in the declared order, those at their default left out."""
    try:
        declared = ops.get(node.op).attrs
    except InferloomError:
        return list(node.attrs.items())
    order = [name for name in declared if name in node.attrs] + [n for n in node.attrs if n not in declared]
    return [(name, node.attrs[name]) for name in order
            if name not in declared or repr(node.attrs[name]) != repr(declared[name].default)]


def _symbols(graph: Graph) -> list[Sym]:
    """Symbols of the graph's types and attributes in order of appearance; bodies have headers of their own."""
    found: dict[Sym, None] = {}
    for value in (*graph.inputs, *(p.value for p in graph.params)):
        found.update(_syms(getattr(value.type, "shape", ())))
    for node in graph.nodes:
        for shape in (*node.attrs.values(), *(getattr(v.type, "shape", ()) for v in node.results)):
            found.update(_syms(shape))
    return list(found)


def _syms(shape: object) -> dict[Sym, None]:
    dims = shape if isinstance(shape, tuple) else (shape,)
    return {d if isinstance(d, Sym) else d.sym: None for d in dims if isinstance(d, (Sym, Affine))}
