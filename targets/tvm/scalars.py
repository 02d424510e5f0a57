"""Scalar expressions of attention variants as vector code: positions are int32, scores float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir import expr as scalar
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Node
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import bind, f32, number, opaque, splat, typed

Expr = Any


def as_float(x: Expr, lanes: int) -> Expr:
    """Integers as floats, hidden from TVM's analysis, which fails on products of such floats."""
    if vmath.is_plain():  # by way of memory: what OpenCL C makes of a reinterpretation wants a name
        buffer = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(buffer, T.cast(x, "float32"), [0])
        return bind(buffer[0])
    return bind(T.reinterpret(f32(lanes), T.reinterpret(typed("int32", lanes), T.cast(x, f32(lanes)))))


def _is_float(x: Expr) -> bool:
    return str(x.dtype if hasattr(x, "dtype") else x.ty.dtype).startswith("float")


def _name(x: Expr, lanes: int) -> Expr:
    """A value named; integers so that TVM does not look through them, which took it seconds for a variant of a few terms."""
    return bind(x) if _is_float(x) or vmath.is_plain() else opaque(x, lanes)


_ARITHMETIC = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "min": T.min,
               "max": T.max}
_COMPARISON = {"lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "eq": T.EQ}


def attr_expr(node: Node, name: str) -> scalar.Expr:
    """The scalar expression that is an attribute of `node`."""
    made = node.attrs[name]
    if not isinstance(made, scalar.Expr):
        raise TypeError(made)
    return made


def emit_expr(e: scalar.Expr, env: Mapping[str, Expr], tables: list[Expr], lanes: int) -> Expr:
    """A scalar expression for `lanes` keys. Positions are int32, scores float32; mixed operands become float32.

    In `env`, `score` and `k_pos` have `lanes` lanes, the others are the same for all keys.
    """
    if isinstance(e, scalar.Const):
        return splat(T.float32(e.value) if isinstance(e.value, float) else T.int32(e.value), lanes)
    if isinstance(e, (scalar.Var, scalar.Load)) and lanes > 1 and not e.variables() & {"score", "k_pos"}:
        return bind(splat(emit_expr(e, env, tables, 1), lanes))
    if isinstance(e, scalar.Var):
        return env[e.name]
    if isinstance(e, scalar.Load):
        return bind(tables[int(e.table[1:])][emit_expr(e.index, env, tables, lanes)])
    if not isinstance(e, scalar.Call):
        raise TypeError(e)
    args = [emit_expr(a, env, tables, lanes) for a in e.args]
    name = e.function
    numbers = args[1:] if name == "select" else args
    if name in ("div", "exp", "tanh") or len({_is_float(a) for a in numbers}) > 1:
        numbers = [a if _is_float(a) else as_float(a, lanes) for a in numbers]
        args = [*args[:len(args) - len(numbers)], *numbers]
    if name in _COMPARISON:  # TVM cannot name a vector of booleans
        return _COMPARISON[name](*args)
    if name in _ARITHMETIC:
        return _name(_ARITHMETIC[name](*args), lanes)
    if name == "div":
        return bind(args[0] / args[1])
    if name == "idiv":
        return _name(T.floordiv(*args), lanes)
    if name == "mod":
        return _name(T.floormod(*args), lanes)
    if name == "and":
        return T.And(*args)
    if name == "or":
        return T.Or(*args)
    if name == "not":
        return T.Not(*args)
    if name == "neg":
        zero = number(0.0, lanes) if _is_float(args[0]) else splat(T.int32(0), lanes)
        return _name(zero - args[0], lanes)
    if name == "select":
        return _name(T.Select(*args), lanes)
    if name == "abs" and not _is_float(args[0]):
        return _name(T.max(args[0], splat(T.int32(0), lanes) - args[0]), lanes)
    if name in ("exp", "tanh", "abs"):
        return {"exp": vmath.exp, "tanh": vmath.tanh, "abs": vmath.absolute}[name](args[0], lanes)
    raise UnsupportedError(f"the CPU target cannot lower the scalar function {name} yet")
