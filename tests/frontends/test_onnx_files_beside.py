"""What lies beside an ONNX file: tokenizer and configuration, external data, and how the cache and the command line see it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from inferloom.cache import CompileOptions, content_key, require_front_end
from inferloom.compiler.frontends.onnx import loader as front_end
from inferloom.errors import MissingExtraError
from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.llm import LLM
from tests.frontends.onnx_graphs import VOCAB, genai, mha, onnxruntime_logits


def saved(folder: Path, name: str, data: str = "") -> Path:
    """A decoder without tables of positions; its weights in the file `data`, if given."""
    folder.mkdir(parents=True)
    external = {"save_as_external_data": True, "location": data, "size_threshold": 64} if data else {}
    onnx.save(mha(False).model(), folder / name, **external)
    return folder / name


def test_tokenizer_and_configuration_beside_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "onnx", "decoder.onnx")
    bare = front_end.load(path)
    assert (bare.eos_token_ids, bare.bos_token_id, bare.max_model_len, bare.tokenizer_files) == ((), None, 2048, {})
    assert bare.name == "decoder" and bare.vocab_size == 131
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(
        {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 256}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    full = front_end.load(path)
    assert (full.eos_token_ids, full.bos_token_id, full.max_model_len, full.architecture) == ((2, 9), 1, 256, "LlamaForCausalLM")
    assert full.tokenizer_files["tokenizer.json"] == tmp_path / "tokenizer.json"
    with pytest.raises(UnsupportedError, match="max_model_len=300 is not within the 1 to 256"):
        front_end.load(path, 300)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedError, match="config.json is damaged"):
        front_end.load(path)


def test_the_cache_is_keyed_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = saved(tmp_path / "m", "model.onnx", "model.data")
    keys = [content_key(path, CompileOptions()), content_key(path.parent, CompileOptions())]
    data = path.with_suffix(".data")
    (path.parent / "notes.txt").write_text("not read")
    keys.append(content_key(path, CompileOptions()))
    assert len(set(keys)) == 1
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    assert content_key(path, CompileOptions()) != keys[0]


def test_without_the_onnx_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m", "model.onnx")
    require_front_end(path)
    monkeypatch.setattr("inferloom.cache.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'inferloom\[compile,onnx\]'"):
        require_front_end(path)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from inferloom.cli import main

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["inferloom", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    path = genai(packed=True).save(tmp_path / "m")
    options = ["--dtype", "fp32", "--max-tokens", "64", "--max-seqs", "8", "--json"]
    assert call("compile", str(path), "-o", str(tmp_path / "out"), *options) == 0
    assert json.loads(capsys.readouterr().out)["model"]["max_model_len"] == 64
    ids = np.arange(3, 30, dtype=np.int32)
    want = onnxruntime_logits(path, ids)
    with LLM(tmp_path / "out", threads=1) as llm:
        assert llm.manifest.model.vocab_size == VOCAB
        assert np.abs(llm.logits(ids.tolist()) - want).max() <= 1e-4 * want.std()
    path.write_bytes(b"broken")
    assert call("compile", str(path), "-o", str(tmp_path / "other")) == 1
    shown = capsys.readouterr()
    assert "is not an ONNX model" in shown.err and "Traceback" not in shown.err
