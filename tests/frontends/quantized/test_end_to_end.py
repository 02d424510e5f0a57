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
from tests.frontends.quantized.gguf_files import gguf_name, llama_metadata, turned, write

PROMPT = "class Node:\n    def __init__(self, "


def demo_gguf(demo: Path, path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The demo model with its projections in a quantised type and the rest in F32 and F16; returns its floats."""
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    config = json.loads((demo / "config.json").read_text())
    tensors, floats = {}, {}
    with safe_open(demo / "model.safetensors", "pt") as file:
        for name in file.keys():
            weight = file.get_tensor(name).float().numpy()
            heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            rotary = "q_proj" in name or "k_proj" in name
            stored = turned(weight, heads) if rotary else weight
            if "_proj" in name or "embed" in name:
                raw = gguf.quants.quantize(stored, number)
                tensors[gguf_name(name)] = (kind, weight.shape, raw.tobytes())
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
    result = CliRunner().invoke(app, ["compile", str(path), "-o", str(tmp_path / "made"), "--dtype", "fp32", "--json"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["run", str(tmp_path / "made"), PROMPT, "--max-tokens", "24", "--json"])
    assert json.loads(result.stdout)["outputs"][0]["token_ids"] == want
