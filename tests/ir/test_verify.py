"""Every fault that the verifier knows, and that legal graphs pass."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from inferloom.ir.errors import VerifyError
from inferloom.ir.graph import Builder, Graph, Node, Param, Value
from inferloom.ir.text import parse_graph
from inferloom.ir.types import DType, StateType, Sym, TensorType
from inferloom.ir.verify import verify
from tests.compiler.graphs import tiny_llama

F4 = TensorType(DType.F32, (4,))


def node(op: str, operands: tuple[Value | None, ...], results: tuple[Value, ...], **attrs: object) -> Node:
    return Node(op, operands, MappingProxyType(attrs), results)  # type: ignore[arg-type]


def fault(graph: Graph, level: str = "model") -> str:
    with pytest.raises(VerifyError) as error:
        verify(graph, level)
    return str(error.value)


def test_a_model_is_legal_at_its_level_only() -> None:
    graph = tiny_llama()
    verify(graph, "model")
    assert "attention" in fault(graph, "serving")
    assert "is neither a kernel nor a constant expression" in fault(graph, "kernel")


def test_unknown_level() -> None:
    with pytest.raises(VerifyError, match="no level is called 'best'; there are: model, serving, kernel"):
        verify(Graph("g", (), (), (), ()), "best")


def test_use_before_definition_and_of_nothing() -> None:
    x, y, z = Value(F4, "x"), Value(F4, "y"), Value(F4, "z")
    late = Graph("g", (x,), (), (node("neg", (y,), (z,)), node("neg", (x,), (y,))), (z,))
    assert "%z = neg %y : f32[4]\n  ^ uses %y: f32[4] before it is defined" in fault(late)
    assert "which nothing defines" in fault(Graph("g", (x,), (), (node("neg", (y,), (z,)),), (z,)))


def test_definitions_are_unique() -> None:
    x, y = Value(F4, "x"), Value(F4, "y")
    twice = node("neg", (x,), (y,))
    assert "defines %y: f32[4], which is already defined" in fault(Graph("g", (x,), (), (twice, twice), (y,)))
    assert "%x: f32[4] is defined twice" in fault(Graph("g", (x,), (Param(x, "w"),), (), ()))
    assert "two inputs are called 'x'" in fault(Graph("g", (x, Value(F4, "x")), (), (), ()))
    assert "two parameters come from 'w'" in fault(Graph("g", (), (Param(x, "w"), Param(y, "w")), (), ()))


def test_outputs_are_defined() -> None:
    assert "output %x: f32[4] is not defined" in fault(Graph("g", (), (), (), (Value(F4, "x"),)))


def test_a_symbol_has_one_bound() -> None:
    values = tuple(Value(TensorType(DType.F32, (Sym("tokens", n),)), f"x{n}") for n in (4, 8))
    assert "symbol tokens has two bounds: 4 and 8" in fault(Graph("g", values, (), (), ()))


def test_ops_and_attributes() -> None:
    x, y = Value(F4, "x"), Value(F4, "y")

    def one(made: Node) -> str:
        return fault(Graph("g", (x,), (), (made,), ()))

    assert "no op is called 'mystery'" in one(node("mystery", (x,), (y,)))
    assert "rms_norm needs attribute 'eps'" in one(node("rms_norm", (x,), (y,)))
    assert "lacks the attribute approximate" in one(node("gelu", (x,), (y,)))
    assert "attribute eps='a' is not" in one(node("rms_norm", (x,), (y,), eps="a"))
    assert "takes 2 to 2 operands, got 1" in one(node("add", (x,), (y,)))
    assert "operand y is required" in one(node("add", (x, None), (y,)))
    assert "operand x must be a tensor" in fault(Graph(
        "g", (Value(StateType(DType.F32, 1, 4, 4, 16), "s"),), (), (node("neg", (Value(StateType(
            DType.F32, 1, 4, 4, 16)),), (y,)),), ()))
    assert "is not legal at this level, only at: serving, kernel" in one(
        node("kv_write", (x, x, x, x), (y,)))


def test_results_follow_the_type_rule() -> None:
    x, wrong = Value(F4, "x"), Value(TensorType(DType.F32, (5,)), "y")
    assert "%y = neg %x : f32[5]\n  ^ has results f32[5], but its type rule gives f32[4]" in fault(
        Graph("g", (x,), (), (node("neg", (x,), (wrong,)),), ()))
    assert "has results nothing, but" in fault(Graph("g", (x,), (), (node("neg", (x,), ()),), ()))


STATE = """graph g (t<=4) {
  input %s: kv<f32,1,8,8,16>
  input %k: f32[t,1,8]
  input %slots: i32[t]
  input %starts: i32[2]
  input %lens: i32[1]
  input %table: i32[1,4]
  %s1 = kv_write %s, %k, %k, %slots
  REST
  return %s1
}"""
READ = ("%o = paged_attention %k, STATE, %starts, %lens, %table "
        "{scale=1.0, score=score, visible=(le k_pos q_pos), first=0}")


def test_state_is_threaded() -> None:
    verify(parse_graph(STATE.replace("REST", READ.replace("STATE", "%s1"))), "serving")
    verify(parse_graph(STATE.replace("REST", "%s2 = kv_write %s1, %k, %k, %slots")), "serving")
    again = parse_graph(STATE.replace("REST", "%s2 = kv_write %s, %k, %k, %slots"))
    assert "uses the state %s: kv<f32,1,8,8,16> after `kv_write` has overwritten it" in fault(again, "serving")
    old = parse_graph(STATE.replace("REST", READ.replace("STATE", "%s")))
    assert "after `kv_write` has overwritten it" in fault(old, "serving")


def kernel(body: Graph, graph: Graph) -> Graph:
    b = Builder("g", list(graph.inputs))
    results = b.emit_node("kernel", graph.inputs[:len(body.inputs)], {"kind": "row", "body": body}).results
    return b.finish(results)


def test_kernels_and_their_bodies() -> None:
    body = parse_graph(STATE.replace("REST", ""))
    outer = Graph("g", tuple(Value(v.type, v.name) for v in body.inputs), (), (), ())
    good = kernel(body, outer)
    verify(good, "kernel")
    twice = replace(good, nodes=(*good.nodes, *kernel(body, good).nodes))
    assert "after `kernel` has overwritten it" in fault(twice, "kernel")
    made = body.nodes[0].results[0]
    broken = replace(body, nodes=(replace(body.nodes[0], attrs={"a": 1}),))
    assert "in its body: kv_write has no attribute 'a'; it has: none\n      %s1 = kv_write" in fault(
        kernel(broken, outer), "kernel")
    lost = replace(body, nodes=(), outputs=(made,))
    assert "in its body: output %s1" in fault(kernel(lost, outer), "kernel")
    assert "in its body: kernels do not nest" in fault(kernel(good, outer), "kernel")
    model_op = parse_graph("graph b (t<=4) { input %q: f32[t,1,8]\n"
                           "%o = attention %q, %q, %q {scale=1.0, slot=0}\n return %o }")
    assert "in its body: is not legal at this level, only at: model" in fault(
        kernel(model_op, Graph("g", (Value(model_op.inputs[0].type, "q"),), (), (), ())), "kernel")


def test_constants_need_no_kernel() -> None:
    verify(parse_graph('graph g () { param %w: f32[4] = "w"\n %y = neg %w\n return %y }'), "kernel")


def test_all_faults_are_reported_up_to_a_limit() -> None:
    x = Value(F4, "x")
    bad = tuple(node("mystery", (x,), (Value(F4, f"y{i}"),)) for i in range(7))
    text = fault(Graph("g", (x,), (), bad, ()))
    assert text.startswith("graph g is not legal at the model level:\n")
    assert text.count("no op is called") == 5 and text.endswith("... and 2 more")
