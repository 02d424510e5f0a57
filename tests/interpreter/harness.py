"""Runs a kernel-level graph through its generated Triton kernels, next to the reference of its ops."""

from __future__ import annotations

from typing import Any

import numpy as np

from inferloom.checks.interpreter import STORED, Interpreted, launch, load_module, pointer, target, unpack_state
from inferloom.ir import op as ops
from inferloom.ir.graph import Node
from inferloom.ir.types import DType, StateType
from tests.targets.single import before, compare

#: Largest error relative to the largest magnitude: sums in another order, then rounding to the element type.
TOLERANCE = {DType.I32: 0.0, DType.F32: 3e-5, DType.F16: 2.0**-9, DType.BF16: 2.0**-7}


class Compiled(Interpreted):
    """A kernel-level graph as Triton kernels; with `check`, every kernel's results are compared with the reference."""

    checking = False

    def run(self, inputs: dict[str, Any], check: bool = False, shuffle: int | None = None,
            padded: dict[int, int] | None = None) -> np.ndarray:
        self.checking = check
        return super().run(inputs, shuffle, padded)

    def look(self, node: Node) -> Any:
        return [None if v is None else self.read(v) for v in node.operands] if self.checking else None

    def ran(self, node: Node, symbol: str, looked: Any) -> None:
        if not self.checking:
            return
        want = ops.run_reference("kernel", looked, node.attrs)
        # Attention rounds its weights to what the state is stored in.
        states = [v.type.dtype for v in node.operands if v is not None and isinstance(v.type, StateType)]
        for value, w in zip(node.results, want, strict=True):
            compare(self.read(value), w, before(self.plan, node, value, looked),
                    max(TOLERANCE[d] for d in (*states, value.type.dtype)), symbol)


__all__ = ["STORED", "Compiled", "launch", "load_module", "pointer", "target", "unpack_state"]
