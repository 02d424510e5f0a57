"""Models of transformers exported by torch.onnx.export: imported and compiled, against transformers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

import inferloom
from inferloom.compiler.frontends.onnx import loader as front_end
from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests import zoo
from tests.frontends.onnx_graphs import run

IDS = np.random.default_rng(0).integers(3, 131, 40).astype(np.int32)


class Plain(nn.Module):
    """Logits of whole sequences."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits


class Cached(Plain):
    """Logits and the cache after a step."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, past: Any = ()) -> Any:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                         use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def export(model: Any, path: Path, form: str, opset: int, external: bool = False) -> Path:
    """`form`: "ids" alone, with "mask" and positions, or with a cache ("kv"); the batch is dynamic in the last two."""
    config = model.config
    ids = torch.zeros(1 if form == "ids" else 2, 7, dtype=torch.int64)
    batch, tokens, past = Dim.DYNAMIC, Dim.DYNAMIC, Dim.DYNAMIC
    wrapper: Any = Cached(model) if form == "kv" else Plain(model)
    args: tuple[Any, ...] = (ids,)
    dynamic: tuple[Any, ...] = ({1: tokens},)
    names = ["input_ids"]
    outputs = ["logits"]
    if form == "mask":
        args += (torch.ones(2, 7, dtype=torch.int64), torch.arange(7).repeat(2, 1))
        dynamic = ({0: batch, 1: tokens},) * 3
        names += ["attention_mask", "position_ids"]
    if form == "kv":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = range(config.num_hidden_layers)
        args += (torch.ones(2, 12, dtype=torch.int64), torch.arange(5, 12).repeat(2, 1),
                 [(torch.randn(2, heads, 5, dim), torch.randn(2, heads, 5, dim)) for _ in layers])
        dynamic = (*({0: batch, 1: tokens},) * 3, [({0: batch, 2: past},) * 2 for _ in layers])
        caches = [f"past_key_values.{i}.{x}" for i in layers for x in ("key", "value")]
        names += ["attention_mask", "position_ids", *caches]
        outputs += [n.replace("past_key_values", "present") for n in caches]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(wrapper.eval(), args, input_names=names, output_names=outputs, dynamic_shapes=dynamic,
                                    opset_version=opset, dynamo=True, verbose=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=external)
    return path


def build(name: str, kind: str) -> Any:
    model = zoo.build(name)
    model.set_attn_implementation(kind)
    return model


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None].long(), use_cache=False).logits[0].float().numpy()


CASES = [("llama", "sdpa", "mask", 23), ("llama3_rope", "eager", "ids", 18), ("qwen3", "sdpa", "kv", 23),
         ("gemma2", "eager", "kv", 20), ("gpt2", "sdpa", "mask", 23), ("bloom", "eager", "mask", 20), ("phi3", "sdpa", "kv", 24)]
#: Those that make a pair of form and kind, or of form and opset, that no other case has, or a window, soft-cap or bias.
QUICK = {"llama", "llama3_rope", "gemma2", "bloom", "phi3"}
WINDOWS = {"gemma2": [7, 0, 7], "phi3": [7, 7]}


@pytest.mark.parametrize("name, kind, form, opset", [
    pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in CASES], ids=lambda x: str(x))
def test_export_matches_transformers(name: str, kind: str, form: str, opset: int, tmp_path: Path) -> None:
    model = build(name, kind)
    path = export(model, tmp_path / "model.onnx", form, opset)
    traced = front_end.load(path, 64)
    want = logits(model, IDS)
    assert np.abs(run(traced, IDS) - want).max() <= 1e-4 * want.std()
    found = [n for n in traced.graph.nodes if n.op == "attention"]
    assert [n.attrs["window"] for n in found] == WINDOWS.get(name, [0, 0])
    assert {n.attrs["softcap"] for n in found} == ({50.0} if name == "gemma2" else {0.0})
    kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    assert {n.operands[1].type.shape[1] for n in found} == {kv_heads}, "heads repeated for the queries are not stored"
    assert (name == "bloom") == any(n.operands[4] is not None for n in found)
    assert all("modeling_" in n.loc for n in found), "the model's source line is kept"


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(logits(model, np.array(tokens, np.int32))[-1].argmax()))
    return tokens[len(ids):]


@pytest.mark.parametrize("name, kind, opset", [
    ("llama_tied_bias", "sdpa", 23), pytest.param("gemma2", "eager", 18, marks=pytest.mark.slow)])
def test_artifact_matches_whole_chunked_and_batched(name: str, kind: str, opset: int, tmp_path: Path) -> None:
    model = build(name, kind)
    path = export(model, tmp_path / "model" / "model.onnx", "kv", opset, external=True)
    model.config.save_pretrained(path.parent)
    assert list(path.parent.glob("*.data"))
    want = logits(model, IDS)
    out = inferloom.compile(path.parent, dtype="fp32", out=tmp_path / "out", max_tokens=64, max_seqs=40)
    with LLM(out, threads=1) as llm:
        assert llm.manifest.model.max_model_len == 256 and llm.manifest.model.eos_token_ids == (2,)
        whole = llm.logits(IDS.tolist())
        assert np.abs(whole - want).max() <= 1e-4 * want.std()
    tables = [p for p in front_end.load(path).graph.params if set(p.value.type.shape) == {131, 64}]
    assert len(tables) == 1, "tied weights are one parameter"
    out = inferloom.compile(path, dtype="fp32", out=tmp_path / "small", max_tokens=11, max_seqs=3)
    prompts = [IDS[:n].tolist() for n in (29, 3, 12, 1)]
    with LLM(out, threads=1) as llm:
        assert np.array_equal(llm.logits(IDS.tolist()), whole), "chunked as whole"
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        made = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    assert made == [greedy(model, p, 6) for p in prompts]


def test_half_precision_weights_are_kept(tmp_path: Path) -> None:
    model = build("llama", "sdpa").half()
    path = export(model, tmp_path / "model.onnx", "mask", 23)
    traced = front_end.load(path, 64)
    stored = {traced.weights.load(p.source).dtype.name for p in traced.graph.params if len(p.value.type.shape) == 2}
    assert stored == {"float16"}
    want = logits(model.float(), IDS)
    assert np.abs(run(traced, IDS) - want).max() <= 1e-3 * want.std()


def test_a_table_of_positions_limits_the_length(tmp_path: Path) -> None:
    path = export(build("gpt2", "eager"), tmp_path / "model.onnx", "ids", 20)
    assert front_end.load(path).max_model_len == 64
    with pytest.raises(UnsupportedError, match="more than the 64 positions that the model's tables hold"):
        front_end.load(path, 65)
