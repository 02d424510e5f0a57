"""A checkpoint in int8 with a scale for each output channel, activations quantized by token while it runs, for vLLM.

    to_compressed_tensors.py CHECKPOINT FOLDER

Weights are rounded to nearest; the embedding, which is also the output matrix, stays bf16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def convert(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    made: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # no mapping
            weight = file.get_tensor(name)
            if not name.endswith("_proj.weight"):
                made[name] = weight
                continue
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            made[name] = (weight.float() / scale).round().clamp(-128, 127).to(torch.int8)
            made[name + "_scale"] = scale.to(torch.bfloat16)
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"],
        "format": "int-quantized", "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"},
            "input_activations": {**common, "strategy": "token", "dynamic": True}}}}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target / name)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
