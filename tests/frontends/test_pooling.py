"""Pooling as checkpoints say it: sentence-transformers' files, GGUF metadata, and options before both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferloom
from inferloom.cache import CompileOptions, content_key, resolve
from inferloom.cli import options
from inferloom.cli.inspect import _task
from inferloom.compiler.build import BuildOptions
from inferloom.compiler.frontends.pooling import check_pooling, gguf_pooling, read_pooling
from inferloom.errors import UsageError
from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.llm import LLM
from inferloom.targets.chips import find
from inferloom.targets.select import target_for

TYPE = "sentence_transformers.models."
OFF = {f"pooling_mode_{name}": False for name in (
    "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")}


def write(folder: Path, pooling: Any = None, more: tuple[str, ...] = ("Normalize",), path: str = "1_Pooling") -> Path:
    """The files that sentence-transformers writes beside a model."""
    kinds = ["Transformer", *(["Pooling"] if pooling is not None else []), *more]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": "" if i == 0 else path if kind == "Pooling" else f"{i}_{kind}", "type": TYPE + kind}
        for i, kind in enumerate(kinds)]))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(("config", "want"), [
    (OFF | {"pooling_mode_lasttoken": True, "word_embedding_dimension": 64, "include_prompt": True}, "last"),
    (OFF | {"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode": "lasttoken"}, "last"),
    ({"pooling_mode": "mean"}, "mean")])
def test_what_is_read(config: Any, want: str, tmp_path: Path) -> None:
    found = read_pooling(write(tmp_path, config))
    assert found is not None and check_pooling(found, None, None) == (want, True)
    assert check_pooling(found, "mean" if want == "last" else "last", False) == ("mean" if want == "last" else "last", False)
    assert check_pooling(read_pooling(write(tmp_path, config, ())), None, None) == (want, False)


@pytest.mark.parametrize(("config", "message"), [
    (OFF | {"pooling_mode_cls_token": True}, "1_Pooling/config.json: pooling 'cls' is not supported: the first token"),
    (OFF | {"pooling_mode_max_tokens": True}, "pooling 'max_tokens' is not supported; choose --pooling last or mean"),
    (OFF | {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "pooling 'mean_tokens and lasttoken' is not"),
    (OFF, "pooling 'none'"), ({"pooling_mode": ["mean", "cls"]}, "pooling 'mean and cls'")])
def test_what_cannot_be_pooled_is_refused_unless_an_option_says_otherwise(config: Any, message: str, tmp_path: Path) -> None:
    found = read_pooling(write(tmp_path, config))
    with pytest.raises(UnsupportedError, match=message):
        check_pooling(found, None, None)
    assert check_pooling(found, "mean", None) == ("mean", True)


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None and check_pooling(None, None, None) == ("last", True)
    with pytest.raises(UnsupportedError, match="after the model comes sentence_transformers.models.Dense"):
        read_pooling(write(tmp_path, {"pooling_mode": "mean"}, ("Dense", "Normalize")))
    for path in ("../1_Pooling", "/etc", "", "..", "a/b"):
        with pytest.raises(UnsupportedError, match="is a folder beside it"):
            read_pooling(write(tmp_path, {"pooling_mode": "mean"}, path=path))
    with pytest.raises(UnsupportedError, match="does not say how"):
        read_pooling(write(tmp_path, []))
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(UnsupportedError, match="config.json cannot be read"):
        read_pooling(tmp_path)
    assert read_pooling(write(tmp_path, None, ())) is None
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="not a list of modules"):
        read_pooling(tmp_path)


def test_gguf_metadata() -> None:
    def of(number: int | None) -> Any:
        return gguf_pooling({"general.architecture": "qwen3"} | ({} if number is None else {"qwen3.pooling_type": number}), "f")

    assert of(None) is None and of(0) is None
    assert [check_pooling(of(n), None, None) for n in (1, 3)] == [("mean", True), ("last", True)]
    for number, name in ((2, "cls"), (4, "rank"), (9, "number 9")):
        with pytest.raises(UnsupportedError, match=f"f: pooling '{name}'"):
            check_pooling(of(number), None, None)


def test_options_go_with_the_task() -> None:
    target = target_for(find("cpu"), False)
    with pytest.raises(UnsupportedError, match="go with --task embed"):
        BuildOptions(pooling="last").check(target)
    with pytest.raises(UnsupportedError, match="pooling 'max' is not supported; choose"):
        BuildOptions(task="embed", pooling="max").check(target)
    with pytest.raises(UsageError, match="go with --task embed"):
        options.compile_options("cpu", "bf16", None, normalize=False)
    with pytest.raises(UsageError, match="pooling 'cls' is not known"):
        options.compile_options("cpu", "bf16", None, task="embed", pooling="cls")


def test_an_artifact_keeps_it(tiny_checkpoint: Path, tiny_embed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    write(folder, OFF | {"pooling_mode_mean_tokens": True}, ())
    key = content_key(folder, CompileOptions(task="embed"))
    made = inferloom.compile(folder, dtype="fp32", out=tmp_path / "out", max_tokens=64, max_seqs=8, task="embed")
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["embedding"] == {"pooling": "mean", "normalize": False}
    assert _task(manifest) == "embed: the mean of all final hidden states, as long as it is"
    assert _task(json.loads((tiny_embed / "manifest.json").read_text())) == "embed: the last final hidden state, of length 1"
    with LLM(made, threads=1) as llm, LLM(tiny_embed, threads=1) as other:
        ids = list(range(40))
        assert np.array_equal(llm.embed(ids), other.embed(ids, "mean", normalize=False))
        assert np.array_equal(llm.embed(ids, "last", True), other.embed(ids))
    assert resolve(made, CompileOptions(task="embed", pooling="mean", normalize=False)) == made
    for wrong in (CompileOptions(task="embed", pooling="last"), CompileOptions(task="embed", normalize=True)):
        with pytest.raises(UsageError, match="is compiled already, with --(pooling mean|normalize False)"):
            resolve(made, wrong)
    write(folder, OFF | {"pooling_mode_lasttoken": True}, ())
    assert content_key(folder, CompileOptions(task="embed")) != key, "another pooling, another artifact"
