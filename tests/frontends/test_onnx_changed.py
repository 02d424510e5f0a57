"""Graphs changed at random: each is refused with UnsupportedError, or means what onnxruntime computes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from inferloom.compiler.frontends.onnx import loader as front_end
from inferloom.ir.errors import UnsupportedError
from tests.frontends.onnx_graphs import VOCAB, Net, genai, mha, onnxruntime_logits, run
from tests.frontends.test_onnx_masks import alibi, decoder, window

IDS = np.random.default_rng(0).integers(3, VOCAB, 20).astype(np.int32)
NETS = {"genai": lambda: genai(layers=1), "packed": lambda: genai(layers=1, bits=4, packed=True, window=7),
        "mha": lambda: mha(False), "window": lambda: decoder(window), "alibi": lambda: decoder(alibi, cached=False)}


def change(model: Any, r: random.Random) -> None:
    """Rewire an input, swap an operator, or change an attribute or a small integer."""
    graph = model.graph
    node, kind = r.choice(graph.node), r.random()
    if kind < 0.45 and node.input:
        made = [o for n in graph.node for o in n.output]
        node.input[r.randrange(len(node.input))] = r.choice([*made, *(t.name for t in graph.initializer), ""])
    elif kind < 0.6:
        node.op_type = r.choice(graph.node).op_type
    elif kind < 0.8 and node.attribute:
        attr = r.choice(node.attribute)
        attr.i = r.choice([-1, 0, 1, 2, 3, 7, 100]) if attr.type == onnx.AttributeProto.INT else attr.i
        if r.random() < 0.2:
            node.attribute.remove(attr)
    else:
        numbers = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT64 and 0 < len(t.raw_data) <= 64]
        tensor = r.choice(numbers or [graph.initializer[0]])
        if numbers:
            tensor.raw_data = bytes([r.choice([0, 1, 2, 3, 5, 255])]) + tensor.raw_data[1:]


@pytest.mark.parametrize("name", NETS)
def test_changed_graphs_are_refused_or_right(name: str, tmp_path: Path) -> None:
    onnxruntime.set_default_logger_severity(4)
    net: Net = NETS[name]()
    original = net.model()
    r = random.Random(name)
    refused = same = 0
    for number in range(150):
        model = onnx.ModelProto()
        model.CopyFrom(original)
        change(model, r)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            traced = front_end.load(path, 64)
        except UnsupportedError:
            refused += 1
            continue
        try:
            want = onnxruntime_logits(path, IDS)
        except Exception:  # onnxruntime refuses what inferloom does not look at
            continue
        if np.isfinite(want).all() and want.shape == (len(IDS), VOCAB):
            same += 1
            error = np.abs(run(traced, IDS) - want).max()
            assert error <= 1e-3 * want.std() + 1e-4, f"change {number}"
    assert refused > 30 and same > 5
