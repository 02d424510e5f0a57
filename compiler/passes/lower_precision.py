"""lower-precision: store weights, and feed matrix units, in the artifact's element type.

Before: `%y = linear %x, %w, %b` over f32
After:  `%x1 = cast %x {dtype=bf16}; %w1 = cast %w {dtype=bf16}; %y = linear %x1, %w1, %b`

Products still accumulate in float32, and everything between matmuls stays float32. Embedding tables are stored
in the same type, so that a tied output projection shares them. Attention's queries follow. Linear layers over quantised
weights read x as it is; so do others where a target multiplies weights of this type by float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferloom.compiler.report import Report
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.types import DType, TensorType

NAME = "lower-precision"
_PLACES = {"linear": (0, 1), "embedding": (1,), "expert_linear": (0, 1), "flex_attention": (0,)}
_WEIGHTS: dict[str, tuple[int, ...]] = {"linear": (1,), "expert_linear": (1,)}


def run(graph: Graph, report: Report, *, dtype: DType, inputs: DType | None = None) -> Graph:
    """`inputs`: the element type of what linear layers read: `dtype`, or float32."""
    if dtype is DType.F32:
        return graph
    places = _PLACES | (_WEIGHTS if inputs is DType.F32 else {})
    made: dict[Value, Value] = {}

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        changed = list(operands)
        for place in places.get(node.op, ()):
            value = operands[place]
            if isinstance(value, Value) and isinstance(value.type, TensorType) and value.type.dtype is DType.F32:
                if value not in made:
                    made[value] = builder.emit("cast", value, dtype=dtype, loc=node.loc)
                changed[place] = made[value]
        return builder.copy(node, changed).results

    return rewrite(graph, visit)
