"""A process takes the memory that the artifact's contract says, and little beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MIB = 2**20
#: What Python and libraries may take before an artifact is loaded, and what a small model may take beside its contract.
LIBRARIES, BESIDE = 200 * MIB, 32 * MIB
#: Fills the pool of state with requests of the longest length, then the workspace with as many rows of logits as may be.
PROGRAM = """
import json, sys
from pathlib import Path
from inferloom.runtime.device.base import memory_needed
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

before = status("VmRSS")
with LLM(sys.argv[1], memory_bytes=int(sys.argv[2]), threads=2) as llm:
    blocks, size, longest = llm.device.num_blocks, llm.manifest.state.block_tokens, llm.engine.longest
    kept = longest // size - 1  # a block that is not full is free again when its request ends
    for count, length in ((-(-blocks // kept), longest - 2), (llm.manifest.dims.rows, 8)):
        prompts = [[1 + (7 * i + 3 * j) % 250 for j in range(length)] for i in range(count)]
        out = llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        assert [len(each.outputs[0].token_ids) for each in out] == [2] * count
    print(json.dumps([before, status("VmHWM") - before, memory_needed(llm.manifest, blocks)[0]]))
"""


def measured(artifact: Path, memory_bytes: int) -> tuple[int, int, int]:
    """Bytes resident after the imports, the most there were above them, and those of the contract."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(artifact), str(memory_bytes)], capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stderr
    before, above, contract = json.loads(run.stdout)
    assert memory_bytes - contract < 2 * MIB  # the budget is used but for a part of a block
    return before, above, contract


def test_small_model(demo_bf16: Path) -> None:
    before, above, contract = measured(demo_bf16, 40 * MIB)
    assert before < LIBRARIES
    assert above < contract + BESIDE


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, "int8"])
def test_peak_is_the_contract(quant: str | None, tmp_path: Path) -> None:
    import inferloom

    artifact = inferloom.compile(_checkpoint(tmp_path / "checkpoint"), out=tmp_path / "artifact", quant=quant,
                                 max_tokens=512, max_seqs=32)
    weights = (artifact / "weights" / "model.safetensors").stat().st_size
    assert weights > 100 * MIB
    before, above, contract = measured(artifact, weights + 300 * MIB)
    assert before < LIBRARIES
    assert abs(above / contract - 1) < 0.05, f"{above:,} bytes at the peak, the contract says {contract:,}"


def _checkpoint(path: Path) -> Path:
    """A Llama without tokenizer that computes little for its size: a large vocabulary, much state for each token."""
    from safetensors.numpy import save_file

    hidden, heads, head_dim, layers, vocab = 512, 32, 64, 2, 120_000
    path.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "dtype": "float32",
              "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim,
              "num_hidden_layers": layers, "vocab_size": vocab, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
              "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    (path / "config.json").write_text(json.dumps(config))
    inner = heads * head_dim
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (inner, hidden) for name in "qkv"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (hidden, hidden) for name in ("gate", "up", "down")}
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, inner)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
