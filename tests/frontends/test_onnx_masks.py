"""Masks: what each means is proved by evaluating it, and what is none of ours is refused with the node's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from inferloom.compiler.frontends.onnx import loader as front_end
from inferloom.compiler.frontends.onnx.masks import Rule, fit
from inferloom.ir.errors import UnsupportedError
from tests.frontends.onnx_graphs import HEADS, VOCAB, WIDTH, Net, onnxruntime_logits, run

Mask = Callable[[Net, str, str], str]


def decoder(mask: Mask, *, raw: bool = True, cached: bool = True, **attrs: Any) -> Net:
    """One layer of attention whose mask is made by `mask(net, query positions [tokens, 1], key positions [1, keys])`."""
    net = Net(opset=18 if raw else 23)
    net.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
    past = [net.input(f"past.{x}", TensorProto.FLOAT, ["batch", HEADS, "past", 16]) for x in ("key", "value")] if cached else []
    x = net.op("Gather", net.weight(VOCAB, WIDTH, gain=6.0), "input_ids")
    shape, order = net.tensor(np.array([0, 0, HEADS, 16], np.int64)), [0, 2, 1, 3]
    q, k, v = (net.op("Transpose", net.op("Reshape", net.op("MatMul", x, net.weight(WIDTH, WIDTH)), shape), perm=order)
               for _ in range(3))
    steps, zero = net.op("Squeeze", net.op("Shape", "input_ids", start=1, end=2)), net.tensor(np.array(0, np.int64))
    done = net.op("Squeeze", net.op("Shape", past[0], start=2, end=3)) if cached else zero
    one, total = net.tensor(np.array(1, np.int64)), net.op("Add", steps, done)
    queries = net.op("Unsqueeze", net.op("Range", done, total, one), net.tensor(np.array([1], np.int64)))
    keys = net.op("Unsqueeze", net.op("Range", zero, total, one), net.tensor(np.array([0], np.int64)))
    bias = mask(net, queries, keys)
    k, v = (net.op("Concat", p, x, axis=2) for p, x in zip(past, (k, v))) if cached else (k, v)
    if raw:
        scores = net.op("MatMul", net.op("Mul", q, net.tensor(np.float32(0.25))), net.op("Transpose", k, perm=[0, 1, 3, 2]))
        made = net.op("MatMul", net.op("Softmax", net.op("Add", scores, bias) if bias else scores), v)
    else:
        made = net.op("Attention", q, k, v, bias, **attrs)
    flat = net.op("Reshape", net.op("Transpose", made, perm=order), net.tensor(np.array([0, 0, WIDTH], np.int64)))
    net.op("MatMul", net.op("Add", x, flat), net.weight(WIDTH, VOCAB), outputs=["logits"])
    net.output("logits", TensorProto.FLOAT, ["batch", "tokens", VOCAB])
    return net


def hidden_where(net: Net, condition: str, low: float = -1e38) -> str:
    return net.op("Where", condition, net.tensor(np.float32(low)), net.tensor(np.float32(0)))


def number(net: Net, value: int) -> str:
    return net.tensor(np.array(value, np.int64))


def causal(net: Net, q: str, k: str) -> str:
    return hidden_where(net, net.op("Greater", k, q))


def window(net: Net, q: str, k: str, size: int = 7, low: float = -1e38) -> str:
    far = net.op("GreaterOrEqual", net.op("Sub", q, k), number(net, size))
    return hidden_where(net, net.op("Or", far, net.op("Greater", k, q)), low)


def chunks(net: Net, q: str, k: str) -> str:
    same = net.op("Equal", *(net.op("Div", x, number(net, 6)) for x in (q, k)))
    return hidden_where(net, net.op("Or", net.op("Not", same), net.op("Greater", k, q)), -65504.0)


def alibi(net: Net, q: str, k: str) -> str:
    slopes = net.tensor((2.0 ** -np.arange(1, HEADS + 1)).astype(np.float32).reshape(HEADS, 1, 1))
    return net.op("Add", net.op("Mul", net.op("Cast", k, to=TensorProto.FLOAT), slopes), causal(net, q, k))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("mask, attrs", [(causal, {}), (window, {"window": 7}), (chunks, {"chunk": 6}), (alibi, {})],
                         ids=lambda x: getattr(x, "__name__", ""))
def test_masks_mean_what_onnxruntime_computes(mask: Mask, attrs: dict[str, int], cached: bool, tmp_path: Path) -> None:
    path = decoder(mask, cached=cached).save(tmp_path)
    traced = front_end.load(path, 64)
    (node,) = [n for n in traced.graph.nodes if n.op == "attention"]
    assert {"window": node.attrs["window"], "chunk": node.attrs["chunk"]} == {"window": 0, "chunk": 0} | attrs
    assert (node.operands[4] is not None) == (mask is alibi) and node.attrs["scale"] == 0.25
    ids = np.random.default_rng(1).integers(0, VOCAB, 40).astype(np.int32)
    want = onnxruntime_logits(path, ids)
    assert np.abs(run(traced, ids) - want).max() <= 1e-4 * want.std()


def test_a_window_past_all_short_lengths_is_found(tmp_path: Path) -> None:
    """The lengths that are evaluated follow the numbers in the mask."""
    wide = decoder(lambda net, q, k: window(net, q, k, 1000))
    for length, size in ((2048, 1000), (1001, 1000), (1000, 0), (512, 0)):
        (node,) = [n for n in front_end.load(wide.save(tmp_path), length).graph.nodes if n.op == "attention"]
        assert node.attrs["window"] == size, length
    for cached in (True, False):  # no number of this mask is as large as its window
        twice = decoder(lambda net, q, k: hidden_where(net, net.op("Or", net.op("Greater", k, q), net.op(
            "GreaterOrEqual", net.op("Sub", net.op("Sub", q, number(net, 1500)), k), number(net, 1500)))), cached=cached)
        (node,) = [n for n in front_end.load(twice.save(tmp_path), 4096).graph.nodes if n.op == "attention"]
        assert node.attrs["window"] == 3000
    far = decoder(lambda net, q, k: window(net, q, k, 20000), cached=False).save(tmp_path)
    assert front_end.load(far, 2048).max_model_len == 2048
    with pytest.raises(UnsupportedError, match="computed from the number 20000, and the graph has no cache inputs"):
        front_end.load(far, 32768)


def refused(net: Net, tmp_path: Path, match: str, length: int = 64) -> None:
    with pytest.raises(UnsupportedError, match=match):
        front_end.load(net.save(tmp_path), length)


def test_other_masks_are_refused(tmp_path: Path) -> None:
    none: Mask = lambda net, q, k: ""  # noqa: E731
    refused(decoder(none), tmp_path, r"MatMul \(node 'node_matmul_.*is not causal: with 0 cached tokens and 7 more, the token at "
            r"position 0 sees the keys \[0, 1, 2, 3, 4, 5, 6\]")
    prefix: Mask = lambda net, q, k: hidden_where(net, net.op("And", net.op("Greater", k, q), net.op(  # noqa: E731
        "Greater", k, number(net, 3))))
    refused(decoder(prefix), tmp_path, "is not causal")
    strided: Mask = lambda net, q, k: hidden_where(net, net.op("Or", net.op("Greater", k, q), net.op(  # noqa: E731
        "Equal", net.op("Mod", net.op("Sub", q, k), number(net, 4)), number(net, 3))))
    refused(decoder(strided), tmp_path, "only causal decoders")
    changing: Mask = lambda net, q, k: window(net, q, k, 7, -3.0)  # noqa: E731
    refused(decoder(changing), tmp_path, "adds a bias to scores|is not causal")
    by_head: Mask = lambda net, q, k: net.op("Mul", causal(net, q, k), net.tensor(  # noqa: E731
        np.array([1, 1, 0, 1], np.float32).reshape(HEADS, 1, 1)))
    refused(decoder(by_head), tmp_path, "differs between heads")
    square: Mask = lambda net, q, k: net.op("Add", causal(net, q, k), net.op("Cast", net.op(  # noqa: E731
        "Mul", k, k), to=TensorProto.FLOAT))
    refused(decoder(square), tmp_path, "not ALiBi's slope times the distance")
    grown: Mask = lambda net, q, k: hidden_where(net, net.op("Or", net.op("Greater", k, q), net.op("Less", k, net.op(  # noqa: E731
        "Div", q, number(net, 2)))))
    refused(decoder(grown), tmp_path, "not causal with a sliding window or chunks")
    by_step: Mask = lambda net, q, k: hidden_where(net, net.op("Or", net.op("Greater", k, q), net.op("Less", k, net.op(  # noqa: E731
        "Sub", net.op("ReduceMax", q, keepdims=0), number(net, 4)))))
    refused(decoder(by_step), tmp_path, "depends on how the sequence is cut into steps|is not causal")
    tokens: Mask = lambda net, q, k: net.op("Cast", net.op("Unsqueeze", "input_ids", number_list(net, [1, 2])),  # noqa: E731
                                            to=TensorProto.FLOAT)
    refused(decoder(tokens, cached=False), tmp_path, "depends on what the tokens are")


def number_list(net: Net, values: list[int]) -> str:
    return net.tensor(np.array(values, np.int64))


def test_attention_operator_with_attributes(tmp_path: Path) -> None:
    none: Mask = lambda net, q, k: ""  # noqa: E731
    path = decoder(none, raw=False, cached=False, is_causal=1, scale=0.5, softcap=4.0).save(tmp_path)
    traced = front_end.load(path, 64)
    (node,) = [n for n in traced.graph.nodes if n.op == "attention"]
    assert (node.attrs["scale"], node.attrs["softcap"]) == (0.5, 4.0)
    ids = np.random.default_rng(1).integers(0, VOCAB, 30).astype(np.int32)
    want = reference_logits(path, ids)
    assert np.abs(run(traced, ids) - want).max() <= 1e-4 * want.std()
    refused(decoder(none, raw=False, cached=True, is_causal=1), tmp_path, "is not causal: with 5 cached tokens and 3 more")
    refused(decoder(none, raw=False, cached=False), tmp_path, r"Attention \(node .*is not causal")


def reference_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    return np.asarray(ReferenceEvaluator(str(path)).run(["logits"], {"input_ids": ids[None].astype(np.int64)})[0][0])


def scaled_past(length: int, cached: bool) -> Net:
    """A decoder that doubles its embeddings when the sequence is longer than `length`."""
    net = decoder(causal, cached=cached)
    rest = net.nodes[1:]
    del net.nodes[1:]
    tokens = net.op("Shape", "input_ids", start=1, end=2)
    total = net.op("Add", tokens, net.op("Shape", "past.key", start=2, end=3)) if cached else tokens
    factor = net.op("Where", net.op("Greater", total, number(net, length)), net.tensor(np.float32(2)), net.tensor(np.float32(1)))
    x = net.nodes[0].output[0]
    scaled = net.op("Mul", x, factor)
    for node in rest:
        node.input[:] = [scaled if i == x else i for i in node.input]
    net.nodes += rest
    return net


@pytest.mark.parametrize("cached", [True, False])
def test_what_changes_with_the_length_is_not_taken_for_constant(cached: bool, tmp_path: Path) -> None:
    path = scaled_past(1000, cached).save(tmp_path)
    ids = np.random.default_rng(1).integers(0, VOCAB, 30).astype(np.int32)
    want = onnxruntime_logits(path, ids)
    assert np.abs(run(front_end.load(path, 1000), ids) - want).max() <= 1e-4 * want.std()
    with pytest.raises(UnsupportedError, match=r"Mul \(node .*varies with the number of tokens .*unknown operator"):
        front_end.load(path, 1001)


def test_fit_refuses_what_has_no_rule() -> None:
    assert fit({0: 0, 5: 0, 9: 0}) == Rule()
    with pytest.raises(UnsupportedError, match="the token at position 3 sees from 2 on"):
        fit({0: 0, 1: 0, 2: 0, 3: 2, 4: 2})
