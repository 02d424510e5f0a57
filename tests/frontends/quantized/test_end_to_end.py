"""A GGUF of the demo model, compiled and run: greedy tokens are those of the same weights in floats."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from inferloom.cli.app import app
from tests.frontends.quantized.gguf_files import gguf_name, llama_metadata, q4_k, q6_k, turned, write

#: What llama.cpp's Q4_K_M makes of a model whose inner size is no multiple of 256.
MIXED = {"v_proj": "Q6_K", "down_proj": "Q5_0", "embed_tokens": "Q6_K"}
PROMPT = "class Node:\n    def __init__(self, "


def demo_gguf(demo: Path, path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The demo model with its projections in a quantised type (or "Q4_K_M"), the rest in BF16; returns its floats."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((demo / "config.json").read_text())
    tensors, floats = {}, {}
    with safe_open(demo / "model.safetensors", "pt") as file:
        for name in file.keys():
            weight = file.get_tensor(name).float().numpy()
            heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            rotary = "q_proj" in name or "k_proj" in name
            stored = turned(weight, heads) if rotary else weight
            if "_proj" in name or "embed" in name:
                own = MIXED.get(name.split(".")[-2], "Q4_K") if kind == "Q4_K_M" else kind
                number, ours = gguf.GGMLQuantizationType[own], {"Q4_K": q4_k, "Q6_K": q6_k}.get(own)
                raw = ours(stored) if ours is not None else gguf.quants.quantize(stored, number)
                tensors[gguf_name(name)] = (own, weight.shape, raw.tobytes())
                near = gguf.quants.dequantize(raw, number)
                size = len(near) // heads  # rotary halves back apart
                floats[name] = near.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(near.shape) if rotary else near
            else:
                bf16 = weight.astype(ml_dtypes.bfloat16)
                tensors[gguf_name(name)] = ("BF16", weight.shape, bf16.tobytes())
                floats[name] = weight
    write(path, llama_metadata(demo), tensors)
    return {name: torch.from_numpy(np.array(array)) for name, array in floats.items()}


@pytest.mark.slow
def test_a_gguf_of_the_demo_model_runs(demo_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path / "demo.gguf"
    floats = demo_gguf(demo_checkpoint, path, "Q8_0")
    model = LlamaForCausalLM(LlamaConfig.from_dict(json.loads((demo_checkpoint / "config.json").read_text()))).float().eval()
    model.load_state_dict(floats, strict=False)
    model.tie_weights()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        want = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1]:].tolist()
    result = CliRunner().invoke(app, ["compile", str(path), "-o", str(tmp_path / "made"), "--dtype", "fp32", "--quant", "none",
                                      "--json"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["run", str(tmp_path / "made"), PROMPT, "--max-tokens", "24", "--json"])
    assert json.loads(result.stdout)["outputs"][0]["token_ids"] == want


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "schemes"), [
    ("Q8_0", {"int8-g32": 29}), ("Q4_1", {"int4-asym": 29}), ("Q4_K_M", {"int4-asym": 21, "int8-g32": 15})])
def test_integers_are_kept(kind: str, schemes: dict[str, int], demo_checkpoint: Path, tmp_path: Path) -> None:
    """Against the same integers unpacked to floats, what is lost is what activations in int8 lose."""
    path = tmp_path / "demo.gguf"
    demo_gguf(demo_checkpoint, path, kind)
    result = CliRunner().invoke(app, ["compile", str(path), "-o", str(tmp_path / "made"), "--report-loss", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["loss"]
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["numerics"]["quantized_weights"] == schemes
    assert 0 < found["kl"] < 0.01 and abs(found["nats"] - found["reference_nats"]) < 0.01
    notes = [d["what"] for d in json.loads((tmp_path / "made" / "ir" / "report.json").read_text()) if d["pass"] == "front-end"]
    if kind == "Q4_K_M":  # 7 layers of five Q4_K, one Q6_K and one Q5_0, and the embedding
        for line, count in (("Q4_K weights kept as int4-asym", 35), ("Q6_K weights rounded anew to int8-g32", 8),
                            ("Q5_0 weights kept as int8-g32", 7)):
            assert any(note.startswith(line) and note.endswith(f": {count}") for note in notes)
