"""What is quantised and what is not, and that integers which a checkpoint stores are kept."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.compiler.passes import merge_linear, pack_weights, quantize
from inferloom.compiler.passes.pack_weights import Packing
from inferloom.compiler.quantization.recipe import Recipe, recipe
from inferloom.compiler.quantization.rows import StoredWeights
from inferloom.compiler.quantization.scheme import Scheme, parse
from inferloom.compiler.quantization.tensor import QuantizedTensor
from inferloom.compiler.quantization.tensor import quantize as rounded
from inferloom.compiler.report import Report
from inferloom.compiler.weights import ConstantFolder
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph, Node
from inferloom.ir.text import parse_graph, print_graph
from inferloom.ir.types import DType, Sym, TensorType
from inferloom.ir.verify import verify
from tests.compiler.graphs import tiny_llama

TOKENS = Sym("tokens", 8)


def quantized(graph: Graph, made: Recipe) -> tuple[Graph, Report]:
    report = Report()
    graph = quantize.run(graph, report, recipe=made)
    verify(graph, "model")
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)
    return graph, report


def nodes(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op == op]


@pytest.mark.parametrize("tied", [True, False])
def test_every_layer_gets_its_scheme(tied: bool) -> None:
    graph, report = quantized(tiny_llama(tied=tied), recipe("int4"))
    assert not nodes(graph, "linear") and not nodes(graph, "embedding")
    linears = nodes(graph, "quantized_linear")
    assert [n.attrs["format"] for n in linears] == ["int4"] * 8 + ["int8"]
    (embedding,) = nodes(graph, "quantized_embedding")
    assert (embedding.operands[1] is linears[-1].operands[3]) == tied
    assert all(d.done for d in report.decisions) and len(report.decisions) == 10
    # One rounding for the projections that read the same rows.
    assert len(nodes(graph, "quantize_rows")) == len({n.operands[0] for n in linears})


def test_nothing_is_done_without_a_recipe() -> None:
    graph = tiny_llama()
    assert quantize.run(graph, Report(), recipe=recipe(None)) is graph


def test_head_and_embedding_are_chosen_by_themselves() -> None:
    graph, _ = quantized(tiny_llama(tied=False), recipe("int8", "none", "none"))
    assert len(nodes(graph, "linear")) == 1 and len(nodes(graph, "embedding")) == 1
    graph, _ = quantized(tiny_llama(tied=False), recipe(None, "int8"))
    assert len(nodes(graph, "quantized_linear")) == 1 and len(nodes(graph, "embedding")) == 1
    graph, _ = quantized(tiny_llama(tied=True), recipe("int8", "none"))
    assert len(nodes(graph, "linear")) == 1 and len(nodes(graph, "embedding")) == 1


def layer(n: int, k: int, name: str = "w") -> Builder:
    b = Builder("layer")
    b.emit("linear", b.input("x", TensorType(DType.F32, (TOKENS, k))), b.param(name, TensorType(DType.F32, (n, k))), loc="m.py:1")
    return b


def why(graph: Graph, name: str) -> list[str]:
    return [d.why for d in quantized(graph, recipe(name))[1].decisions if not d.done]


def test_small_layers_stay() -> None:
    b = layer(8, 64)
    assert why(b.finish([b.nodes[-1].result]), "int8") == ["[8, 64] is too small to matter"]


def test_groups_fit_rows_or_become_smaller() -> None:
    b = layer(64, 96)
    graph = b.finish([b.nodes[-1].result])
    made, report = quantized(graph, Recipe(parse("int4-g128"), parse("int4-g128")))
    assert nodes(made, "quantized_linear")[0].attrs["group"] == 32
    assert [d.why for d in report.decisions if not d.done] == ["they do not divide 96: groups of 32"]
    b = layer(64, 50)
    graph = b.finish([b.nodes[-1].result])
    made, report = quantized(graph, Recipe(parse("int4"), parse("int4")))
    assert made is graph and report.decisions[0].why == "rows of 50 are not whole groups of 32"


def test_routers_stay() -> None:
    b = layer(64, 64)
    best, _ = b.emit_node("topk", [b.emit("sigmoid", b.nodes[-1].result)], {"k": 2}).results
    assert why(b.finish([best]), "int8") == ["it chooses experts"]


def expert_layer(n: int, transposed: bool = False, heads: bool = False) -> Graph:
    b = Builder("experts")
    x = b.input("x", TensorType(DType.F32, (TOKENS, 1, 64)))
    scores = b.input("scores", TensorType(DType.F32, (TOKENS, 4)))
    choice = b.input("c", TensorType(DType.I32, (TOKENS, 2))) if heads else b.emit_node("topk", (scores,), {"k": 2}).results[1]
    weight = b.param("w", TensorType(DType.F32, (4, 64, n) if transposed else (4, n, 64)))
    return b.finish([b.emit("expert_linear", x, weight, choice, transposed=transposed, loc="m.py:2")])


def test_experts_are_multiplied_by_floats() -> None:
    for transposed in (False, True):
        graph, report = quantized(expert_layer(128, transposed), recipe("int4"))
        (node,) = nodes(graph, "quantized_expert_linear")
        assert node.attrs == {"n": 128, "format": "int4", "group": 32} and not nodes(graph, "quantize_rows")
        assert node.operands[1].type.shape == (512, 64)  # type: ignore[union-attr]
        assert [d.what for d in report.decisions] == ["4 experts [128, 64] to int4-wo"]
        packed = pack_weights.run(graph, Report(), packing=Packing(64, 32, {}))
        assert nodes(packed, "packed_quantized_expert_linear")[0].attrs["k"] == 64
        with pytest.raises(UnsupportedError, match="m.py:2: experts of 128 columns do not fill tiles of 96"):
            pack_weights.run(graph, Report(), packing=Packing(96, 32, {}))


def test_experts_that_stay() -> None:
    assert why(expert_layer(96), "int8") == ["96 rows are no multiple of 64"]
    assert why(expert_layer(64, heads=True), "int8") == ["no router chooses them: they are heads of latent attention"]


def test_a_computed_weight_stays() -> None:
    b = Builder("g")
    w = b.input("w", TensorType(DType.F32, (64, 64)))
    graph = b.finish([b.emit("linear", b.input("x", TensorType(DType.F32, (TOKENS, 64))), w)])
    assert quantize.run(graph, Report(), recipe=recipe("int8")) is graph


def test_rows_that_are_not_tokens_stay() -> None:
    b = Builder("g")
    x = b.input("x", TensorType(DType.F32, (TOKENS, 2, 64)))
    y = b.emit("linear", x, b.param("w", TensorType(DType.F32, (64, 64))))
    assert why(b.finish([y]), "int8") == ["its rows are not those of tokens"]


# -- what a checkpoint stores quantised

def merged(gated: bool) -> Graph:
    """Three projections of one input as one; with `gated`, a gate and its up projection, interleaved."""
    b = Builder("merged")
    x = b.input("x", TensorType(DType.F32, (TOKENS, 64)))
    y = [b.emit("linear", x, b.param(name, TensorType(DType.F32, (64, 64)))) for name in "abc"[:2 if gated else 3]]
    made = [b.emit("mul", b.emit("silu", y[0]), y[1])] if gated else y
    return merge_linear.run(b.finish(made))


def stored(schemes: dict[str, Scheme]) -> tuple[StoredWeights, dict[str, QuantizedTensor]]:
    rng = np.random.default_rng(0)
    tensors = {name: rounded(rng.normal(0, 1, (64, 64)).astype(np.float32), s) for name, s in schemes.items()}
    # Not what rounding the weight again would give.
    tensors = {name: QuantizedTensor(np.maximum(t.values, -3), t.scales, t.offsets, t.scheme) for name, t in tensors.items()}
    return StoredWeights(schemes, tensors.__getitem__), tensors


def refuse(source: str) -> np.ndarray:
    raise AssertionError(f"{source} was read as floats")


@pytest.mark.parametrize("name", ["int8", "int4-g32-asym"])
def test_integers_of_merged_weights_are_kept(name: str) -> None:
    weights, tensors = stored(dict.fromkeys("abc", parse(name)))
    for gated in (False, True):
        graph, _ = quantized(merged(gated), Recipe(stored=weights.schemes))
        (node,) = nodes(graph, "quantize_weight")
        folder = ConstantFolder(graph, refuse, weights.get)
        values, scales, *offsets = (folder.evaluate(v) for v in node.results)
        parts = [tensors[c] for c in ("ab" if gated else "abc")]
        if gated:
            order = np.arange(128).reshape(2, 2, 32).transpose(1, 0, 2).reshape(-1)
            np.testing.assert_array_equal(values, np.concatenate([p.values for p in parts])[order])
        else:
            np.testing.assert_array_equal(values, np.concatenate([p.values for p in parts]))
            np.testing.assert_array_equal(scales, np.concatenate([p.scales for p in parts]))
        assert bool(offsets) == name.endswith("asym")


def test_weights_of_different_schemes_are_rounded_to_one() -> None:
    weights, tensors = stored({"a": parse("int4"), "b": parse("int8"), "c": parse("int8")})
    graph, report = quantized(merged(False), Recipe(stored=weights.schemes))
    (node,) = nodes(graph, "quantize_weight")
    assert node.attrs["format"] == "int8" and node.attrs["group"] == 32
    assert [d.why for d in report.decisions if not d.done] == [
        "weights of int4, int8 were joined; they are rounded to int8-g32"]
    folder = ConstantFolder(graph, refuse, weights.get)
    values, scales = (folder.evaluate(result).astype(np.float32) for result in node.results[:2])
    steps = np.repeat(scales, 32, axis=1)
    want = np.concatenate([tensors[name].dequantize() for name in "abc"])
    assert (np.abs(values * steps - want) <= 0.5001 * steps).all()
    assert not np.array_equal(values[64:128], tensors["b"].values)


def test_a_slice_of_stored_rows_keeps_integers() -> None:
    b = Builder("g")
    w = b.emit("slice", b.param("a", TensorType(DType.F32, (64, 64))), axis=0, start=16, stop=64)
    x = b.input("x", TensorType(DType.F32, (TOKENS, 64)))
    weights, tensors = stored({"a": parse("int8")})
    graph, _ = quantized(b.finish([b.emit("linear", x, w)]), Recipe(stored=weights.schemes))
    (node,) = nodes(graph, "quantize_weight")
    values = ConstantFolder(graph, refuse, weights.get).evaluate(node.results[0])
    np.testing.assert_array_equal(values, tensors["a"].values[16:])


def test_floats_are_rounded_part_by_part() -> None:
    """What the folder makes of a merged weight is what the op's reference makes of the whole."""
    rng = np.random.default_rng(1)
    arrays = {name: rng.normal(0, 1, (64, 64)).astype(np.float32) for name in "abc"}
    graph, _ = quantized(merged(False), recipe("int4"))
    (node,) = nodes(graph, "quantize_weight")
    folder = ConstantFolder(graph, arrays.__getitem__)
    whole = rounded(np.concatenate([arrays[c] for c in "abc"]), parse("int8"))
    for value, want in zip(node.results, (whole.values, whole.scales), strict=True):
        np.testing.assert_array_equal(folder.evaluate(value), want)


