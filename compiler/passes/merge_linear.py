"""merge-linear: one matmul for all linears that read the same x.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   param %wq: f32[8,4] = "q"
    ...   param %wk: f32[2,4] = "k"
    ...   %q = linear %x, %wq
    ...   %k = linear %x, %wk
    ...   return %q, %k
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      param %wq: f32[8,4] = "q"
      param %wk: f32[2,4] = "k"
      %0 = concat %wq, %wk {axis=0} : f32[10,4]
      %1 = linear %x, %0 : f32[tokens,10]
      %2 = slice %1 {axis=1, start=0, stop=8} : f32[tokens,8]
      %3 = slice %1 {axis=1, start=8, stop=10} : f32[tokens,2]
      return %2, %3
    }

The two halves of a gated activation, `silu(gate) * up`, are interleaved in groups of `gate_columns` instead, so that a
matmul kernel has both sides of the product at hand; a checkpoint that stores both in one matrix is split for that:

    %w = interleave %gate, %up {group=32}; %y = linear %x, %w
    %z = reshape %y {shape=[tokens, n/32, 2, 32]}; %g = slice %z {axis=2, start=0, stop=1}; %g1 = reshape %g ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inferloom.compiler.quantization.rows import row_sources
from inferloom.compiler.quantization.scheme import Scheme
from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import drop_dead_nodes, pointwise_cone, tensor
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite

NAME = "merge-linear"
#: Columns of a gate before those of its up projection, unless the target wants another number.
GATE_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class _Columns:
    """Columns start:stop of a linear, read as `value`."""

    linear: Node
    value: Value
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Merge:
    """Parts of linears over one x that become one; a gate and its up projection in turns of `group` columns."""

    parts: tuple[_Columns, ...]
    group: int = 0


def run(graph: Graph, report: Report | None = None, gate_columns: int = GATE_COLUMNS,
        stored: Mapping[str, Scheme] | None = None) -> Graph:
    """`stored`: schemes of weights that are stored quantised, by source; those of one input are joined if they are alike."""
    report = report or Report()
    original, graph = graph, _constants_first(graph)
    constants, users, producers = graph.constants(), graph.users(), graph.producers()
    linears = [n for n in graph.nodes if n.op == "linear" and _mergeable(n, constants)]
    merges: dict[Node, _Merge] = {}
    taken: set[Node] = set()
    for node in graph.nodes:
        pair = _gated_pair(graph, node, producers, users, constants) if node.op == "mul" else None
        if pair is None or taken & {p.linear for p in pair}:
            continue
        width = pair[0].stop - pair[0].start
        if width % gate_columns:
            report.skipped("gate and up projection into interleaved columns",
                           f"{width} columns are not a multiple of {gate_columns}", node.loc)
            continue
        first = min((p.linear for p in pair), key=linears.index)
        merges[first] = _Merge(pair, gate_columns)
        taken.update(p.linear for p in pair)
        report.fused(f"gate and up projection into one linear of {2 * width} interleaved columns", node.loc)
    by_input: dict[tuple[Value | None, frozenset[Scheme | None]], list[Node]] = {}
    sources = {p.value: p.source for p in graph.params}
    for node in linears:
        if node not in taken:
            names = row_sources(_operand(node, 1), producers, sources) or ()
            kinds = frozenset((stored or {}).get(name) for name in names)
            by_input.setdefault((node.operands[0], kinds or frozenset([None])), []).append(node)
    for group in by_input.values():
        if len(group) > 1:
            merges[group[0]] = _Merge(tuple(_whole(n) for n in group))
            taken.update(group)
            report.fused(f"{len(group)} linears of the same input into one", group[0].loc)
    return _emit(graph, merges) if merges else original


def _emit(graph: Graph, merges: dict[Node, _Merge]) -> Graph:
    ready: dict[Value, Value] = {}  # columns of merged linears, by the value that held them

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        if node in merges:
            ready.update(_merged(builder, merges[node], operands[0], mapped))
        if all(v in ready for v in node.results):
            return [ready[v] for v in node.results]
        made = builder.copy(node, operands).results
        mapped.update(zip(node.results, made))
        return made

    mapped: dict[Value, Value] = {p.value: p.value for p in graph.params}
    return drop_dead_nodes(rewrite(graph, visit))


def _merged(builder: Builder, merge: _Merge, x: Value | None, mapped: dict[Value, Value]) -> dict[Value, Value]:
    """Emit the one linear and the values that stand for its parts."""
    loc = ", ".join(dict.fromkeys(p.linear.loc for p in merge.parts if p.linear.loc))
    weights = [_rows(builder, mapped[_operand(p.linear, 1)], p) for p in merge.parts]
    biases: list[Value | None] = [None]
    if any(len(p.linear.operands) > 2 and p.linear.operands[2] is not None for p in merge.parts):
        biases = [_bias(builder, p, mapped) for p in merge.parts]

    def join(parts: Sequence[Value | None]) -> Value | None:
        if parts[0] is None:
            return None
        if merge.group:
            return builder.emit("interleave", *parts, group=merge.group)
        return builder.emit("concat", *parts, axis=0)

    bias = join(biases)
    y = builder.emit("linear", x, join(weights), *((bias,) if bias is not None else ()), loc=loc)
    shape = tensor(y).shape
    made, last, begin = {}, len(shape) - 1, 0
    if merge.group:
        width = merge.parts[0].stop - merge.parts[0].start
        y = builder.emit("reshape", y, shape=(*shape[:-1], width // merge.group, 2, merge.group), loc=loc)
        for i, part in enumerate(merge.parts):
            half = builder.emit("slice", y, axis=last + 1, start=i, stop=i + 1, loc=loc)
            made[part.value] = builder.emit("reshape", half, shape=(*shape[:-1], width), loc=loc)
        return made
    for part in merge.parts:
        end = begin + part.stop - part.start
        made[part.value] = builder.emit("slice", y, axis=last, start=begin, stop=end, loc=part.linear.loc)
        begin = end
    return made


def _rows(builder: Builder, weight: Value, part: _Columns) -> Value:
    """The rows of a weight (or bias) that make the part's columns."""
    if (part.start, part.stop) == (0, tensor(weight).shape[0]):
        return weight
    return builder.emit("slice", weight, axis=0, start=part.start, stop=part.stop)


