"""A "scan" kernel as each code generator reads it."""

from __future__ import annotations

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph
from inferloom.ir.ops.recurrent import PAGED
from inferloom.ir.types import STATES, DType
from inferloom.targets.base import KernelSource


class Recurrence:
    """The one node of the kernel's body; `at[i]` is the place of its operand i among the kernel's operands."""

    def __init__(self, source: KernelSource) -> None:
        body = source.node.attrs["body"]
        if not isinstance(body, Graph):
            raise TypeError(body)
        (self.node,) = body.nodes
        self.op = self.node.op.removeprefix(PAGED)
        self.layouts, self.inputs = source.layouts, body.inputs
        ((self.result, self.out),) = ((len(body.inputs) + i, v) for i, v in enumerate(body.outputs)
                                      if not isinstance(v.type, STATES))
        self.at = [None if v is None else body.inputs.index(v) for v in self.node.operands]
        state = body.inputs[self.place(0)].type
        if not isinstance(state, STATES) or state.dtype is not DType.F32:
            raise UnsupportedError(f"{self.node.loc}: recurrent state other than f32")
        self.stride = source.layouts[self.place(0)].block_stride // 4

    def place(self, operand: int) -> int:
        """The place of an operand that must be given."""
        found = self.at[operand]
        if found is None:
            raise TypeError(self.node)
        return found

    def given(self, operand: int) -> bool:
        return operand < len(self.at) and self.at[operand] is not None
