"""Weights that are stored quantised: which keep their integers, and which are joined."""

from __future__ import annotations

import numpy as np

from inferloom.compiler.passes import merge_linear, quantize
from inferloom.compiler.quantization.keep import keep
from inferloom.compiler.quantization.recipe import Recipe, recipe
from inferloom.compiler.quantization.rows import StoredWeights
from inferloom.compiler.quantization.scheme import Scheme, parse
from inferloom.compiler.quantization.tensor import QuantizedTensor
from inferloom.compiler.report import Report
from inferloom.ir.text import parse_graph

QKV = """graph g (tokens<=8) {
  input %x: f32[tokens,64]
  param %wq: f32[64,64] = "q"
  param %wk: f32[32,64] = "k"
  param %wv: f32[32,64] = "v"
  %q = linear %x, %wq
  %k = linear %x, %wk
  %v = linear %x, %wv
  return %q, %k, %v
}"""


def read(source: str) -> QuantizedTensor:
    return QuantizedTensor(np.zeros((32, 64), np.int8), np.ones((32, 1), np.float32), None, Scheme())


def test_what_is_kept_rounded_and_unpacked() -> None:
    names = {"a": "GPTQ int4", "b": "GPTQ int4", "c": "Q6_K", "d": "fp8", "e": "int8"}
    schemes = {"a": parse("int4-wo"), "b": parse("int4-wo"), "c": parse("int8-g32-wo"), "d": parse("fp8"), "e": parse("int8")}
    stored = StoredWeights(schemes, read, names, frozenset({"c"}))
    kernels = {("int4", "none"), ("int8", "int8"), ("int8", "none")}
    found, notes = keep(stored, kernels)
    assert found == {"a": parse("int4-wo"), "b": parse("int4-wo"), "c": parse("int8-g32"), "e": parse("int8")}
    assert "activations in int8 (--quant-activations none leaves them as the checkpoint does): 1" in notes[1]
    found, notes = keep(stored, kernels, "none")
    assert found == {k: s for k, s in schemes.items() if k != "d"} | {"e": parse("int8-wo")}
    assert notes == ("GPTQ int4 weights kept as int4-wo: 2", "Q6_K weights rounded anew to int8-g32-wo: 1",
                     "fp8 weights unpacked (there are no kernels for fp8): 1",
                     "int8 weights kept as int8-wo with activations as floats "
                     "(--quant-activations int8 leaves them as the checkpoint does): 1")
    found, notes = keep(stored, {("int4", "int8")})
    assert found == {"a": parse("int4"), "b": parse("int4")} and "with activations in int8" in notes[0]
    assert keep(None, {("int4", "int8")}) == ({}, ()) and keep(stored, set())[0] == {}


def test_none_unpacks() -> None:
    assert recipe("none").unpack and not recipe(None).unpack and not recipe("int8").unpack


def test_only_weights_of_one_scheme_are_joined() -> None:
    graph, four, eight = parse_graph(QKV), parse("int4"), parse("int8-g32")

    def widths(stored: dict[str, Scheme]) -> list[int]:
        made = merge_linear.run(graph, stored=stored)
        return [int(str(n.result.type.shape[-1])) for n in made.nodes if n.op == "linear"]  # type: ignore[union-attr]

    assert widths({}) == [128] and widths({"q": four, "k": four, "v": four}) == [128]
    assert widths({"q": four, "k": four, "v": eight}) == [96, 32]
    assert widths({"q": four}) == [64, 64]


def test_joined_weights_of_several_schemes_take_the_smallest_group() -> None:
    graph = merge_linear.run(parse_graph(QKV))
    report = Report()
    stored = {"q": parse("int4-g64"), "k": parse("int4-asym"), "v": parse("int8")}
    made = quantize.run(graph, report, recipe=Recipe(stored=stored))
    (node,) = [n for n in made.nodes if n.op == "quantized_linear"]
    assert (node.attrs["format"], node.attrs["group"]) == ("int8", 32)
    assert any("were joined; they are rounded to int8-g32" in d.why for d in report.decisions)
