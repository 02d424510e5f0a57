"""Fixtures for all tests: a tiny checkpoint made without torch, and the demo model compiled once a session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run in several processes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def write_tiny_checkpoint(path: Path, seed: int = 0) -> Path:
    """A random 2-layer Llama in fp32 with a byte-level tokenizer, as a Hugging Face checkpoint."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    hidden, inner, heads, kv_heads, head_dim, layers, vocab = 64, 96, 4, 2, 16, 2, 258
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "dtype": "float32",
              "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "head_dim": head_dim, "num_hidden_layers": layers, "vocab_size": vocab, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 257,
              "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (vocab, hidden)}
    for i in range(layers):
        head = f"model.layers.{i}."
        shapes |= {head + "input_layernorm.weight": (hidden,), head + "post_attention_layernorm.weight": (hidden,),
                   head + "self_attn.q_proj.weight": (heads * head_dim, hidden),
                   head + "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
                   head + "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
                   head + "self_attn.o_proj.weight": (hidden, heads * head_dim),
                   head + "mlp.gate_proj.weight": (inner, hidden), head + "mlp.up_proj.weight": (inner, hidden),
                   head + "mlp.down_proj.weight": (hidden, inner)}
    rng = np.random.default_rng(seed)
    weights = {name: (np.ones(shape) + 0.1 * rng.standard_normal(shape) if len(shape) == 1
                      else rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
               for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT,
         "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_tiny_checkpoint`."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint compiled for this CPU in fp32."""
    import inferloom

    return inferloom.compile(tiny_checkpoint, dtype="fp32", out=tmp_path_factory.mktemp("artifact") / "tiny",
                             max_tokens=64, max_seqs=8)


@pytest.fixture(scope="session")
def tiny_embed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint compiled for this CPU in fp32, to embed."""
    import inferloom

    return inferloom.compile(tiny_checkpoint, dtype="fp32", out=tmp_path_factory.mktemp("artifact") / "tiny-embed",
                             max_tokens=64, max_seqs=8, task="embed")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model that ships in models/demo."""
    return DEMO


def _compiled_demo(dtype: str, quant: str | None = None, kv_dtype: str | None = None) -> Path:
    from inferloom.cache import CompileOptions, compile_cached

    return compile_cached(DEMO, CompileOptions(dtype=dtype, quant=quant, kv_dtype=kv_dtype))


@pytest.fixture(scope="session")
def demo_fp32() -> Path:
    """The demo model compiled for this CPU in fp32; shared between test processes through the cache."""
    return _compiled_demo("fp32")


@pytest.fixture(scope="session")
def demo_int8_kv() -> Path:
    """The demo model compiled for this CPU in bf16, with keys and values in int8."""
    return _compiled_demo("bf16", kv_dtype="int8")


@pytest.fixture(scope="session")
def demo_fp8_kv() -> Path:
    """The demo model compiled for this CPU in bf16, with keys and values in fp8."""
    return _compiled_demo("bf16", kv_dtype="fp8")


@pytest.fixture(scope="session")
def demo_bf16() -> Path:
    """The demo model compiled for this CPU in bf16; shared between test processes through the cache."""
    return _compiled_demo("bf16")


@pytest.fixture(scope="session")
def demo_int8() -> Path:
    """The demo model compiled for this CPU with weights and activations of 8 bits."""
    return _compiled_demo("bf16", "int8")


@pytest.fixture(scope="session")
def demo_int4() -> Path:
    """The demo model compiled for this CPU with weights of 4 bits."""
    return _compiled_demo("bf16", "int4")
