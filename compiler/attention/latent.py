"""Latent attention (MLA, DeepSeek-V2): the cache keeps what keys and values are made from.

Keys and values of all heads are linear in one latent `c` of each token, and a part of the key is the same for all
heads. Instead of `q . (W_k c)`, the query meets the latent, `(W_k^T q) . c`; instead of `sum p (W_v c)`, the latents
are summed first, `W_v (sum p c)`. The products with W_k and W_v become part of the query and of the output.

Before: `%y = linear %c, %w; %kv = reshape %y; %k = concat (slice %kv), (expand %shared); %v = slice %kv;
        %o = attention %q, %k, %v`
After:  `%k = concat %c, %shared; %q1 = expert_linear (slice %q), %wk, %head; %a = attention (concat %q1, (slice %q)), %k,
        _ {v_dim=...}; %o = expert_linear %a, %wv, %head`

A key of the new attention has `rank + shared` elements for all heads together, of which the first `rank` are its value.
"""

from __future__ import annotations

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Rewriter, apply_rules, tensor
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import DType

NAME = "absorb-latent"


def run(graph: Graph, report: Report | None = None) -> Graph:
    report = report or Report()
    positions = next((v for v in graph.inputs if v.name == "positions"), None)
    numbers: dict[int, Value] = {}

    def absorb(r: Rewriter, node: Node) -> Value | None:
        if node.op != "attention" or positions is None:
            return None
        q, k, v, *extra = node.operands
        if q is None or k is None or v is None:
            return None
        value, key = _columns(r, v), r.producer(k)
        if value is None or key is None or key.op != "concat" or key.attrs["axis"] != 2 or len(key.operands) != 2:
            return None
        made, first, last = value
        own = next((i for i, part in enumerate(key.operands) if (c := _columns(r, part)) is not None and c[0] is made), None)
        if own is None:
            return None
        columns = _columns(r, key.operands[own])
        shared = _shared(r, key.operands[1 - own])
        linear = r.producer(made.operands[0])
        if columns is None or shared is None or linear is None or linear.op != "linear" or len(linear.operands) > 2 and (
                linear.operands[2] is not None):
            return None
        latent, weight = linear.operands[:2]
        if latent is None or weight is None or not r.is_constant(weight) or tensor(latent).rank != 2:
            return None
        tokens = tensor(q).shape[0]
        (heads, width), (rank,), (_, rope), (_, k_dim), (_, v_dim) = (_sizes(x) for x in (made.result, latent, shared, k, v))
        if rank + rope >= heads * (k_dim + v_dim):
            report.skipped("keys and values as they are", f"the latent of {rank} + {rope} is not smaller", node.loc)
            return None
        loc = node.loc

        def cut(x: Value, start: int, stop: int) -> Value:
            return r.emit("slice", x, axis=tensor(x).rank - 1, start=start, stop=stop, loc=loc)

        by_head = r.emit("reshape", weight, shape=(heads, width, rank), loc=loc)
        to_key, to_value = (r.emit("slice", by_head, axis=1, start=a, stop=b, loc=loc) for a, b in (columns[1:], (first, last)))
        if heads not in numbers:  # one for all layers
            zero = r.emit("mul", positions, r.emit("constant", value=0, dtype=DType.I32), loc=loc)
            column = r.emit("reshape", zero, shape=(tokens, 1), loc=loc)
            numbers[heads] = r.emit("add", column, r.emit("iota", size=heads, loc=loc), loc=loc)
        head = numbers[heads]
        split = columns[2] - columns[1]
        # The query's columns are in the order of the key's.
        ours, others = ((0, split), (split, k_dim)) if own == 0 else ((rope, k_dim), (0, rope))
        q_own, q_shared = cut(q, *ours), cut(q, *others)
        q_latent = r.emit("expert_linear", q_own, to_key, head, transposed=True, loc=loc)
        query = r.emit("concat", q_latent, q_shared, axis=2, loc=loc)
        keys = r.emit("concat", r.emit("reshape", latent, shape=(tokens, 1, rank), loc=loc), shared, axis=2, loc=loc)
        attrs = dict(node.attrs) | {"v_dim": rank}
        summed = r.builder.emit_node("attention", (query, keys, None, *extra), attrs, loc).result
        report.fused(f"attention slot {node.attrs['slot']}: the cache keeps latents of {rank} + {rope}", loc)
        return r.emit("expert_linear", summed, to_value, head, loc=loc)

    return apply_rules(graph, [absorb])


def _sizes(value: Value) -> tuple[int, ...]:
    """The shape after the token axis."""
    return tuple(int(str(d)) for d in tensor(value).shape[1:])


def _columns(r: Rewriter, value: Value | None) -> tuple[Node, int, int] | None:
    """`value` as columns start:stop of each head of `reshape (linear ...)`."""
    node = r.producer(value)
    if node is None or node.op != "slice" or node.attrs["axis"] != 2 or node.attrs["step"] != 1:
        return None
    made = r.producer(node.operands[0])
    if made is None or made.op != "reshape" or tensor(made.result).rank != 3:
        return None
    return made, int(str(node.attrs["start"])), int(str(node.attrs["stop"]))


def _shared(r: Rewriter, value: Value | None) -> Value | None:
    """What all heads share: [tokens, 1, dim]."""
    if value is None or tensor(value).shape[1] == 1:
        return value
    node = r.producer(value)
    source = node.operands[0] if node is not None and node.op == "expand" else None
    return source if source is not None and tensor(source).shape[1] == 1 else None
