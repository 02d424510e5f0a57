"""Every causal language model of transformers, small: a few at once, all of them in the marked run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from inferloom.benchmarks import breadth
from inferloom.compiler import architectures
from inferloom.compiler.frontends import tiny

KNOWN = architectures.load()


def test_the_published_table_is_about_this_transformers() -> None:
    document = json.loads(architectures.FILE.read_text())
    if document["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {document['transformers']}")
    published = {a.name for a in KNOWN} | set(document["without_a_small_model"])
    assert published == set(tiny.architectures())


@pytest.mark.parametrize("name", ["qwen2", "mamba2"])
def test_a_few(name: str) -> None:
    made = breadth.examine(name)
    assert not [made[step]["why"] for step in ("cpu", *breadth.GPUS) if "why" in made[step]]
    assert max(made["cpu"]["single"], made["cpu"]["batched"]) <= breadth.TOLERANCE


def test_another_model_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: transformers' logits of a model with one weight a little larger are not ours."""
    reference = breadth.reference

    def larger(model: Any, ids: list[int]) -> np.ndarray:
        weight = model.model.layers[0].self_attn.v_proj.weight
        with torch.no_grad():
            weight *= 1.01
        try:
            return reference(model, ids)
        finally:
            with torch.no_grad():
                weight /= 1.01

    monkeypatch.setattr(breadth, "reference", larger)
    monkeypatch.setattr(breadth, "GPUS", {})
    made = breadth.examine("llama")
    assert "wrong: " in made["cpu"]["why"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in KNOWN])
def test_what_the_table_says(name: str) -> None:
    (said,) = (a for a in KNOWN if a.name == name)
    made = breadth.examine(name)
    (found,) = (architectures.Architecture(**a) for a in architectures.document([made])["architectures"])
    for mark in architectures.MARKS:
        assert getattr(found, mark) or not getattr(said, mark), f"{mark}: {found.why}"
