"""canonicalize: one spelling for each thing, so that later patterns need only know one.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   %one = constant {value=1.0}
    ...   %two = constant {value=2.0}
    ...   %a = mul %x, %one
    ...   %b = pow %a, %two
    ...   %c = sqrt %b
    ...   %d = div %one, %c
    ...   %e = reshape %d {shape=[tokens,2,2]}
    ...   %y = reshape %e {shape=[tokens,4]}
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      %0 = mul %x, %x : f32[tokens,4]
      %1 = rsqrt %0 : f32[tokens,4]
      return %1
    }
"""

from __future__ import annotations

from collections.abc import Callable

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Any, Op, Pattern, Rewriter, Scalar, apply_rules, tensor
from inferloom.ir import op as ops
from inferloom.ir.graph import Graph, Node, Value

NAME = "canonicalize"

_MOST_ROUNDS = 8


def run(graph: Graph, report: Report | None = None) -> Graph:
    for _ in range(_MOST_ROUNDS):
        changed = apply_rules(graph, RULES)
        if changed is graph:
            break
        graph = changed
    return graph


X = Any("x")
#: Values that match on the left are replaced by what the right makes of `x`.
ALGEBRA: tuple[tuple[Pattern, Callable[[Rewriter, Value, str], Value]], ...] = (
    (Op("mul", X, Scalar(value=1.0)), lambda r, x, loc: x),
    (Op("add", X, Scalar(value=0.0)), lambda r, x, loc: x),
    (Op("sub", X, Scalar(value=0.0)), lambda r, x, loc: x),
    (Op("div", X, Scalar(value=1.0)), lambda r, x, loc: x),
    (Op("pow", X, Scalar(value=1.0)), lambda r, x, loc: x),
    (Op("pow", X, Scalar(value=2.0)), lambda r, x, loc: r.emit("mul", x, x, loc=loc)),
    (Op("pow", X, Scalar(value=0.5)), lambda r, x, loc: r.emit("sqrt", x, loc=loc)),
    (Op("pow", X, Scalar(value=-0.5)), lambda r, x, loc: r.emit("rsqrt", x, loc=loc)),
    (Op("div", Scalar(value=1.0), Op("sqrt", X)), lambda r, x, loc: r.emit("rsqrt", x, loc=loc)),
    (Op("neg", Op("neg", X)), lambda r, x, loc: x),
)


def _algebra(r: Rewriter, node: Node) -> Value | None:
    for pattern, make in ALGEBRA:
        if isinstance(pattern, Op) and pattern.op == node.op:
            found = r.match(pattern, node.result)
            if found is not None and tensor(found["x"]) == tensor(node.result):
                return make(r, found["x"], node.loc)
    return None




def _identity(r: Rewriter, node: Node) -> Value | None:
    """Ops that give their operand back."""
    if node.op not in ("reshape", "permute", "slice", "cast", "expand", "concat") or len(node.operands) != 1:
        return None
    (x,) = node.operands
    if x is None or x.type != node.result.type:
        return None
    if node.op == "permute" and node.attrs["axes"] != tuple(range(tensor(x).rank)):
        return None
    return x


def _pairs(r: Rewriter, node: Node) -> Value | None:
    """Two moves in a row that one can do."""
    inner = r.producer(node.operands[0]) if node.operands else None
    if inner is None or inner.op != node.op or not inner.operands:
        return None
    x = inner.operands[0]
    if node.op in ("reshape", "expand"):
        return r.emit(node.op, x, loc=node.loc, shape=tensor(node.result).shape)
    if node.op == "permute":
        first, second = _ints(inner, "axes"), _ints(node, "axes")
        return r.emit("permute", x, loc=node.loc, axes=tuple(first[a] for a in second))
    # A value that others read too is worth keeping: patterns look for it.
    if node.op == "slice" and node.attrs["axis"] == inner.attrs["axis"] and r.read_once(inner.result):
        start, step = _int(inner, "start"), _int(inner, "step")
        count = _int(node, "stop") - _int(node, "start")
        begin = start + _int(node, "start") * step
        return r.emit("slice", x, loc=node.loc, axis=_int(node, "axis"), start=begin,
                      stop=begin + (count - 1) * step + 1, step=step * _int(node, "step"))
    return None


