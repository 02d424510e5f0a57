"""Differential attention (Ye et al. 2024): the cache keeps each key and value once.

Models write it as two attentions over the same queries and keys, one for each half of the values, in which key heads i
and i + n / 2 share a value. Side by side, two such keys and the two halves of their value are one head of twice the
size: the queries of the first meet it as (q, 0), those of the second as (0, q). That is as much work as before, and
half of the state.

Before: `%o = concat (attention %q, %k, (expand %v1)), (attention %q, %k, (expand %v2)) {axis=2}`
After:  `%a = attention (concat (concat %q1, 0), (concat 0, %q2)), (concat %k1, %k2), (concat %v1, %v2); %o = concat (slice
        %a), (slice %a)`
"""

from __future__ import annotations

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Rewriter, apply_rules, tensor
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import DType

NAME = "pair-heads"


def run(graph: Graph, report: Report | None = None) -> Graph:
    report = report or Report()

    def pair(r: Rewriter, node: Node) -> Value | None:
        if node.op != "concat" or node.attrs["axis"] != 2 or len(node.operands) != 2:
            return None
        one, two = (r.producer(v) for v in node.operands)
        if one is None or two is None or one.op != "attention" or two.op != "attention" or not _alike(one, two):
            return None
        q, k = one.operands[:2]
        halves = [_half(r, n.operands[2]) for n in (one, two)]
        if q is None or k is None or None in halves:
            return None
        (tokens, heads, dim), kv_heads = tensor(q).shape, int(str(tensor(k).shape[1]))
        pairs, group, loc = kv_heads // 2, int(str(heads)) // kv_heads, one.loc

        def parts(x: Value, axis: int, size: int) -> tuple[Value, Value]:
            a, b = (r.emit("slice", x, axis=axis, start=i * size, stop=(i + 1) * size, loc=loc) for i in range(2))
            return a, b

        def join(a: Value | None, b: Value | None, axis: int) -> Value:
            return r.emit("concat", a, b, axis=axis, loc=loc)

        by_pair = (tokens, pairs, group, dim)
        first, second = (r.emit("reshape", x, shape=by_pair, loc=loc) for x in parts(q, 1, pairs * group))
        zero = r.emit("mul", first, r.emit("constant", value=0.0, dtype=DType.F32, loc=loc), loc=loc)
        wide = join(join(first, zero, 3), join(zero, second, 3), 2)
        query = r.emit("reshape", wide, shape=(tokens, heads, 2 * int(str(dim))), loc=loc)
        made = r.builder.emit_node("attention", (query, join(*parts(k, 1, pairs), 2), join(halves[0], halves[1], 2)),
                                   one.attrs, loc).result
        width = tensor(made).shape[2]
        split = r.emit("reshape", made, shape=(tokens, pairs, 2 * group, width), loc=loc)
        back = [r.emit("reshape", x, shape=(tokens, pairs * group, width), loc=loc) for x in parts(split, 2, group)]
        report.fused(f"attention slots {one.attrs['slot']} and {two.attrs['slot']}: {pairs} pairs of heads", loc)
        return join(back[0], back[1], 1)

    return apply_rules(graph, [pair])


def _alike(one: Node, two: Node) -> bool:
    """Whether two attentions differ in their values alone, and nothing is given for each head."""
    return (one.operands[:2] == two.operands[:2] and not any(one.operands[3:]) and not any(two.operands[3:])
            and {**one.attrs, "slot": 0} == {**two.attrs, "slot": 0})


def _half(r: Rewriter, value: Value | None) -> Value | None:
    """x [tokens, n / 2, dim] where `value` [tokens, n, dim] is x twice."""
    node = r.producer(value)
    if node is None or value is None:
        return None
    source, heads = node.operands[0], tensor(value).shape[1]
    if node.op == "concat" and node.attrs["axis"] == 1 and len(node.operands) == 2 and node.operands[1] is source:
        return source
    if node.op == "expand" and source is not None and tensor(source).shape[1] == 1 and heads == 2:
        return source
    return None
