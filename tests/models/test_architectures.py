"""Every dense architecture, compiled for this CPU and loaded from its artifact, against transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inferloom
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests import zoo

REQUIRED = ("llama", "llama3_rope", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2",
            "granite", "smollm3", "cohere", "cohere2", "stablelm", "starcoder2", "gpt2", "gpt_neox", "opt", "falcon",
            "falcon_alibi", "bloom", "mpt", "glm4")
#: Largest error of a logit, relative to the logits' standard deviation. In bf16, an architecture that amplifies
#: rounding more than this must still be closer to float32 than transformers in bf16 is.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def reference(name: str, folder: Path) -> Any:
    """The entry's model with weights that bf16 holds exactly, saved as a bf16 checkpoint; returned in float32.

    Matrices have unit gain, as trained ones roughly do: larger random ones amplify every rounding from layer to
    layer, and a comparison in bf16 would measure that.
    """
    model = zoo.build(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            gain = 1.0 if parameter.dim() == 1 or "embed" in path else 2 / 3
            parameter.copy_((gain * parameter).bfloat16().float())
    stored = zoo.build(name)
    stored.load_state_dict(model.state_dict())
    stored.bfloat16().save_pretrained(folder)
    if "alibi" in name:  # transformers' eager falcon adds the bias twice
        model.config._attn_implementation = "sdpa"
    return model


@pytest.mark.parametrize("name", REQUIRED)
def test_architecture_matches_transformers(name: str, tmp_path: Path) -> None:
    model = reference(name, tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 131, 40).tolist()
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    for dtype, tolerance in TOLERANCE.items():
        path = inferloom.compile(tmp_path / "model", dtype=dtype, out=tmp_path / dtype, max_tokens=64, max_seqs=8)
        with LLM(path, threads=1) as llm:
            error = np.abs(llm.logits(ids) - want).max() / want.std()
            if dtype == "bf16" and error > tolerance:
                tolerance = bf16_error(model, ids, want)
            assert error <= tolerance, f"{dtype}: error {error:.2e} of the logits' deviation, {tolerance:.2e} allowed"
            if dtype == "fp32":
                greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
                made = llm.generate(ids[:20], greedy)[0].outputs[0].token_ids
                assert list(made) == _greedy(model, ids[:20], 12)


def bf16_error(model: Any, ids: list[int], want: np.ndarray) -> float:
    """The error that transformers makes in bf16, in the same measure."""
    with torch.no_grad():
        got = copy.deepcopy(model).bfloat16()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    return float(np.abs(got - want).max() / want.std())


def _greedy(model: Any, ids: list[int], count: int) -> list[int]:
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(ids):]