def _bias(builder: Builder, part: _Columns, mapped: dict[Value, Value]) -> Value:
    own = part.linear.operands[2] if len(part.linear.operands) > 2 else None
    if own is not None:
        return _rows(builder, mapped[own], part)
    return builder.emit("expand", builder.scalar(0.0), shape=(part.stop - part.start,))


def _mergeable(node: Node, constants: set[Value]) -> bool:
    """Only weights that are known at compile time can be joined, and a constant times a weight is no work at all."""
    x, *rest = node.operands
    return x not in constants and all(v is None or v in constants for v in rest)


def _operand(node: Node, place: int) -> Value:
    value = node.operands[place]
    if value is None:
        raise TypeError(node)
    return value


def _whole(node: Node) -> _Columns:
    return _Columns(node, node.result, 0, int(str(tensor(node.result).shape[-1])))


def _columns(value: Value, producers: dict[Value, Node]) -> _Columns | None:
    """`value` as columns of a linear: all of them, or a slice."""
    node = producers.get(value)
    if node is None or node.op not in ("linear", "slice"):
        return None
    if node.op == "linear":
        return _whole(node)
    inner = producers.get(_operand(node, 0))
    if inner is None or inner.op != "linear" or node.attrs["axis"] != tensor(value).rank - 1 or node.attrs["step"] != 1:
        return None
    return _Columns(inner, value, int(str(node.attrs["start"])), int(str(node.attrs["stop"])))


def _gated_pair(graph: Graph, root: Node, producers: dict[Value, Node], users: dict[Value, list[Node]],
                constants: set[Value]) -> tuple[_Columns, _Columns] | None:
    """Gate and up of `f(gate) * up`, when nothing but this product reads them."""
    for gated, plain in (root.operands, root.operands[::-1]):
        up = _columns(plain, producers) if plain is not None else None
        if up is None or gated is None or gated is plain:
            continue
        gate = next((c for v in _leaves(gated, producers) if (c := _columns(v, producers)) is not None), None)
        if gate is None or gate.value is plain or pointwise_cone(gated, {gate.value}, producers.get) is None:
            continue
        both = {gate.linear, up.linear}
        one_input = gate.linear.operands[0] is up.linear.operands[0]
        if not one_input or gate.stop - gate.start != up.stop - up.start:
            continue
        if not all(_mergeable(n, constants) for n in both) or plain in graph.outputs or gate.value in graph.outputs:
            continue
        if gate.linear is up.linear:
            width = int(str(tensor(gate.linear.result).shape[-1]))
            halves = sorted([(gate.start, gate.stop), (up.start, up.stop)]) == [(0, width // 2), (width // 2, width)]
            readers = users.get(gate.linear.result, [])
            if not halves or len(readers) != 2 or gate.linear.result in graph.outputs:
                continue
        elif any(c.linear.result is not c.value for c in (gate, up)):
            continue
        return gate, up
    return None


def _leaves(value: Value, producers: dict[Value, Node]) -> list[Value]:
    """`value` and what it is computed from, down to the first linears and slices."""
    queue = [value]
    for current in queue:
        node = producers.get(current)
        if node is not None and node.op not in ("linear", "slice") and len(queue) < 64:
            queue.extend(v for v in node.operands if v is not None and v not in queue)
    return queue


def _constants_first(graph: Graph) -> Graph:
    """Constant expressions before everything else, so that weights are there when the first linear needs them."""
    constants = graph.constants()
    first = [n for n in graph.nodes if all(v in constants for v in n.results)]
    rest = [n for n in graph.nodes if not all(v in constants for v in n.results)]
    return Graph(graph.name, graph.inputs, graph.params, (*first, *rest), graph.outputs)
