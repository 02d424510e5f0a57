"""recognize-norm: see norms that are spelled out in arithmetic.

    >>> from inferloom.ir.text import parse_graph, print_graph
    >>> before = '''graph g (tokens<=8) {
    ...   input %x: f32[tokens,4]
    ...   param %w: f32[4] = "w"
    ...   %eps = constant {value=1e-06}
    ...   %sq = mul %x, %x
    ...   %ms = mean %sq {axes=[1], keepdims=true}
    ...   %me = add %ms, %eps
    ...   %r = rsqrt %me
    ...   %n = mul %x, %r
    ...   %y = mul %w, %n
    ...   return %y
    ... }'''
    >>> print(print_graph(run(parse_graph(before))), end="")
    graph g (tokens<=8) {
      input %x: f32[tokens,4]
      param %w: f32[4] = "w"
      %0 = rms_norm %x, %w {eps=1e-06} : f32[tokens,4]
      return %0
    }

A weight may be any constant expression, such as `1 + w`. A root-mean-square norm of `x - mean(x)` is a layer norm.
"""

from __future__ import annotations

from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Any, Either, Op, Pattern, Rewriter, Scalar, apply_rules, tensor
from inferloom.ir.graph import Graph, Node, Value

NAME = "recognize-norm"

X = Any("x")
_SQUARES = Op("mul", X, X)
_MEAN = Either(Op("mean", _SQUARES, bind="mean"),
               Op("div", Op("sum", _SQUARES, bind="mean"), Scalar("count")),
               Op("mul", Op("sum", _SQUARES, bind="mean"), Scalar("per")))
_SHIFTED = Op("add", Either(_MEAN, Op("reshape", _MEAN)), Scalar("eps"))
#: `x / sqrt(mean(x^2) + eps)`, with the mean over the last axis.
RMS: Pattern = Either(Op("mul", X, Op("rsqrt", _SHIFTED)), Op("div", X, Op("sqrt", _SHIFTED)))
CENTRED: Pattern = Op("sub", X, Op("mean", X, bind="mean"))


def run(graph: Graph, report: Report | None = None) -> Graph:
    report = report or Report()

    def say(what: str, node: Node) -> None:
        report.fused(what, node.loc)

    def rms(r: Rewriter, node: Node) -> Value | None:
        found = r.match(RMS, node.result) if node.op in ("mul", "div") else None
        if found is None or not _over_last_axis(r, found["x"], found["mean"]):
            return None
        width = int(str(tensor(found["x"]).shape[-1]))
        count = r.scalar_of(found.get("count"))
        per = r.scalar_of(found.get("per"))
        if (count is not None and count != width) or (per is not None and abs(per * width - 1) > 1e-6):
            return None
        say("root-mean-square norm", node)
        return r.emit("rms_norm", found["x"], None, loc=node.loc, eps=r.scalar_of(found["eps"]))

    def layer(r: Rewriter, node: Node) -> Value | None:
        if node.op != "rms_norm" or node.operands[0] is None:
            return None
        found = r.match(CENTRED, node.operands[0])
        if found is None or not _over_last_axis(r, found["x"], found["mean"]):
            return None
        say("layer norm", node)
        return r.emit("layer_norm", found["x"], *node.operands[1:2], None, loc=node.loc, eps=node.attrs["eps"])

    def weight(r: Rewriter, node: Node) -> Value | None:
        norm, scale = _norm_and_constant(r, node, "mul")
        if norm is None or scale is None or norm.operands[1] is not None or _operand(norm, 2) is not None:
            return None
        say(f"weight into {norm.op}", node)
        rest = (None,) if norm.op == "layer_norm" else ()
        return r.emit(norm.op, norm.operands[0], scale, *rest, loc=node.loc, eps=norm.attrs["eps"])

    def bias(r: Rewriter, node: Node) -> Value | None:
        norm, offset = _norm_and_constant(r, node, "add")
        if norm is None or offset is None or norm.op != "layer_norm" or _operand(norm, 2) is not None:
            return None
        say("bias into layer_norm", node)
        return r.emit("layer_norm", norm.operands[0], norm.operands[1], offset, loc=node.loc, eps=norm.attrs["eps"])

    return apply_rules(graph, [rms, layer, weight, bias])


def _over_last_axis(r: Rewriter, x: Value, mean: Value) -> bool:
    """Whether the reduction bound to `mean` is over the last axis of x alone (its place kept or restored)."""
    node = r.producer(mean)
    last = tensor(x).rank - 1
    return node is not None and node.attrs["axes"] == (last,) and isinstance(tensor(x).shape[-1], int) and (
        bool(node.attrs["keepdims"]))


def _operand(node: Node, place: int) -> Value | None:
    return node.operands[place] if place < len(node.operands) else None


def _norm_and_constant(r: Rewriter, node: Node, op: str) -> tuple[Node | None, Value | None]:
    """The two sides of `norm * constant` when the constant has the norm's trailing dims."""
    if node.op != op:
        return None, None
    for a, b in (node.operands, node.operands[::-1]):
        norm = r.producer(a)
        if norm is None or norm.op not in ("rms_norm", "layer_norm") or b is None or not r.is_constant(b):
            continue
        shape = tensor(b).shape
        while shape and shape[0] == 1:
            shape = shape[1:]
        if not shape or shape != tensor(norm.result).shape[-len(shape):] or len(shape) == tensor(norm.result).rank:
            continue
        return norm, b if shape == tensor(b).shape else r.emit("reshape", b, shape=shape)
    return None, None
