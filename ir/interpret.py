"""The NumPy interpreter: the definition of what a graph computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.graph import Graph
from inferloom.ir.ops.kernel import run


def interpret(graph: Graph, inputs: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """Outputs of `graph`; `inputs` by value name, `params` by source name, in the dtypes of `DType.numpy`.

    State inputs are `KVArrays`. Raises VerifyError when an input or param is missing.
    """
    for value in graph.inputs:
        if value.name not in inputs:
            raise VerifyError(f"interpreting {graph.name}: input {value.name!r} is missing")
    for param in graph.params:
        if param.source not in params:
            raise VerifyError(f"interpreting {graph.name}: parameter {param.source!r} is missing")
    return run(graph, [inputs[v.name] for v in graph.inputs], dict(params))
