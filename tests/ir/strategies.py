"""Random graphs for hypothesis: legal at the model level, with kernels' bodies nested on request."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from inferloom.ir import expr
from inferloom.ir.errors import VerifyError
from inferloom.ir.graph import Builder, Graph, Value
from inferloom.ir.types import Affine, DType, StateType, Sym, TensorType

TOKENS, ROWS = Sym("tokens", 8), Sym("rows", 4)
NAMES = st.sampled_from(["", "x", "x", "x_1", "y.weight", "0", "7", "_", "a-b", "héllo", "return", "graph"])
LOCS = st.sampled_from(["", "model.py:1", 'odd "quoted" \\ path.py:2', "a.py:1, b.py:2", "line\nbreak"])
FLOATS = st.floats(allow_nan=False) | st.integers(-3, 3).map(float)
DTYPES = st.sampled_from(list(DType))
DIMS = st.sampled_from([1, 2, 4, 64])
LEADING = st.sampled_from([TOKENS, ROWS, TOKENS * 2, TOKENS + 1, Affine(ROWS, 3, 2), Affine(ROWS, 1, 0), 4])


@st.composite
def tensor_types(draw: Any, dtype: DType | None = None) -> TensorType:
    dims = draw(st.lists(DIMS, max_size=3))
    lead = [draw(LEADING)] if draw(st.booleans()) else []
    return TensorType(dtype or draw(DTYPES), tuple(lead + dims))


STATES = st.builds(StateType, DTYPES, st.integers(1, 4), DIMS, DIMS, st.sampled_from([16, 32]))

EXPRS: st.SearchStrategy[expr.Expr] = st.recursive(
    st.builds(expr.Const, st.integers(-9, 9) | FLOATS)
    | st.builds(expr.Var, st.sampled_from(["score", "q_pos", "head"])),
    lambda inner: st.builds(lambda a, b: expr.call("add", a, b), inner, inner)
    | st.builds(lambda a: expr.call("neg", a), inner)
    | st.builds(lambda a, b, c: expr.select(a, b, c), inner, inner, inner)
    | st.builds(expr.Load, st.sampled_from(["t0", "t1"]), inner), max_leaves=6)


@st.composite
def graphs(draw: Any, nested: bool = True) -> Graph:
    """A graph of a few random nodes; tries ops on random values and keeps what the type rules allow."""
    b = Builder(draw(st.sampled_from(["g", "llama", "has space", "é"])))
    values: list[Value] = []
    for i in range(draw(st.integers(1, 3))):
        values.append(b.input(f"in{i}", draw(tensor_types(DType.F32) | tensor_types() | STATES)))
    for i in range(draw(st.integers(0, 2))):
        values.append(b.param(f"layers.{i}.weight", draw(tensor_types(DType.F32))))
    for _ in range(draw(st.integers(0, 8))):
        value, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        choice = draw(st.sampled_from(
            ["constant", "unary", "binary", "reshape", "sum", "cast", "norm", "flex", "kernel"]))
        loc, name = draw(LOCS), draw(NAMES)
        try:
            if choice == "constant":
                made = b.emit("constant", value=draw(FLOATS), dtype=draw(DTYPES), loc=loc, name=name)
            elif choice == "unary":
                made = b.emit(draw(st.sampled_from(["neg", "exp", "relu", "gelu"])), value, loc=loc, name=name)
            elif choice == "binary":
                made = b.emit(draw(st.sampled_from(["add", "mul", "lt"])), value, other, loc=loc, name=name)
            elif choice == "reshape":
                shape = getattr(value.type, "shape", ())
                made = b.emit("reshape", value, shape=(*shape[:1], 1, *shape[1:]), loc=loc, name=name)
            elif choice == "sum":
                made = b.emit("sum", value, axes=(draw(st.integers(0, 2)),), keepdims=draw(st.booleans()), loc=loc)
            elif choice == "cast":
                made = b.emit("cast", value, dtype=draw(DTYPES), loc=loc, name=name)
            elif choice == "norm":
                made = b.emit("layer_norm", value, None, None, eps=draw(FLOATS), loc=loc, name=name)
            elif choice == "flex":
                q = b.input("", TensorType(DType.F32, (TOKENS, 2, 4)))
                made = b.emit("flex_attention", q, q, q, scale=draw(FLOATS), slot=0, score=draw(EXPRS),
                              visible=draw(EXPRS), first=draw(EXPRS), loc=loc)
            elif nested:
                body = draw(graphs(nested=False))
                if body.params:
                    continue
                operands = [b.input("", v.type) for v in body.inputs]
                node = b.emit_node("kernel", operands, {"kind": "row", "body": body}, loc, [name] * len(body.outputs))
                values.extend(node.results)
                continue
            else:
                continue
        except VerifyError:
            continue
        values.append(made)
    return b.finish(draw(st.lists(st.sampled_from(values), max_size=3)))
