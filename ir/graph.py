"""Graphs in SSA form: values, nodes in order, and the builder that passes use to make new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.types import DType, Sym, Type


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A typed SSA value. Identity matters, the name is a hint for readers."""

    type: Type
    name: str = ""

    def __repr__(self) -> str:
        return f"%{self.name or '?'}: {self.type}"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation. An absent optional operand is None. `loc` is the model's source line."""

    op: str
    operands: tuple[Value | None, ...]
    attrs: Mapping[str, ops.Attr]
    results: tuple[Value, ...]
    loc: str = ""

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Param:
    """A value known at compile time, found under `source` in the checkpoint (or a front end's buffers)."""

    value: Value
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """`inputs` and `params` feed `nodes` (in execution order); `outputs` name the results."""

    name: str
    inputs: tuple[Value, ...]
    params: tuple[Param, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]

    def producers(self) -> dict[Value, Node]:
        """Map each result to the node that makes it."""
        return {value: node for node in self.nodes for value in node.results}

    def users(self) -> dict[Value, list[Node]]:
        """Map each value to the nodes that read it (once per node)."""
        table: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(v for v in node.operands if v is not None):
                table.setdefault(value, []).append(node)
        return table

    def constants(self) -> set[Value]:
        """Values that do not depend on any input: params and what is computed from them alone."""
        known = {p.value for p in self.params}
        for node in self.nodes:
            if all(v in known for v in node.operands if v is not None) and ops.get(node.op).foldable:
                known.update(node.results)
        return known

    def symbols(self) -> dict[str, Sym]:
        """The symbolic dims that the graph's types mention, by name."""
        found: dict[str, Sym] = {}
        values = [*self.inputs, *(p.value for p in self.params), *(v for n in self.nodes for v in n.results)]
        for value in values:
            for dim in getattr(value.type, "shape", ()):
                sym = dim if isinstance(dim, Sym) else getattr(dim, "sym", None)
                if sym is not None and found.setdefault(sym.name, sym) != sym:
                    raise VerifyError(f"symbol {sym.name} has two bounds: {found[sym.name].bound} and {sym.bound}")
        return found


@dataclass(slots=True)
class Builder:
    """Makes a graph node by node, inferring result types.

    >>> from inferloom.ir.types import DType, Sym, TensorType
    >>> b = Builder("example")
    >>> x = b.input("x", TensorType(DType.F32, (Sym("tokens", 8), 4)))
    >>> y = b.emit("add", x, x)
    >>> print(b.finish([y]).nodes[0].result.type)
    f32[tokens,4]
    """

    name: str
    inputs: list[Value] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    _scalars: dict[tuple[float, DType], Value] = field(default_factory=dict)

    def input(self, name: str, type: Type) -> Value:
        value = Value(type, name)
        self.inputs.append(value)
        return value

    def param(self, source: str, type: Type) -> Value:
        value = Value(type, source.replace(".", "_"))
        self.params.append(Param(value, source))
        return value

    def emit_node(self, op: str, operands: Sequence[Value | None], attrs: Mapping[str, ops.Attr] | None = None,
                  loc: str = "", names: Sequence[str] = ()) -> Node:
        """Append a node; result types follow from the op's type rule (VerifyError when it does not hold)."""
        full = ops.get(op).check_attrs(dict(attrs or {}))
        types = ops.infer(op, [None if v is None else v.type for v in operands], full, loc)
        results = tuple(Value(t, names[i] if i < len(names) else "") for i, t in enumerate(types))
        node = Node(op, tuple(operands), MappingProxyType(full), results, loc)
        self.nodes.append(node)
        return node

    def emit(self, op: str, *operands: Value | None, loc: str = "", name: str = "", **attrs: ops.Attr) -> Value:
        """`emit_node` for ops with a single result."""
        return self.emit_node(op, operands, attrs, loc, (name,) if name else ()).result

    def scalar(self, value: float, dtype: DType = DType.F32) -> Value:
        """A scalar constant, made once per builder."""
        key = (float(value), dtype)
        if key not in self._scalars:
            self._scalars[key] = self.emit("constant", value=float(value), dtype=dtype)
        return self._scalars[key]

    def copy(self, node: Node, operands: Sequence[Value | None]) -> Node:
        """Append `node` with other operands, keeping names and location."""
        return self.emit_node(node.op, operands, node.attrs, node.loc, [v.name for v in node.results])

    def finish(self, outputs: Iterable[Value]) -> Graph:
        return Graph(self.name, tuple(self.inputs), tuple(self.params), tuple(self.nodes), tuple(outputs))


Visit = Callable[[Builder, Node, tuple[Value | None, ...]], Sequence[Value] | None]


def rewrite(graph: Graph, visit: Visit, keep_params: bool = True) -> Graph:
    """Rebuild `graph` node by node.

    `visit(builder, node, operands)` gets the node with its operands already mapped into the new graph. It
    returns the values that stand for the node's results, or None to copy the node as it is.
    """
    builder = Builder(graph.name, list(graph.inputs), list(graph.params))
    mapped: dict[Value, Value] = {v: v for v in (*graph.inputs, *(p.value for p in graph.params))}
    for node in graph.nodes:
        operands = tuple(None if v is None else mapped[v] for v in node.operands)
        made = visit(builder, node, operands)
        if made is None:
            made = builder.copy(node, operands).results
        mapped.update(zip(node.results, made, strict=True))
    return builder.finish(mapped[v] for v in graph.outputs)
