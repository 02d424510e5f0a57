"""Embeddings against transformers: final hidden states, pooled, and the same bits however they are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inferloom
from inferloom.errors import UsageError
from inferloom.runtime import manifest
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.llm import LLM
from tests import zoo

TOLERANCE = 1e-5
"""Largest error of a number of a normalised vector, times the root of how many there are: in units of their size."""
TEXTS = ["def f(x):\n    return x", "a", "import os\n\n\nclass A:\n    pass\n" * 5]


def want(base: Any, ids: list[int], pooling: str) -> np.ndarray:
    """By transformers: the pooled last hidden state, of length 1."""
    with torch.no_grad():
        states = base(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].double().numpy()
    pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
    return np.asarray(pooled / np.linalg.norm(pooled))


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() * len(wanted) ** 0.5)


def load(checkpoint: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def check(llm: LLM, base: Any, prompts: list[list[int]], limit: float = TOLERANCE) -> None:
    for pooling in ("last", "mean"):
        got = llm.embed(prompts, pooling)
        assert got.dtype == np.float32 and got.shape == (len(prompts), llm.manifest.output.vocab)
        for row, ids in zip(got, prompts, strict=True):
            assert error(row, want(base, ids, pooling)) <= limit
        other = want(base, prompts[0], "mean" if pooling == "last" else "last")
        assert len(prompts[0]) == 1 or error(got[0], other) > 100 * limit, "the poolings must differ to be told apart"


def test_tiny_matches_transformers(tiny_embed: Path, tiny_checkpoint: Path) -> None:
    made = manifest.loads((tiny_embed / "manifest.json").read_bytes())
    assert made.task == "embed" and made.output.name == "hidden" and made.output.vocab == 64 and made.output.top is None
    assert not any(k.kind == "sampling" for k in made.kernels) and made.dims.rows == 64
    with LLM(tiny_embed, threads=1) as llm:
        check(llm, load(tiny_checkpoint), [llm.encode(text) for text in TEXTS])
        assert llm.embed([]).shape == (0, 64)
        assert np.array_equal(llm.embed(TEXTS[0]), llm.embed(llm.encode(TEXTS[0])))
        plain = llm.embed(TEXTS[0], normalize=False)[0]
        assert error(plain / np.linalg.norm(plain), llm.embed(TEXTS[0])[0]) < 1e-6 and np.linalg.norm(plain) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "jamba", "gpt2"])
def test_architecture_matches_transformers(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    model.save_pretrained(tmp_path / "model")
    path = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "out", max_tokens=64, max_seqs=8, task="embed")
    r = np.random.default_rng(0)
    with LLM(path, threads=1) as llm:
        check(llm, getattr(model, model.base_model_prefix), [r.integers(3, 131, n).tolist() for n in (7, 1, 40)], 1e-4)


@pytest.mark.slow
def test_demo_matches_transformers(demo_checkpoint: Path, tmp_path: Path) -> None:
    with inferloom.LLM(demo_checkpoint, dtype="fp32", task="embed", threads=1) as llm:
        check(llm, load(demo_checkpoint), [llm.encode(text) for text in TEXTS])


@pytest.mark.slow
def test_a_checkpoint_without_a_head(tiny_checkpoint: Path, tiny_embed: Path, tmp_path: Path) -> None:
    """Embedding models are often saved without one, their parameters named from the base model on."""
    base = load(tiny_checkpoint)
    base.save_pretrained(tmp_path / "base")
    path = inferloom.compile(tmp_path / "base", dtype="fp32", out=tmp_path / "out", max_tokens=64, max_seqs=8, task="embed")
    ids = list(range(40))
    with LLM(path, threads=1) as llm, LLM(tiny_embed, threads=1) as whole:
        assert np.array_equal(llm.embed([ids]), whole.embed([ids]))


def test_same_bits_alone_in_batches_and_chunks(tiny_embed: Path) -> None:
    r = np.random.default_rng(0)
    prompts = [np.concatenate([np.arange(70), r.integers(0, 256, n)]).tolist() for n in (1, 33, 64, 100)]
    prompts += [r.integers(0, 256, n).tolist() for n in (1, 2, 17, 63, 64, 65, 200, 256)]
    for pooling in ("last", "mean"):
        with LLM(tiny_embed, threads=1, enable_prefix_caching=False) as llm:
            alone = np.concatenate([llm.embed([p], pooling) for p in prompts])
        for options in ({}, {"max_num_batched_tokens": 13}, {"max_num_seqs": 3, "threads": 2}):
            with LLM(tiny_embed, **{"threads": 1, **options}) as llm:  # type: ignore[arg-type]
                assert np.array_equal(llm.embed(prompts, pooling), alone)
                assert np.array_equal(llm.embed(prompts[::-1], pooling), alone[::-1])
                assert pooling == "mean" or llm.stats.prefix_hits > 0


def test_each_task_refuses_the_other(tiny_embed: Path, tiny_artifact: Path) -> None:
    with LLM(tiny_embed, threads=1) as llm:
        for ask in (lambda: llm.generate("a"), lambda: llm.logits([1]), lambda: llm.chat([{"role": "user", "content": "a"}])):
            with pytest.raises(RequestError, match="without --task embed"):
                ask()
        with pytest.raises(RequestError, match="choose from: last, mean"):
            llm.embed("a", pooling="max")
    with LLM(tiny_artifact, threads=1) as llm, pytest.raises(RequestError, match="compile the model with --task embed"):
        llm.embed("a")
    with pytest.raises(UsageError, match="with --task generate, not embed"):
        inferloom.LLM(tiny_artifact, task="embed")
    with pytest.raises(RequestError, match="without --task embed"):
        LLM(tiny_embed, speculative="ngram")
    with pytest.raises(RequestError, match="without --task embed"):
        LLM(tiny_artifact, speculative=tiny_embed, threads=1)


def test_a_manifest_with_the_wrong_parts_is_refused(tiny_artifact: Path) -> None:
    data = manifest.loads((tiny_artifact / "manifest.json").read_bytes()).to_json()
    assert "task" not in data, "manifests of models that generate stay as they were"
    with pytest.raises(ArtifactError, match="top goes with the task generate"):
        manifest.Manifest.from_json(data | {"task": "embed"})
    with pytest.raises(ArtifactError, match="task must be one of"):
        manifest.Manifest.from_json(data | {"task": "classify"})
