"""pack-weights: lay every matmul weight out for the target.

Before: `%y = linear %x, %w, %b`
After:  `%p = pack_linear %w {tile=64, pair=2, k_multiple=32}; %y = packed_linear %x, %p, %b {n=.., k=..}`

`expert_linear` likewise becomes `packed_expert_linear` over `pack_experts`, and `quantized_linear` becomes
`packed_quantized_linear` over `pack_quantized` and, where scales are those of groups, `pack_scales`.

An embedding whose table is also such a weight (tied embeddings) reads the packed copy, so that it is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inferloom.compiler.report import Report
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.op import Attr
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
    tied |= {n.operands[3] for n in graph.nodes if n.op == "quantized_linear"}
    packed: dict[Value, Value] = {}

    def pack(builder: Builder, weight: Value) -> tuple[Value, dict[str, int]]:
        if not isinstance(weight.type, TensorType):
            raise TypeError(weight)
        if weight not in packed:
            packed[weight] = builder.emit("pack_linear", weight, tile=packing.tile,
                                          pair=packing.pair[weight.type.dtype], k_multiple=packing.k_multiple)
        n, k = (int(str(d)) for d in weight.type.shape)
        return packed[weight], {"n": n, "k": k}

    def pack_quantized(builder: Builder, node: Node, values: Value | None, scales: Value | None,
                       offsets: Value | None) -> tuple[tuple[Value | None, ...], dict[str, Attr]]:
        values, grouped = _value(values), bool(node.attrs["group"])
        if values not in packed:
            packed[values] = builder.emit("pack_quantized", values, format=node.attrs["format"], tile=packing.tile,
                                          k_multiple=packing.k_multiple)
        for scale in (scales, offsets):
            if scale is not None and scale not in packed:
                packed[scale] = builder.emit("pack_scales", scale, tile=packing.tile) if grouped else scale
        n, k = (int(str(d)) for d in values.type.shape)  # type: ignore[union-attr]
        arrays = (packed[values], packed[_value(scales)], None if offsets is None else packed[offsets])
        return arrays, {"n": n, "k": k, "format": node.attrs["format"], "group": node.attrs["group"]}

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
        if node.op == "quantized_linear":
            every = (*operands, None, None)[:7]
            arrays, how = pack_quantized(builder, node, *every[3:6])
            return builder.emit_node("packed_quantized_linear", (*every[:3], *arrays, every[6]), how, node.loc).results
        if node.op == "quantized_expert_linear":
            x, values, scales, offsets, *rest = operands
            n = int(str(node.attrs["n"]))
            if n % packing.tile:
                raise UnsupportedError(f"{node.loc}: experts of {n} columns do not fill tiles of {packing.tile}")
            arrays, how = pack_quantized(builder, node, values, scales, offsets)
            return builder.emit_node("packed_quantized_expert_linear", (x, *arrays, *rest), {**how, "n": n}, node.loc).results
        if node.op == "quantized_embedding" and node.operands[1] in tied:
            arrays, how = pack_quantized(builder, node, *(*operands[1:], None)[:3])
            report.fused("embedding reads the tied output projection's packed weight", node.loc)
            return builder.emit_node("packed_quantized_embedding", (operands[0], *arrays), how, node.loc).results
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
