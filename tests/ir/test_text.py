"""The text form: what is printed parses back to the same graph, and malformed text is refused with its place."""

from __future__ import annotations

import subprocess
import sys
from types import MappingProxyType

import pytest
from hypothesis import given, settings

from inferloom.ir.errors import VerifyError
from inferloom.ir.graph import Builder, Graph, Node, Value
from inferloom.ir.text import fingerprint, parse_graph, print_graph, print_node, same_graph
from inferloom.ir.types import DType, StateType, Sym, TensorType
from tests.compiler.graphs import tiny_llama
from tests.ir.strategies import graphs

EXAMPLE = '''graph example (tokens<=8) {
  input %x: f32[tokens,4]
  param %w: f32[4] = "norm.weight"
  %y = rms_norm %x, %w {eps=1e-05} : f32[tokens,4] @ "model.py:7"
  %0 = constant {value=2.0} : f32[]
  %1 = mul %y, %0 : f32[tokens,4]
  return %1
}
'''


def deep_same(a: Graph, b: Graph) -> None:
    """Compare without the printer: two graphs, value by value."""
    assert (a.name, len(a.nodes)) == (b.name, len(b.nodes))
    assert [(p.source, p.value.type) for p in a.params] == [(p.source, p.value.type) for p in b.params]
    place: dict[Value, Value] = {}

    def pair(x: Value, y: Value) -> None:
        assert x.type == y.type
        assert place.setdefault(x, y) is y

    assert len(a.inputs) == len(b.inputs) and len(a.outputs) == len(b.outputs)
    for x, y in zip((*a.inputs, *(p.value for p in a.params)), (*b.inputs, *(p.value for p in b.params))):
        pair(x, y)
    for m, n in zip(a.nodes, b.nodes):
        assert (m.op, m.loc, len(m.operands), list(m.attrs)) == (n.op, n.loc, len(n.operands), list(n.attrs))
        for v, w in zip(m.operands, n.operands):
            assert (v is None and w is None) or (v is not None and place[v] is w)
        for name, value in m.attrs.items():
            other = n.attrs[name]
            if isinstance(value, Graph):
                assert isinstance(other, Graph)
                deep_same(value, other)
            else:
                assert repr(value) == repr(other) and type(value) is type(other)
        for v, w in zip(m.results, n.results):
            pair(v, w)
    for x, y in zip(a.outputs, b.outputs):
        assert place[x] is y


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_round_trip_of_random_graphs(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    deep_same(graph, again)
    assert print_graph(again) == text
    assert same_graph(graph, again)
    assert fingerprint(again) == fingerprint(graph)


def test_round_trip_of_a_model() -> None:
    graph = tiny_llama(window=5)
    deep_same(graph, parse_graph(print_graph(graph)))


def test_printed_text_is_as_documented() -> None:
    assert print_graph(parse_graph(EXAMPLE)) == EXAMPLE


def test_types_may_be_left_out_and_comments_are_skipped() -> None:
    text = "# a note\n" + EXAMPLE.replace(" : f32[tokens,4] @", " @").replace(" : f32[]", "  # two")
    assert same_graph(parse_graph(text), parse_graph(EXAMPLE))


def test_names_are_made_unique() -> None:
    b = Builder("g")
    x = b.input("x", TensorType(DType.F32, (2,)))
    for name in ("x", "x", "x_1", "3", "has space"):
        b.emit("neg", x, name=name)
    text = print_graph(b.finish([]))
    assert [line.split()[0] for line in text.splitlines()[2:-2]] == ["%x_1", "%x_2", "%x_1_1", "%_3", "%has_space"]
    assert print_graph(parse_graph(text)) == text


def test_state_and_shape_syntax() -> None:
    b = Builder("g")
    tokens = Sym("tokens", 4)
    b.input("s", StateType(DType.BF16, 2, 8, 4, 16))
    b.input("t", TensorType(DType.I32, (tokens + 1, 3)))
    b.input("u", TensorType(DType.I8, (tokens * 2,)))
    lines = print_graph(b.finish([])).splitlines()
    assert lines == ["graph g (tokens<=4) {", "  input %s: kv<bf16,2,8,4,16>", "  input %t: i32[tokens+1,3]",
                     "  input %u: i8[2*tokens]", "  return", "}"]


def test_print_node_shows_an_unknown_op_and_undefined_values() -> None:
    lost = Value(TensorType(DType.F32, ()), "lost")
    node = Node("mystery", (lost, None), MappingProxyType({"a": 1}), ())
    assert print_node(Graph("g", (), (), (node,), ()), node) == "mystery %lost, _ {a=1}"


def test_fingerprint_sees_structure_only() -> None:
    base = parse_graph(EXAMPLE)
    for old, new in (("%y", "%z"), ("example", "other"), ("norm.weight", "another"), ("model.py:7", "model.py:8")):
        changed = parse_graph(EXAMPLE.replace(old, new))
        assert fingerprint(changed) == fingerprint(base)
        assert same_graph(changed, base) == (old == "%y")
    assert fingerprint(parse_graph(EXAMPLE.replace("py:7", "py:8")), locs=True) != fingerprint(base, locs=True)
    for old, new in (("1e-05", "1e-06"), ("<=8", "<=9"), ("%y, %0", "%0, %y"), ("tokens", "rows"), ("mul", "add"),
                     ("return %1", "return %y")):
        assert fingerprint(parse_graph(EXAMPLE.replace(old, new))) != fingerprint(base), old


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = f"from inferloom.ir.text import *; print(fingerprint(parse_graph({EXAMPLE!r})))"
    made = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        made.add(done.stdout)
    assert made == {fingerprint(parse_graph(EXAMPLE)) + "\n"}


NODE = "graph g (t<=4) {\n  input %x: f32[t,4]\n  NODE\n  return\n}"


@pytest.mark.parametrize("node,message", [
    ("%y = add %x, %z", "%z is used before it is defined"),
    ("%x = neg %x", "%x is defined twice"),
    ("%y = mystery %x", "no op is called 'mystery'"),
    ("%y = add %x", "takes 2 to 2 operands"),
    ("%y, %z = neg %x", "neg makes 1 results, not 2"),
    ("%y, %z = neg %x : f32[t,4]", "neg has 2 results but 1 types"),
    ("%y = neg %x {a=1}", "neg has no attribute 'a'"),
    ("%y = cast %x", "cast needs attribute 'dtype'"),
    ("%y = cast %x {dtype=3}", "attribute dtype=3 is not"),
    ("%y = cast %x {dtype=f33}", "symbol f33 is not declared"),
    ("%y = cast %x {dtype=f32, dtype=f32}", "attribute dtype is given twice"),
    ("%y = cast %x {dtype=f32", "expected ','"),
    ("%y = neg %x : f32[u,4]", "symbol u is not declared"),
    ("%y = neg %x : f32[t,4", "expected ','"),
    ("%y = neg %x : g32[t]", "'g32' is no element type"),
    ("%y = neg %x : kv<f32,1,2>", "state is kv<"),
    ("%y = neg %x @ here", "expected a quoted string"),
    ('%y = neg %x @ "a\\q"', "bad string"),
    ("%y neg", "expected '='"),
    ("= neg %x", "expected a node"),
    ("%y = ", "no op is called 'return'"),
    ("input x: f32[]", "expected a value such as %x"),
    ("param %w: f32[]", "expected '='"),
    ("%y = attention %x, %x, %x {scale=1.0 slot=0}", "expected ','"),
    ("%y = flex_attention %x, %x, %x {scale=1.0, slot=0, score=(add 1), visible=1, first=0}",
     "no scalar function add/1"),
    ("%y = flex_attention %x, %x, %x {scale=1.0, slot=0, score=(add 1 2, visible=1, first=0}", "expression"),
])
def test_malformed_nodes(node: str, message: str) -> None:
    with pytest.raises(VerifyError, match=f"(?s)^line [345], column.*{message}"):
        parse_graph(NODE.replace("NODE", node))


@pytest.mark.parametrize("text,message", [
    ("", "expected 'graph'"), ("grph g () {", "expected 'graph'"), ("graph g {", r"expected '\('"),
    ("graph 1 () {", "the graph's name"), ("graph g (t<=x) {", "the symbol's bound"),
    ("graph g (t<=1, t<=2) {", "symbol t is declared twice"), ("graph g (t) {", "expected '<='"),
    ("graph g () { return", "expected '}'"), ("graph g () { return } }", "trailing text"),
    ("graph g () { return %x }", "%x is used before"), ("graph g () {", "expected a node"),
    ('graph "g () { return }', "expected a quoted string"), ("graph g () { input %x: f32[] %x }", "expected '='"),
])
def test_malformed_graphs(text: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        parse_graph(text)


def test_error_shows_the_line() -> None:
    with pytest.raises(VerifyError) as error:
        parse_graph(EXAMPLE.replace("mul %y", "mul %nothing"))
    assert str(error.value).startswith("line 6, column 12: %nothing is used before it is defined\n  %1 = mul %nothing")
