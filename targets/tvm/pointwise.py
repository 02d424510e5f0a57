"""Pointwise ops on vectors: shared by row programs and matmul epilogues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Node
from inferloom.ir.types import DType
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import f32, number, splat

Expr = Any


def _sign(x: Expr, lanes: int) -> Expr:
    return number(0.0, lanes) - x


_UNARY = {
    "neg": _sign, "abs": vmath.absolute, "exp": vmath.exp, "log": vmath.log, "floor": vmath.floor,
    "sqrt": vmath.sqrt, "rsqrt": vmath.rsqrt,
    "tanh": vmath.tanh, "sin": vmath.sin, "cos": vmath.cos, "erf": vmath.erf, "sigmoid": vmath.sigmoid,
    "relu": lambda x, lanes: T.max(x, number(0.0, lanes)),
    "silu": lambda x, lanes: x * vmath.sigmoid(x, lanes),
}
_BINARY = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y,
    "maximum": T.max, "minimum": T.min,
}
#: Not bound to a name: TVM cannot name a vector of booleans.
_COMPARISON = {"lt": lambda x, y: x < y, "le": lambda x, y: x <= y, "eq": T.EQ}


def supported(op: str) -> bool:
    """Whether `emit` knows the op."""
    return op in _UNARY or op in _BINARY or op in _COMPARISON or op in ("gelu", "where", "cast", "constant")


def emit(node: Node, operands: Sequence[Expr], lanes: int) -> Expr:
    """The node's result for `lanes` elements; operands are vectors of as many lanes."""
    if node.op == "constant":
        return constant(node, lanes)
    if node.op in _UNARY:
        x = T.Bind(operands[0])
        return T.Bind(_UNARY[node.op](x, lanes))
    if node.op in _BINARY:
        return T.Bind(_BINARY[node.op](*operands))
    if node.op in _COMPARISON:
        return _COMPARISON[node.op](*operands)
    if node.op == "gelu":
        return vmath.gelu(operands[0], lanes, str(node.attrs["approximate"]))
    if node.op == "where":
        condition, x, y = operands
        return T.Bind(T.Select(condition, x, y))
    if node.op == "cast":
        return _cast(node, operands[0], lanes)
    raise UnsupportedError(f"{node.loc}: the CPU target cannot lower {node.op} yet")


def constant(node: Node, lanes: int) -> Expr:
    """A `constant` node in every lane."""
    value, dtype = float(str(node.attrs["value"])), node.attrs["dtype"]
    if dtype is DType.I32:
        return splat(T.int32(int(value)), lanes)
    if dtype is DType.F32:
        return number(value, lanes)
    raise UnsupportedError(f"{node.loc}: the CPU target has no constants of type {dtype}")


def _cast(node: Node, x: Expr, lanes: int) -> Expr:
    source, wanted = node.operands[0], node.attrs["dtype"]
    have = getattr(source.type, "dtype", None) if source is not None else None
    if wanted is have:
        return x
    if wanted in (DType.F32, DType.BF16):
        if have is DType.BOOL:
            return T.Select(x, number(1.0, lanes), number(0.0, lanes))
        if have is DType.I32:
            x = T.cast(x, f32(lanes))
        return T.Bind(vmath.bf16_to_f32(vmath.f32_to_bf16(x, lanes), lanes) if wanted is DType.BF16 else x)
    if wanted is DType.BOOL and have is DType.F32:
        return x != number(0.0, lanes)
    raise UnsupportedError(f"{node.loc}: the CPU target cannot cast {have} to {wanted}")