def _permute_of_units(r: Rewriter, node: Node) -> Value | None:
    """A permutation that moves only axes of length one is a reshape."""
    if node.op != "permute":
        return None
    (x,) = node.operands
    if x is None:
        return None
    shape = tensor(x).shape
    kept = [a for a in _ints(node, "axes") if shape[a] != 1]
    symbolic_leads = all(isinstance(d, int) for d in (*shape[1:], *tensor(node.result).shape[1:]))
    if kept != sorted(kept) or not symbolic_leads:
        return None
    return r.emit("reshape", x, loc=node.loc, shape=tensor(node.result).shape)


def _broadcasts(r: Rewriter, node: Node) -> Value | None:
    """Pointwise ops broadcast by themselves, so an operand need not be expanded for them."""
    if not ops.get(node.op).pointwise:
        return None
    for i, value in enumerate(node.operands):
        inner = r.producer(value)
        if inner is None or inner.op not in ("expand", "reshape") or inner.operands[0] is None:
            continue
        x = inner.operands[0]
        if inner.op == "reshape":
            added = tensor(inner.result).rank - tensor(x).rank
            if added <= 0 or tensor(inner.result).shape != (1,) * added + tensor(x).shape:
                continue
        operands = [*node.operands[:i], x, *node.operands[i + 1:]]
        if ops.infer(node.op, [None if v is None else v.type for v in operands], node.attrs) == (node.result.type,):
            return r.builder.copy(node, operands).result
    return None


def _slice_of_concat(r: Rewriter, node: Node) -> Value | None:
    """A slice that lies within one part of a concatenation."""
    inner = r.producer(node.operands[0]) if node.op == "slice" else None
    if inner is None or inner.op != "concat" or inner.attrs["axis"] != node.attrs["axis"]:
        return None
    axis, start, stop, begin = _int(node, "axis"), _int(node, "start"), _int(node, "stop"), 0
    for part in inner.operands:
        if part is None:
            continue
        end = begin + int(str(tensor(part).shape[axis]))
        if begin <= start and stop <= end:
            return r.emit("slice", part, loc=node.loc, axis=axis, start=start - begin, stop=stop - begin,
                          step=_int(node, "step"))
        begin = end
    return None


def _concat_of_slices(r: Rewriter, node: Node) -> Value | None:
    """Neighbouring slices of one value put together again."""
    if node.op != "concat":
        return None
    axis, parts = _int(node, "axis"), list(node.operands)
    for i in range(len(parts) - 1):
        a, b = r.producer(parts[i]), r.producer(parts[i + 1])
        if (a is not None and b is not None and a.op == b.op == "slice" and a.operands == b.operands
                and a.attrs["axis"] == b.attrs["axis"] == axis and a.attrs["step"] == b.attrs["step"] == 1
                and a.attrs["stop"] == b.attrs["start"]):
            whole = r.emit("slice", a.operands[0], loc=a.loc, axis=axis, start=_int(a, "start"), stop=_int(b, "stop"))
            rest = [*parts[:i], whole, *parts[i + 2:]]
            return whole if len(rest) == 1 else r.emit("concat", *rest, loc=node.loc, axis=axis)
    return None


def _int(node: Node, name: str) -> int:
    return int(str(node.attrs[name]))


def _ints(node: Node, name: str) -> tuple[int, ...]:
    value = node.attrs[name]
    return tuple(int(str(v)) for v in value) if isinstance(value, tuple) else ()


RULES = (_identity, _algebra, _pairs, _permute_of_units, _broadcasts, _slice_of_concat, _concat_of_slices)
