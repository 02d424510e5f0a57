"""The kernel node: a group of ops that one generated kernel computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inferloom.ir import op as ops
from inferloom.ir.errors import VerifyError
from inferloom.ir.graph import Graph
from inferloom.ir.types import Type

ops.register_hint("Graph", Graph)
ops.register_hint("Type", Type)


@ops.op("kernel", levels=(ops.KERNEL,), foldable=False)
class Kernel:
    """Run `body` on the operands; its inputs are the operands in order, its outputs the results.

    `kind` is the template that generates it: "row" (everything within one token's row), "matmul" (one linear
    with what surrounds it), "experts" (a linear layer by expert), "attention", "scan" (a recurrence) or "blocks"
    (choosing blocks of keys).
    """

    def infer(*operands: Type, kind: str, body: Graph) -> tuple[Type, ...]:  # type: ignore[misc]
        if kind not in ("row", "matmul", "experts", "attention", "scan", "blocks"):
            raise VerifyError(f"unknown kind of kernel {kind!r}")
        if [v.type for v in body.inputs] != list(operands) or body.params:
            raise VerifyError("operands do not match the body's inputs")
        return tuple(v.type for v in body.outputs)

    def reference(*operands: Any, kind: str, body: Graph) -> tuple[np.ndarray, ...]:  # type: ignore[misc]
        return run(body, operands)


def run(graph: Graph, operands: Sequence[Any], params: dict[str, np.ndarray] | None = None) -> tuple[Any, ...]:
    """Evaluate a graph node by node with the NumPy references."""
    env: dict[Any, Any] = dict(zip(graph.inputs, operands, strict=True))
    for param in graph.params:
        env[param.value] = (params or {})[param.source]
    for node in graph.nodes:
        made = ops.run_reference(node.op, [None if v is None else env[v] for v in node.operands], node.attrs)
        env.update(zip(node.results, made, strict=True))
    return tuple(env[v] for v in graph.outputs)
