"""pack-weights: lay every matmul weight out for the target.

Before: `%y = linear %x, %w, %b`
After:  `%p = pack_linear %w {tile=64, pair=2, k_multiple=32}; %y = packed_linear %x, %p, %b {n=.., k=..}`

`expert_linear` likewise becomes `packed_expert_linear` over `pack_experts`.

An embedding whose table is also such a weight (tied embeddings) reads the packed copy, so that it is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inferloom.compiler.report import Report
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.types import DType, TensorType

NAME = "pack-weights"


@dataclass(frozen=True, slots=True)
class Packing:
    """How a target wants matmul weights: lanes over `tile` columns, `pair` k-steps together."""

    tile: int
    k_multiple: int
    pair: dict[DType, int]


def run(graph: Graph, report: Report, *, packing: Packing) -> Graph:
    tied = {n.operands[1] for n in graph.nodes if n.op == "linear"}
    packed: dict[Value, Value] = {}

    def pack(builder: Builder, weight: Value) -> tuple[Value, dict[str, int]]:
        if not isinstance(weight.type, TensorType):
            raise TypeError(weight)
        if weight not in packed:
            packed[weight] = builder.emit("pack_linear", weight, tile=packing.tile,
                                          pair=packing.pair[weight.type.dtype], k_multiple=packing.k_multiple)
        n, k = (int(str(d)) for d in weight.type.shape)
        return packed[weight], {"n": n, "k": k}

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        if node.op == "linear":
            x, weight, *bias = operands
            value, dims = pack(builder, _value(weight))
            return builder.emit_node("packed_linear", (x, value, *bias), dims, node.loc).results
        if node.op == "expert_linear":
            x, weight, *rest = operands
            weight = _value(weight)
            transposed = bool(node.attrs["transposed"])
            if weight not in packed:
                packed[weight] = builder.emit("pack_experts", weight, tile=packing.tile, k_multiple=packing.k_multiple,
                                              pair=packing.pair[weight.type.dtype], transposed=transposed)  # type: ignore[union-attr]
            _, n, k = (int(str(d)) for d in weight.type.shape)  # type: ignore[union-attr]
            n, k = (k, n) if transposed else (n, k)
            return builder.emit_node("packed_expert_linear", (x, packed[weight], *rest), {"n": n, "k": k}, node.loc).results
        if node.op == "embedding" and node.operands[1] in tied:
            value, dims = pack(builder, _value(operands[1]))
            report.fused("embedding reads the tied output projection's packed weight", node.loc)
            return builder.emit_node("packed_embedding", (operands[0], value), dims, node.loc).results
        return None

    return rewrite(graph, visit)


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
