"""Graphs: the builder, what a graph knows of itself, rewrite() and the interpreter."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from inferloom.ir import graph as graph_module
from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError, VerifyError
from inferloom.ir.graph import Builder, Graph, Value, rewrite
from inferloom.ir.interpret import interpret
from inferloom.ir.text import parse_graph, print_graph, same_graph
from inferloom.ir.types import Affine, DType, StateType, Sym, TensorType, bound, cast_array, round_bf16
from tests.compiler.graphs import tiny_llama

TEXT = """graph g (tokens<=8) {
  input %x: f32[tokens,4]
  param %w: f32[4] = "w"
  %two = constant {value=2.0} : f32[]
  %v = mul %w, %two : f32[4]
  %y = mul %x, %v : f32[tokens,4] @ "m.py:1"
  %z = add %y, %y : f32[tokens,4]
  return %z, %x
}
"""


def test_tables() -> None:
    graph = parse_graph(TEXT)
    x, (w,) = graph.inputs[0], [p.value for p in graph.params]
    two, v, y, z = (n.result for n in graph.nodes)
    assert graph.producers()[y] is graph.nodes[2] and x not in graph.producers()
    assert graph.users() == {w: [graph.nodes[1]], two: [graph.nodes[1]], v: [graph.nodes[2]], x: [graph.nodes[2]],
                             y: [graph.nodes[3]]}
    assert graph.constants() == {w, two, v}
    assert graph.symbols() == {"tokens": Sym("tokens", 8)}


def test_builder() -> None:
    assert doctest.testmod(graph_module).failed == 0
    b = Builder("g")
    assert b.scalar(2) is b.scalar(2.0) and b.scalar(2) is not b.scalar(3)
    with pytest.raises(VerifyError, match=r"add f32\[\], i32\[\]  \(from m.py:1\): element types differ"):
        b.emit("add", b.scalar(1.0), b.emit("constant", value=1.0, dtype=DType.I32), loc="m.py:1")
    with pytest.raises(UnsupportedError, match="no op is called 'mystery'; docs/ops.md lists"):
        b.emit("mystery")
    with pytest.raises(VerifyError, match="constant has no attribute 'x'; it has: value, dtype"):
        b.emit("constant", value=1.0, x=2)
    assert b.emit("constant", value=np.float64(2)).type == TensorType(DType.F32, ())
    assert type(b.nodes[-1].attrs["value"]) is float


def test_rewrite_copies_and_replaces() -> None:
    graph = parse_graph(TEXT)
    copy = rewrite(graph, lambda b, node, operands: None)
    assert print_graph(copy) == TEXT and copy.nodes[0] is not graph.nodes[0]

    def double(b: Builder, node: graph_module.Node, operands: tuple[Value | None, ...]) -> list[Value] | None:
        if node.op != "add":
            return None
        return [b.emit("mul", operands[0], b.scalar(2.0), loc=node.loc)]

    changed = rewrite(graph, double)
    assert [n.op for n in changed.nodes] == ["constant", "mul", "mul", "constant", "mul"]
    inputs, params = {"x": np.ones((2, 4), np.float32)}, {"w": np.arange(4, dtype=np.float32)}
    for a, b in zip(interpret(graph, inputs, params), interpret(changed, inputs, params)):
        np.testing.assert_array_equal(a, b)
    assert print_graph(graph) == TEXT  # the old graph is as it was


def test_rewrite_maps_outputs_that_are_inputs() -> None:
    graph = parse_graph("graph g () { input %x: f32[2]\n %y = neg %x\n return %y }")
    assert rewrite(graph, lambda b, node, operands: [graph.inputs[0]]).outputs == graph.inputs


def test_rewrite_must_replace_every_result() -> None:
    with pytest.raises(ValueError):
        rewrite(parse_graph(TEXT), lambda b, node, operands: [])


def test_interpret_needs_all_inputs() -> None:
    graph = parse_graph(TEXT)
    with pytest.raises(VerifyError, match="interpreting g: input 'x' is missing"):
        interpret(graph, {}, {"w": np.ones(4)})
    with pytest.raises(VerifyError, match="interpreting g: parameter 'w' is missing"):
        interpret(graph, {"x": np.ones((1, 4))}, {})
    z, x = interpret(graph, {"x": np.ones((1, 4), np.float32)}, {"w": np.arange(4, dtype=np.float32)})
    np.testing.assert_array_equal(z, [[0, 4, 8, 12]])
    np.testing.assert_array_equal(x, np.ones((1, 4)))


def test_a_model_reads_only_earlier_tokens() -> None:
    graph = tiny_llama()
    from tests.compiler.graphs import random_params

    params, ids = random_params(graph), np.arange(9, dtype=np.int32)
    (whole,) = interpret(graph, {"tokens": ids, "positions": ids, "logit_rows": np.arange(9)}, params)
    (part,) = interpret(graph, {"tokens": ids[:4], "positions": ids[:4], "logit_rows": np.arange(4)}, params)
    np.testing.assert_allclose(part, whole[:4], atol=1e-5)


def test_dims_and_types() -> None:
    t = Sym("t", 7)
    assert (bound(3), bound(t), bound(t * 2), bound(Affine(t, 2, 1))) == (3, 7, 14, 15)
    assert [str(d) for d in (t, t + 1, t * 2, Affine(t, 2, 1), t * 1)] == ["t", "t+1", "2*t", "2*t+1", "1*t"]
    x = TensorType(DType.BF16, (t, 4))
    assert (x.max_size, x.is_static, x.rank, str(x)) == (28, False, 2, "bf16[t,4]")
    assert StateType(DType.BF16, 2, 8, 4, 16).bytes_per_block == 16 * 2 * 12 * 2
    assert {d: d.itemsize for d in DType} == {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "f8": 1,
                                              "bool": 1}


def test_bf16_rounds_to_nearest_even() -> None:
    one = np.float32(1)
    step = np.float32(2.0**-7)
    x = np.array([1 + step / 2, 1 + step * 1.5, 1 + step * 0.51, np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    want = np.array([1, 1 + 2 * step, 1 + step, np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    np.testing.assert_array_equal(round_bf16(x), want)
    np.testing.assert_array_equal(np.signbit(round_bf16(x)), np.signbit(want))
    assert cast_array(np.array(1 + step / 2), DType.BF16) == one
    assert cast_array(np.array(2.7), DType.I32) == 2
    rng = np.random.default_rng(0)
    wild = rng.integers(0, 2**32, 10_000, dtype=np.uint32).view(np.float32)
    import ml_dtypes

    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(round_bf16(wild), wild.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_an_op_is_declared_once() -> None:
    with pytest.raises(VerifyError, match="op add is declared twice"):
        @ops.op("add")
        class Add:
            def infer(x: TensorType) -> TensorType:  # type: ignore[misc]
                return x


def test_an_op_without_a_reference() -> None:
    @ops.op("test_only_op")
    class TestOnly:
        def infer(x: TensorType, *, n: int, some: tuple[str, ...] = (), ratio: float = 1) -> TensorType:  # type: ignore[misc]
            return x

    try:
        with pytest.raises(UnsupportedError, match="op test_only_op has no NumPy reference"):
            ops.run_reference("test_only_op", [np.ones(1)], {"n": 1})
        check = ops.get("test_only_op").check_attrs
        assert check({"n": 1, "some": ("a",)}) == {"n": 1, "some": ("a",), "ratio": 1.0}
        for bad in ({"n": True}, {"n": 1.0}, {"n": "1"}, {"n": 1, "some": "a"}, {"n": 1, "some": (1,)},
                    {"n": 1, "ratio": True}):
            with pytest.raises(VerifyError, match="is not a"):
                check(bad)  # type: ignore[arg-type]
    finally:
        del ops._OPS["test_only_op"]


def test_same_graph_sees_input_names() -> None:
    assert not same_graph(parse_graph(TEXT), parse_graph(TEXT.replace("%x", "%q")))
    assert isinstance(parse_graph(TEXT), Graph)
