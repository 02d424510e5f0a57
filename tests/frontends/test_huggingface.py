"""Loading checkpoints: names, shards, element types, and errors that say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inferloom.compiler.frontends import huggingface
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.interpret import interpret
from tests import zoo


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    model = zoo.build(name).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def run(traced, tokens: np.ndarray) -> np.ndarray:
    params = {p.source: np.asarray(traced.weights.load(p.source), p.value.type.dtype.numpy)
              for p in traced.graph.params}
    inputs = {"tokens": tokens, "positions": np.arange(len(tokens), dtype=np.int32),
              "logit_rows": np.arange(len(tokens), dtype=np.int32)}
    return interpret(traced.graph, inputs, params)[0]


def difference(traced, model, length: int = 23) -> float:
    tokens = np.random.default_rng(0).integers(3, 131, length).astype(np.int32)
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].float().numpy()
    return float(np.abs(run(traced, tokens) - want).max() / want.std())


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_reads_facts_and_streams_weights(tmp_path: Path) -> None:
    model = save("llama_tied_bias", tmp_path, torch.bfloat16, max_shard_size="50KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    traced = huggingface.load(tmp_path, max_model_len=100)
    assert (traced.architecture, traced.vocab_size, traced.max_model_len) == ("LlamaForCausalLM", 131, 100)
    assert (traced.eos_token_ids, traced.bos_token_id, traced.notes) == ((2,), 1, ())
    assert traced.tokenizer_files["tokenizer.json"] == tmp_path / "tokenizer.json"
    stored = dict(model.named_parameters())
    for param in traced.graph.params:
        if not param.source.startswith("buffer:"):
            array = traced.weights.load(param.source)
            assert array.dtype.name == "bfloat16"
            assert np.array_equal(array.astype(np.float32), stored[param.source].detach().float().numpy())
    assert set(traced.weights.names()) == {p.source for p in traced.graph.params}


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow),
                                  pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_loaded_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    assert difference(huggingface.load(tmp_path), model) <= 1e-4


@pytest.mark.slow
def test_checkpoint_of_the_base_model_has_names_without_prefix(tmp_path: Path) -> None:
    model = zoo.build("gpt2")
    model.transformer.save_pretrained(tmp_path)
    traced = huggingface.load(tmp_path)
    assert difference(traced, model) <= 1e-4


@pytest.mark.parametrize("length", [pytest.param(16, marks=pytest.mark.slow), 64])
def test_longrope_is_fixed_by_max_model_len(length: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)]}
    options = zoo.ZOO["phi3"][1] | {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    made = CONFIG_MAPPING["phi3"](**options, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
    model.save_pretrained(tmp_path)
    traced = huggingface.load(tmp_path, max_model_len=length)
    factor = "long_factor" if length > 16 else "short_factor"
    assert factor in traced.notes[0]
    assert difference(traced, model, 23 if length > 16 else 13) <= 1e-4


@pytest.mark.slow
def test_dynamic_rope_is_the_default_within_the_limit(tmp_path: Path) -> None:
    model = save("llama", tmp_path)
    edit_config(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    traced = huggingface.load(tmp_path)
    assert "dynamic" in traced.notes[0]
    assert difference(traced, model) <= 1e-4


def test_persistent_buffers_come_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of a model that keeps its rotary frequencies in the checkpoint."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    original = LlamaRotaryEmbedding.__init__

    def init(self, config):
        original(self, config)
        self._non_persistent_buffers_set.discard("inv_freq")

    monkeypatch.setattr(LlamaRotaryEmbedding, "__init__", init)
    model = zoo.build("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    model.config.save_pretrained(tmp_path)
    assert "model.rotary_emb.inv_freq" in model.state_dict()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    traced = huggingface.load(tmp_path)
    assert difference(traced, model) <= 1e-4
    (source,) = (p.source for p in traced.graph.params if p.source.startswith("buffer:"))
    assert np.array_equal(traced.weights.load(source), model.model.rotary_emb.inv_freq.numpy())


def test_buffers_keep_their_values_while_parameters_have_none() -> None:
    from inferloom.compiler.frontends.skeleton import build_skeleton

    real, skeleton = zoo.build("llama3_rope"), build_skeleton(zoo.config("llama3_rope"))
    for name, buffer in real.named_buffers():
        assert torch.equal(skeleton.get_buffer(name), buffer)
    assert all(type(p.data).__name__ == "FakeTensor" for p in skeleton.parameters())


def test_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit_config(tmp_path, intermediate_size=112)
    with pytest.raises(UnsupportedError, match=r"mlp.up_proj.weight is \[96, 64\], expected \[112, 64\]") as error:
        huggingface.load(tmp_path)
    assert "layers.1.mlp.down_proj" in str(error.value)
    edit_config(tmp_path, intermediate_size=96, num_hidden_layers=3)
    with pytest.raises(UnsupportedError, match="model.layers.2.mlp.down_proj.weight .* is missing"):
        huggingface.load(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="only pickled weights"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "no_such_model", "auto_map": {"AutoConfig": "evil.Config"}}, "does not know model_type"),
    ({"quantization_config": {"quant_method": "hqq"}}, "weights quantised by 'hqq' are not read"),
    ({"model_type": "t5"}, "no causal language model|encoder"),
])
def test_configs_that_cannot_be_compiled(change: dict, message: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    edit_config(tmp_path, **change)
    with pytest.raises(UnsupportedError, match=message):
        huggingface.load(tmp_path)


def test_folders_and_lengths_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no config.json"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UnsupportedError, match="not a config"):
        huggingface.load(tmp_path)
    save("llama", tmp_path)
    for length in (0, 257):
        with pytest.raises(UnsupportedError, match="max_model_len"):
            huggingface.load(tmp_path, max_model_len=length)


def test_models_that_cannot_pick_rows_get_them_picked() -> None:
    from inferloom.compiler.frontends import hooks
    from inferloom.compiler.frontends.skeleton import build_skeleton

    model = build_skeleton(zoo.config("llama"))
    forward = model.forward

    def all_rows(**kwargs):
        return forward(**{k: v for k, v in kwargs.items() if k != "logits_to_keep"})

    model.forward = all_rows
    with hooks.installed(model):
        graph = huggingface.trace_model(model).graph
    assert graph.nodes[-1].op == "gather_rows"
    assert graph.outputs[0].type.shape == (huggingface.ROWS, 131)


def test_hooks_restore_what_they_replace() -> None:
    from transformers.models.mpt import modeling_mpt

    from inferloom.compiler.frontends import hooks
    from inferloom.compiler.frontends.skeleton import build_skeleton

    before = modeling_mpt.MptAttention.forward, modeling_mpt.create_causal_mask
    model = build_skeleton(zoo.config("mpt"))
    with pytest.raises(KeyError), hooks.installed(model):
        assert modeling_mpt.MptAttention.forward is not before[0]
        assert model.config._attn_implementation == hooks.NAME
        raise KeyError
    assert (modeling_mpt.MptAttention.forward, modeling_mpt.create_causal_mask) == before
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("options", "message"), [
    ({"attention_mask": torch.zeros(1)}, "passes an attention mask"), ({"is_causal": False}, "not causal"),
    ({"position_bias": torch.zeros(1)}, "'position_bias'"), ({"head_mask": torch.zeros(1)}, "'head_mask'")])
def test_the_attention_hook_raises_on_what_it_does_not_know(options: dict, message: str) -> None:
    from inferloom.compiler.frontends.hooks import _interface

    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match=message):
        _interface(torch.nn.Module(), q, q, q, **({"attention_mask": None} | options))
