"""The pattern matcher, and the walk that applies rules."""

from __future__ import annotations

import pytest

from inferloom.compiler.rewrite import (
    Any,
    Either,
    Op,
    Pattern,
    Rewriter,
    Scalar,
    apply_rules,
    drop_dead_nodes,
    match,
    pointwise_cone,
    tensor,
)
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.text import parse_graph, print_graph
from inferloom.ir.types import DType, StateType

GRAPH = parse_graph("""graph g (t<=8) {
  input %x: f32[t,4]
  input %z: f32[t,4]
  param %w: f32[4] = "w"
  %two = constant {value=2.0}
  %a = mul %x, %two
  %b = add %z, %a
  %c = sub %a, %z
  %d = mul %b, %b
  %e = layer_norm %d, %w, _ {eps=1e-05}
  %f = add %b, %c
  return %e, %f
}""")
VALUES = {v.name: v for v in (*GRAPH.inputs, *(n.result for n in GRAPH.nodes))}


def found(pattern: Pattern, name: str) -> dict[str, str] | None:
    """Names of what a pattern binds when it is matched against the value called `name`."""
    made = match(pattern, VALUES[name], GRAPH.producers().get)
    return None if made is None else {k: v.name for k, v in made.items()}


@pytest.mark.parametrize("pattern,name,want", [
    (Any("v"), "x", {"v": "x"}),
    (Op("mul", Any("v"), Scalar("s")), "a", {"v": "x", "s": "two"}),
    (Op("mul", Scalar("s", 2.0), Any("v")), "a", {"v": "x", "s": "two"}),
    (Op("mul", Scalar(value=3.0), Any("v")), "a", None),
    (Op("sub", Any("p"), Any("q")), "c", {"p": "a", "q": "z"}),
    (Op("sub", Any("p"), Op("mul", Any("q"), Scalar())), "c", None),  # not commutative
    (Op("add", Op("mul", Any("p"), Scalar()), Any("q")), "b", {"p": "x", "q": "z"}),
    (Op("mul", Any("p"), Any("p")), "d", {"p": "b"}),
    (Op("mul", Any("p"), Any("p")), "a", None),
    (Op("mul", Op("add", Any("p"), Any("q"), bind="sum"), Any("sum")), "d", {"p": "z", "q": "a", "sum": "b"}),
    # only the second order of the inner add agrees with the outer one
    (Op("add", Op("add", Any("m"), Any("z")), Op("sub", Any("m"), Any("z"))), "f", {"m": "a", "z": "z"}),
    (Op("layer_norm", Any("p"), Any("q"), Any("r")), "e", None),  # an absent operand matches nothing
    (Op("layer_norm", Any("p"), Any("q")), "e", None),
    (Op("constant", value=2.0, bind="k"), "two", {"k": "two"}),
    (Op("constant", value=3.0), "two", None),
    (Either(Op("neg", Any("p")), Op("mul", Any("p"), Scalar())), "a", {"p": "x"}),
    (Either(Op("neg", Any("p")), Op("exp", Any("p"))), "a", None),
    (Scalar("s"), "x", None),
    (Op("neg", Any("p")), "x", None),
])
def test_match(pattern: Pattern, name: str, want: dict[str, str] | None) -> None:
    before = print_graph(GRAPH)
    assert found(pattern, name) == want
    assert print_graph(GRAPH) == before


def test_either_tries_the_next_when_the_rest_fails() -> None:
    inner = Either(Any("m"), Op("mul", Any("m"), Scalar()))
    assert found(Op("add", Op("add", Any("z"), inner), Op("sub", Op("mul", Any("m"), Scalar()), Any("z"))), "f") == {
        "z": "z", "m": "x"}


def test_apply_rules_reaches_what_rules_make() -> None:
    """One rule's result is offered to all rules again, and later nodes see it."""
    def unfold(r: Rewriter, node: Node) -> Value | None:
        return r.emit("add", node.operands[0], node.operands[0], loc=node.loc) if node.op == "exp" else None

    def double(r: Rewriter, node: Node) -> Value | None:
        twice = node.op == "add" and node.operands[0] is node.operands[1]
        return r.emit("mul", node.operands[0], r.builder.scalar(2.0), loc=node.loc) if twice else None

    graph = parse_graph('graph g () { input %x: f32[2]\n%y = exp %x @ "m.py:1"\n%z = exp %y\nreturn %z }')
    assert print_graph(apply_rules(graph, [unfold, double])) == """graph g () {
  input %x: f32[2]
  %0 = constant {value=2.0} : f32[]
  %1 = mul %x, %0 : f32[2] @ "m.py:1"
  %2 = mul %1, %0 : f32[2]
  return %2
}
"""


def test_nothing_to_do_gives_the_graph_itself() -> None:
    assert apply_rules(GRAPH, [lambda r, node: None]) is GRAPH
    assert drop_dead_nodes(GRAPH) is GRAPH


def test_rewriter_knows_constants_scalars_and_reads() -> None:
    seen: dict[str, tuple[bool, float | None, bool]] = {}

    def look(r: Rewriter, node: Node) -> Value | None:
        for value in node.operands:
            if value is not None:
                seen[value.name] = (r.is_constant(value), r.scalar_of(value), r.read_once(value))
        return None

    apply_rules(GRAPH, [look])
    assert seen == {"x": (False, None, True), "two": (True, 2.0, True), "z": (False, None, True),
                    "a": (False, None, False), "b": (False, None, False), "c": (False, None, True),
                    "d": (False, None, True), "w": (True, None, True)}


def test_dead_nodes_go_and_state_writes_stay() -> None:
    graph = parse_graph("""graph g (t<=8) {
  input %s: kv<f32,1,4,4,16>
  input %k: f32[t,1,4]
  input %slots: i32[t]
  %dead = neg %k
  %deader = neg %dead
  %s1 = kv_write %s, %k, %k, %slots
  return %s1
}""")
    assert [n.op for n in drop_dead_nodes(graph).nodes] == ["kv_write"]


def test_pointwise_cone() -> None:
    producer = GRAPH.producers().get

    def ops_in(root: str, *cut: str) -> list[str] | None:
        nodes = pointwise_cone(VALUES[root], {VALUES[c] for c in cut}, producer)
        return None if nodes is None else [n.result.name for n in nodes]

    assert ops_in("d", "x", "z") == ["two", "a", "b", "d"]
    assert ops_in("d", "b") == ["d"]
    assert ops_in("d", "x") is None  # z is an input
    assert ops_in("e", "d") is None  # layer_norm is not pointwise
    assert pointwise_cone(VALUES["d"], {VALUES["x"], VALUES["z"]}, producer, limit=3) is None


def test_tensor_refuses_state() -> None:
    with pytest.raises(TypeError):
        tensor(Value(StateType(DType.F32, 1, 4, 4, 16)))
    assert isinstance(GRAPH, Graph)
