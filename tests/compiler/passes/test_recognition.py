"""Recognition is sound: graphs that almost look right keep their meaning, and decisions are reported."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from inferloom.compiler.passes import merge_linear, recognize_activation, recognize_norm, recognize_rotary
from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import Rewriter
from inferloom.compiler.symbolic import Elements
from inferloom.ir.errors import InferloomError
from inferloom.ir.graph import Builder
from inferloom.ir.text import parse_graph
from inferloom.ir.verify import verify
from tests.compiler.passes.golden import DIVIDER, FOLDER, difference, names

RECOGNISERS = {"recognize-norm": recognize_norm, "recognize-rotary": recognize_rotary,
               "recognize-activation": recognize_activation, "merge-linear": merge_linear}


def mutants(text: str) -> list[str]:
    """The text with one thing changed, in every way that is still a graph."""
    made = []
    for old, new in (("neg", "abs"), ("mul", "add"), ("add", "sub"), ("sub", "add"), ("cos", "sin"), ("sin", "cos"),
                     ("rsqrt", "sqrt"), ("sqrt", "abs"), ("mean", "max"), ("tanh", "sigmoid"), ("sigmoid", "tanh"),
                     ("silu", "relu"), ("start=0, stop=4", "start=1, stop=5"), ("start=4, stop=8", "start=3, stop=7"),
                     ("start=0, stop=2", "start=1, stop=3"), ("start=1", "start=0"), ("stop=64}", "stop=96}"),
                     ("value=0.5", "value=0.25"), ("value=1.0", "value=-1.0"), ("value=0.044715", "value=0.05")):
        for found in re.finditer(rf"\b{re.escape(old)}" if old[0].isalpha() else re.escape(old), text):
            made.append(text[:found.start()] + new + text[found.end():])
    for line in text.splitlines():  # exchange the operands of each node
        found = re.search(r"= \w+ (%\w+), (%\w+)", line)
        if found and found[1] != found[2]:
            a, b = found.span(1), found.span(2)
            changed = line[:a[0]] + found[2] + line[a[1]:b[0]] + found[1] + line[b[1]:]
            made.append(text.replace(line, changed))
    return made


@pytest.mark.parametrize("name", [n for n in names() if n.split("/")[0] in RECOGNISERS])
def test_near_misses_keep_their_meaning(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").partition(DIVIDER)[0]
    run = RECOGNISERS[name.split("/")[0]].run
    tried = 0
    for mutant in mutants(text):
        try:
            graph = parse_graph(mutant)
            verify(graph, "model")
        except InferloomError:  # this mutation makes no graph
            continue
        tried += 1
        with np.errstate(all="ignore"):
            after = run(graph, Report())
            verify(after, "model")
            worst = difference(graph, after)
        assert np.isnan(worst) or worst <= 2e-5, mutant
    assert tried


def decisions(name: str) -> list[tuple[str, bool, str]]:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").partition(DIVIDER)[0]
    report = Report()
    RECOGNISERS[name.split("/")[0]].run(parse_graph(text), report)
    return [(d.what, d.done, d.why or d.loc) for d in report.decisions]


def test_decisions_are_reported() -> None:
    assert decisions("merge-linear/gate-up") == [
        ("gate and up projection into one linear of 128 interleaved columns", True, "m.py:3")]
    assert decisions("merge-linear/gate-up-of-odd-width") == [
        ("gate and up projection into interleaved columns", False, "24 columns are not a multiple of 32"),
        ("2 linears of the same input into one", True, "")]
    assert decisions("merge-linear/qkv-with-some-biases") == [
        ("3 linears of the same input into one", True, "m.py:1")]
    assert Counter(w for w, _, _ in decisions("recognize-norm/layer-norm")) == {
        "root-mean-square norm": 1, "layer norm": 1, "weight into layer_norm": 1, "bias into layer_norm": 1}
    assert decisions("recognize-rotary/interleaved") == [("rotary embedding (interleaved)", True, "")]
    assert decisions("recognize-activation/gelu-erf") == [("gelu none", True, "")]


def test_irregular_tables_are_reported() -> None:
    text = """graph g (tokens<=8) {
  input %x: f32[tokens,2,6]
  input %t: f32[tokens,6]
  %ta = slice %t {axis=1, start=0, stop=1}
  %tb = slice %t {axis=1, start=1, stop=2}
  %tc = slice %t {axis=1, start=4, stop=5}
  %tt = concat %ta, %tb, %tc {axis=1}
  %cos = cos %tt
  %sin = sin %tt
  %c = reshape %cos {shape=[tokens, 1, 3]}
  %s = reshape %sin {shape=[tokens, 1, 3]}
  %x1 = slice %x {axis=2, start=0, stop=3}
  %x2 = slice %x {axis=2, start=3, stop=6}
  %a = mul %x1, %c
  %b = mul %x2, %s
  %d = sub %a, %b
  %e = mul %x2, %c
  %h = mul %x1, %s
  %i = add %e, %h
  %y = concat %d, %i {axis=2}
  return %y
}"""
    report, graph = Report(), parse_graph(text)
    assert recognize_rotary.run(graph, report) is graph
    assert [(d.done, d.why) for d in report.decisions] == [
        (False, "its tables are not regular columns of a per-token value")]


def test_elements_of_a_rotation() -> None:
    """x2 = concat(-x[2:], x[:2]) * t + x: each element in terms of x and t."""
    graph = parse_graph("""graph g (n<=4) {
  input %x: f32[n,4]
  input %t: f32[n,1]
  %a = slice %x {axis=1, start=0, stop=2}
  %b = slice %x {axis=1, start=2, stop=4}
  %m = neg %b
  %r = concat %m, %a {axis=1}
  %k = constant {value=3.0}
  %rt = mul %r, %t
  %rk = mul %rt, %k
  %y = add %rk, %x
  return %y
}""")
    x, t = graph.inputs
    rewriter = Rewriter(Builder("g", nodes=list(graph.nodes)))
    turned, straight = Elements(x, rewriter.producer).of(graph.outputs[0])
    (of_x, index), (of_t, places) = turned.factors
    assert (of_x.value, of_t.value) == (x, t)
    assert turned.coef.tolist() == [[-3, -3, 3, 3]] and index.tolist() == [[2, 3, 0, 1]]
    assert places.tolist() == [[0, 0, 0, 0]]
    assert straight.factors[0][1].tolist() == [[0, 1, 2, 3]] and straight.coef.tolist() == [[1, 1, 1, 1]]
