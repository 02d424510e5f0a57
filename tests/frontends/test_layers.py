"""Tracing distinct layers and repeating them gives the graph of the whole trace, or falls back to it and says so."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.compiler.frontends import hooks, huggingface, layers
from inferloom.compiler.frontends.skeleton import build_skeleton
from inferloom.ir.text import print_graph
from tests import zoo

QUICK = {"qwen2_window"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.ZOO])
def test_repeated_equals_whole(name: str) -> None:
    repeated, _ = huggingface.trace_config(zoo.config(name, 8))
    whole, _ = huggingface.trace_config(zoo.config(name, 8), whole=True)
    assert not repeated.notes
    assert print_graph(repeated.imported.graph) == print_graph(whole.imported.graph)
    assert repeated.imported.buffers.keys() == whole.imported.buffers.keys()
    for source, value in repeated.imported.buffers.items():
        assert np.array_equal(value, whole.imported.buffers[source])


def test_kinds_and_what_is_traced() -> None:
    model = build_skeleton(zoo.config("gemma3_text", 8))
    found = layers.find_layers(model)
    assert found is not None and found.path == "model.layers"
    assert found.kinds == (0, 1, 0, 0, 1, 0, 0, 1)  # sliding, full, sliding, sliding, ...
    assert found.traced() == [0, 1, 2, 4, 6, 7]


def test_fingerprints_see_attributes_and_shapes_but_not_the_place() -> None:
    model = build_skeleton(zoo.config("llama", 8))
    prints = [layers.fingerprint(layer) for layer in model.model.layers]
    assert len(set(prints)) == 1
    model.model.layers[3].self_attn.scaling *= 2
    model.model.layers[4].mlp.act_fn = model.model.norm
    assert len({layers.fingerprint(layer) for layer in model.model.layers}) == 3


def test_skipping_restores_the_model() -> None:
    model = build_skeleton(zoo.config("llama", 8))
    before = list(model.model.layers)
    found = layers.find_layers(model)
    assert found is not None
    with layers.skipping(found):
        assert list(model.model.layers) != before
    assert list(model.model.layers) == before and not any(m._forward_hooks for m in before)


def test_a_layer_that_depends_on_its_place_is_traced_whole() -> None:
    model = build_skeleton(zoo.config("llama", 4))
    cls = type(model.model.layers[0].mlp)
    original = cls.forward

    def scaled(self, x):
        place = next(i for i, layer in enumerate(model.model.layers) if getattr(layer, "mlp", None) is self)
        return original(self, x) * float(place + 2)

    cls.forward = scaled
    try:
        with hooks.installed(model):
            traced = huggingface.trace_repeated(model)
    finally:
        cls.forward = original
    assert "cannot be repeated" in traced.notes[0] and "traced as a whole" in traced.notes[0]
    assert sum(n.op == "attention" for n in traced.imported.graph.nodes) == 4


@pytest.mark.slow
def test_values_between_layers_are_traced_whole() -> None:
    """Nodes of the model itself that stand between its layers belong to none of them."""
    model = build_skeleton(zoo.config("llama", 4))
    with hooks.installed(model):
        layer = type(model.model.layers[0])
        call = layer.__call__
        layer.__call__ = lambda self, *a, **k: call(self, *a, **k) * 1.5
        try:
            traced = huggingface.trace_repeated(model)
        finally:
            del layer.__call__
    assert "hands on 2 values" in traced.notes[0]
    assert sum(n.op == "attention" for n in traced.imported.graph.nodes) == 4
