"""Decoders with operators of onnxruntime, as onnxruntime-genai's builder writes them, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferloom
from inferloom.compiler.frontends.onnx import loader as front_end
from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.frontends.onnx_graphs import VOCAB, Net, attention_node, genai, mha, onnxruntime_logits, run

IDS = np.random.default_rng(0).integers(3, VOCAB, 40).astype(np.int32)


@pytest.mark.parametrize("options, window", [
    ({}, 0), ({"packed": True}, 0), ({"inner_rotary": False}, 0), ({"window": 7}, 7), ({"scale": 0.3, "softcap": 5.0}, 0),
    ({"packed": True, "window": 7, "rotary_interleaved": 1}, 7), ({"sinks": True}, 0), ({"bits": 4}, 0), ({"bits": 8}, 0)],
    ids=str)
def test_genai_decoder_matches_onnxruntime(options: dict[str, Any], window: int, tmp_path: Path) -> None:
    path = genai(**options).save(tmp_path)
    traced = front_end.load(path)
    want = onnxruntime_logits(path, IDS)
    assert np.abs(run(traced, IDS) - want).max() <= 1e-4 * want.std()
    found = [n for n in traced.graph.nodes if n.op == "attention"]
    assert [n.attrs["slot"] for n in found] == [0, 1] and {n.attrs["window"] for n in found} == {window}
    assert bool(traced.notes) == ("bits" in options)
    assert traced.max_model_len == 64, "the rotary caches have 64 rows"


@pytest.mark.parametrize("unidirectional", [True, False])
def test_multi_head_attention_matches_onnxruntime(unidirectional: bool, tmp_path: Path) -> None:
    path = mha(unidirectional).save(tmp_path)
    want = onnxruntime_logits(path, IDS)
    assert np.abs(run(front_end.load(path, 64), IDS) - want).max() <= 1e-4 * want.std()


def test_artifact_of_a_quantised_decoder_needs_no_tokenizer(tmp_path: Path) -> None:
    path = genai(bits=4, window=7).save(tmp_path / "model")
    (tmp_path / "model" / "genai_config.json").write_text(
        '{"model": {"type": "llama", "eos_token_id": [2, 7], "bos_token_id": 1, "context_length": 48}}')
    out = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "out", max_tokens=64, max_seqs=8)
    want = onnxruntime_logits(path, IDS)
    with LLM(out, threads=1) as llm:
        m = llm.manifest.model
        assert (m.eos_token_ids, m.bos_token_id, m.max_model_len, m.architecture) == ((2, 7), 1, 48, "llama")
        assert np.abs(llm.logits(IDS.tolist()) - want).max() <= 1e-4 * want.std()
        greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        prompts = [IDS[:n].tolist() for n in (40, 9, 1, 23)]
        made = [o.outputs[0].token_ids[0] for o in llm.generate(prompts, greedy)]
    assert made == [int(want[len(p) - 1].argmax()) for p in prompts]


def _edited(place: int, name: str) -> Net:
    """A decoder whose first attention reads another tensor at one place."""
    net = genai()
    attention_node(net).input[place] = name
    return net


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    net = genai(smooth_softmax=1)
    with pytest.raises(UnsupportedError, match=r"com.microsoft.GroupQueryAttention \(node 'node_attn_.*smooth_softmax=1"):
        front_end.load(net.save(tmp_path / "a"))
    for options in ({"window": 0}, {"softcap": -1.0}, {"scale": float("inf")}):
        with pytest.raises(UnsupportedError, match="GroupQueryAttention.*with.*" + next(iter(options))):
            front_end.load(genai(**options).save(tmp_path / "a"))
    net = genai()
    wrong = net.tensor(np.array([[3]], np.int32))
    attention_node(net).input[5] = wrong
    with pytest.raises(UnsupportedError, match=rf"seqlens_k \('{wrong}'\) is not the number of tokens so far less one"):
        front_end.load(net.save(tmp_path / "b"))
    with pytest.raises(UnsupportedError, match="past keys and values must both be inputs"):
        front_end.load(_edited(3, "").save(tmp_path / "c"))
    net = genai(bits=4)
    for node in net.nodes:
        if node.op_type == "MatMulNBits":
            next(a for a in node.attribute if a.name == "bits").i = 2
    with pytest.raises(UnsupportedError, match=r"MatMulNBits.*bits=2.*supported are 4 and 8 bits"):
        front_end.load(net.save(tmp_path / "d"))
