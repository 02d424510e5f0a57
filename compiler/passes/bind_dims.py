"""bind-dims: give the symbolic dims the bounds of the artifact to be made.

Before: `graph llama (tokens<=65536, rows<=65536) {...}`
After:  `graph llama (tokens<=2048, rows<=64) {...}`
"""

from __future__ import annotations

from collections.abc import Mapping

from inferloom.compiler.report import Report
from inferloom.ir.graph import Builder, Graph, Value
from inferloom.ir.types import Affine, Dim, Sym, TensorType, Type

NAME = "bind-dims"


def run(graph: Graph, report: Report, *, bounds: Mapping[str, int]) -> Graph:
    def dim(d: Dim) -> Dim:
        if isinstance(d, Sym):
            return Sym(d.name, bounds.get(d.name, d.bound))
        return Affine(Sym(d.sym.name, bounds.get(d.sym.name, d.sym.bound)), d.scale, d.offset) if isinstance(
            d, Affine) else d

    def bound(type: Type) -> Type:
        return type.with_shape(tuple(dim(d) for d in type.shape)) if isinstance(type, TensorType) else type

    builder = Builder(graph.name, [Value(bound(v.type), v.name) for v in graph.inputs], list(graph.params))
    mapped = dict(zip(graph.inputs, builder.inputs, strict=True)) | {p.value: p.value for p in graph.params}
    for node in graph.nodes:
        attrs = {k: tuple(dim(d) for d in v) if k == "shape" and isinstance(v, tuple) else v  # type: ignore[arg-type]
                 for k, v in node.attrs.items()}
        made = builder.emit_node(node.op, [None if v is None else mapped[v] for v in node.operands], attrs, node.loc,
                                 [v.name for v in node.results])
        mapped.update(zip(node.results, made.results, strict=True))
    return builder.finish(mapped[v] for v in graph.outputs)
