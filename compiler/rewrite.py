"""Patterns as data, and the walk that rewrites a graph with them.

A pattern says what a value must look like; matching reads the graph and changes nothing:

    NORMED = Op("mul", Any("x"), Op("rsqrt", Op("add", Op("mean", Op("mul", Any("x"), Any("x"))), Scalar("eps"))))

A name that occurs twice must stand for the same value. Operands of commutative ops match in either order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Graph, Node, Value
from inferloom.ir.types import TensorType

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "eq"})


@dataclass(frozen=True, slots=True)
class Any:
    """Any value, bound to `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scalar constant: bound to `name` when there is one, and equal to `value` when that is given."""

    name: str = ""
    value: float | None = None


@dataclass(frozen=True, slots=True, init=False)
class Op:
    """The result of an op whose operands match. Attributes given here must be equal; `bind` names the value."""

    op: str
    operands: tuple[Pattern, ...]
    attrs: Mapping[str, ops.Attr]
    bind: str

    def __init__(self, op: str, *operands: Pattern, bind: str = "", **attrs: ops.Attr) -> None:
        for name, value in (("op", op), ("operands", operands), ("attrs", attrs), ("bind", bind)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, init=False)
class Either:
    """The first alternative that matches."""

    patterns: tuple[Pattern, ...]

    def __init__(self, *patterns: Pattern) -> None:
        object.__setattr__(self, "patterns", patterns)


Pattern = Any | Scalar | Op | Either
Bindings = dict[str, Value]
Producer = Callable[[Value], "Node | None"]


def match(pattern: Pattern, value: Value, producer: Producer) -> Bindings | None:
    """What the pattern's names stand for when `value` matches, else None."""
    return next(_match(pattern, value, producer, {}), None)


def _match(pattern: Pattern, value: Value | None, producer: Producer, bound: Bindings) -> Iterator[Bindings]:
    if value is None:
        return
    if isinstance(pattern, Either):
        for alternative in pattern.patterns:
            yield from _match(alternative, value, producer, bound)
        return
    if isinstance(pattern, Any):
        yield from _bind(pattern.name, value, bound)
        return
    node = producer(value)
    if isinstance(pattern, Scalar):
        if node is not None and node.op == "constant" and pattern.value in (None, node.attrs["value"]):
            yield from _bind(pattern.name, value, bound)
        return
    if node is None or node.op != pattern.op or len(node.operands) != len(pattern.operands) or len(node.results) != 1:
        return
    if any(node.attrs.get(name) != wanted for name, wanted in pattern.attrs.items()):
        return
    orders: list[tuple[Value | None, ...]] = [node.operands]
    if node.op in COMMUTATIVE and node.operands[0] is not node.operands[1]:
        orders.append(node.operands[::-1])
    for operands in orders:
        for found in _match_all(pattern.operands, operands, producer, bound):
            yield from _bind(pattern.bind, value, found)


def _match_all(patterns: Sequence[Pattern], values: Sequence[Value | None], producer: Producer,
               bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in _match(patterns[0], values[0], producer, bound):
        yield from _match_all(patterns[1:], values[1:], producer, found)


def _bind(name: str, value: Value, bound: Bindings) -> Iterator[Bindings]:
    if not name:
        yield bound
    elif bound.get(name, value) is value:
        yield {**bound, name: value}


@dataclass(slots=True)
class Rewriter:
    """A graph under construction, where rules can look at what made a value.

    `reads` counts how often the old graph read what a value stands for.
    """

    builder: Builder
    constants: set[Value] = field(default_factory=set)
    reads: dict[Value, int] = field(default_factory=dict)
    _made: dict[Value, Node] = field(default_factory=dict)
    _seen: int = 0

    def __post_init__(self) -> None:
        self.constants.update(p.value for p in self.builder.params)

    def producer(self, value: Value | None) -> Node | None:
        """The node that makes a value; None for inputs and parameters."""
        self._catch_up()
        return None if value is None else self._made.get(value)

    def is_constant(self, value: Value) -> bool:
        """Whether the value is known at compile time."""
        self._catch_up()
        return value in self.constants

    def scalar_of(self, value: Value | None) -> float | None:
        """The number that a scalar constant holds, None for other values."""
        node = self.producer(value)
        return float(str(node.attrs["value"])) if node is not None and node.op == "constant" else None

    def emit(self, op: str, *operands: Value | None, loc: str = "", **attrs: ops.Attr) -> Value:
        """Add a node with one result."""
        return self.builder.emit_node(op, operands, attrs, loc).result

    def read_once(self, value: Value) -> bool:
        """Whether nothing else reads a value that some node reads (values made by rules count as such)."""
        return self.reads.get(value, 1) <= 1

    def match(self, pattern: Pattern, value: Value) -> Bindings | None:
        return match(pattern, value, self.producer)

    def _catch_up(self) -> None:
        for node in self.builder.nodes[self._seen:]:
            self._made.update((v, node) for v in node.results)
            if ops.get(node.op).foldable and all(v in self.constants for v in node.operands if v is not None):
                self.constants.update(node.results)
        self._seen = len(self.builder.nodes)


Rule = Callable[[Rewriter, Node], Value | None]


def apply_rules(graph: Graph, rules: Iterable[Rule]) -> Graph:
    """Rebuild `graph`, offering each node with one result to the rules until none of them changes it.

    A rule gets the node as it stands in the new graph and returns the value to use in its place, or None.
    Returns `graph` itself when no rule applied; nodes that nothing reads any more are gone otherwise.
    """
    rules = tuple(rules)
    builder = Builder(graph.name, list(graph.inputs), list(graph.params))
    rewriter = Rewriter(builder)
    mapped: dict[Value, Value] = {v: v for v in (*graph.inputs, *(p.value for p in graph.params))}
    changed = False
    counts = Counter(v for n in graph.nodes for v in n.operands if v is not None)
    counts.update(graph.outputs)
    for node in graph.nodes:
        made = builder.copy(node, [None if v is None else mapped[v] for v in node.operands])
        results = list(made.results)
        current: Node | None = made
        while current is not None and len(results) == 1:
            replaced = next((v for v in (rule(rewriter, current) for rule in rules) if v is not None), None)
            if replaced is None:
                break
            changed = True
            results = [replaced]
            current = rewriter.producer(replaced)
        mapped.update(zip(node.results, results, strict=True))
        for old, new in zip(node.results, results):
            rewriter.reads[new] = max(counts[old], rewriter.reads.get(new, 0))
    if not changed:
        return graph
    return drop_dead_nodes(builder.finish(mapped[v] for v in graph.outputs))


def drop_dead_nodes(graph: Graph) -> Graph:
    """`graph` without the nodes whose results nothing reads."""
    live = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if live.intersection(node.results):
            kept.append(node)
            live.update(v for v in node.operands if v is not None)
    if len(kept) == len(graph.nodes):
        return graph
    return Graph(graph.name, graph.inputs, graph.params, tuple(reversed(kept)), graph.outputs)


def pointwise_cone(root: Value, cut: set[Value], producer: Producer, limit: int = 24) -> list[Node] | None:
    """The nodes, in order, that compute `root` from `cut` and scalar constants with pointwise ops alone.

    None when anything else is needed, or more than `limit` nodes.
    """
    order: dict[Value, Node] = {}
    stack = [(root, False)]
    while stack:
        value, ready = stack.pop()
        if value in cut or value in order:
            continue
        node = producer(value)
        if node is None or not ops.get(node.op).pointwise or len(order) >= limit:
            return None
        if ready:
            order[value] = node
        else:
            stack.append((value, True))
            stack.extend((v, False) for v in node.operands if v is not None)
    return list(order.values())


def tensor(value: Value) -> TensorType:
    """The type of a value that must be a tensor."""
    if not isinstance(value.type, TensorType):
        raise TypeError(value)
    return value.type
