"""The demo model in few bits: near the model in full precision, reproducible, and said so in the manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferloom
from inferloom.benchmarks.cost import step_cost
from inferloom.cache import CompileOptions, compile_cached
from inferloom.compiler.build import BuildOptions
from inferloom.compiler.quantization.recipe import recipe
from inferloom.errors import UnsupportedError
from inferloom.runtime.llm import LLM
from inferloom.targets.chips import find
from inferloom.targets.select import target_for
from tests import zoo
from tests.compiler.test_build import contents
from tests.conftest import DEMO
from tests.test_cli import inferloom as run

#: Names, and how far logits may be from those of fp32, relative to their spread (root mean square).
NEAR = {"int8": 0.05, "int4": 0.35}
ALONE = {"int8-wo": 0.05, "int4-wo": 0.35, "fp8": 0.15}


@pytest.fixture(scope="module")
def exact(demo_fp32: Path) -> tuple[list[int], np.ndarray]:
    with LLM(demo_fp32, memory_bytes=300 * 2**20) as llm:
        ids = llm.encode(Path(__file__).read_text())[:300]
        return ids, llm.logits(ids)


@pytest.mark.parametrize("name", NEAR)
def test_logits_are_near_those_of_full_precision(request: pytest.FixtureRequest, name: str,
                                                 exact: tuple[list[int], np.ndarray]) -> None:
    ids, want = exact
    with LLM(request.getfixturevalue(f"demo_{name}"), memory_bytes=300 * 2**20) as llm:
        got = llm.logits(ids)
        assert np.sqrt(np.mean((got - want) ** 2)) <= NEAR[name] * want.std()
        counts = {"int8": 29} if name == "int8" else {"int4": 28, "int8": 1}
        assert llm.manifest.numerics["quantized_weights"] == counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_weights_alone(name: str, exact: tuple[list[int], np.ndarray]) -> None:
    ids, want = exact
    path = compile_cached(DEMO, CompileOptions(quant=name))
    with LLM(path, memory_bytes=300 * 2**20) as llm:
        got = llm.logits(ids)
        assert np.sqrt(np.mean((got - want) ** 2)) <= ALONE[name] * want.std()
        assert llm.manifest.numerics["quantized_weights"][name] >= 28


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    """A mixture of experts: near its own fp32, and a step reads the bytes of the experts that are chosen."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path / "model")
    limits: dict[str, Any] = {"max_tokens": 64, "max_seqs": 4}
    exact = inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", **limits)
    made = inferloom.compile(tmp_path / "model", quant="int8", out=tmp_path / "int8", **limits)
    logits, ids = [], [int(i) for i in np.random.default_rng(0).integers(3, 130, 50)]
    for path in (exact, made):
        with LLM(path, memory_bytes=64 * 2**20) as llm:
            logits.append(llm.logits(ids))
            counts = llm.manifest.numerics.get("quantized_weights", {})
    assert counts["int8-wo"] >= 4  # gate and up of two layers, down of two
    assert np.sqrt(np.mean((logits[1] - logits[0]) ** 2)) <= 0.2 * logits[0].std()  # other experts may be chosen
    reads = [[size for size, *_ in step_cost(path).experts] for path in (exact, made)]
    assert all(0.25 < few / many < 0.3 for many, few in zip(*reads, strict=True))


def test_weights_take_the_bytes_that_the_names_promise(demo_bf16: Path, demo_int8: Path, demo_int4: Path) -> None:
    sizes = []
    for path in (demo_bf16, demo_int8, demo_int4):
        with LLM(path, memory_bytes=300 * 2**20) as llm:
            sizes.append(llm.manifest.memory.weights)
    assert 0.5 < sizes[1] / sizes[0] < 0.52 and 0.31 < sizes[2] / sizes[0] < 0.34


def test_compiling_twice_gives_the_same_bytes(demo_int4: Path, tmp_path: Path) -> None:
    again = inferloom.compile(DEMO, quant="int4", out=tmp_path / "again")
    assert contents(again) == contents(demo_int4)


def test_what_a_chip_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="quantisation int8 is not supported for h100: compile without it"):
        inferloom.compile(DEMO, chip="h100", quant="int8", out=tmp_path / "a")
    target = target_for(find("x86-64-v3"), False)
    target.lowering = replace(target.lowering, quantized=frozenset({("int4", "int8")}))
    with pytest.raises(UnsupportedError, match="int4-wo is not supported for .*int4 weights with int8 activations"):
        BuildOptions(recipe=recipe("int4-wo")).check(target)
    with pytest.raises(UnsupportedError, match="no quantisation is called 'q4'"):
        inferloom.compile(DEMO, quant="q4", out=tmp_path / "a")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "demo")
    for arguments in (["compile", str(DEMO), "--quant", "int4-g64", "--quant-head", "none", "--out", out], ["inspect", out]):
        assert run(monkeypatch, *arguments) == 0
        assert "28 weights in int4-g64" in " ".join(capsys.readouterr().out.split())


def test_commands_that_compile_take_the_same_options(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint is compiled as they say; an artifact that was compiled otherwise is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    how = ("--quant", "int8", "--quant-head", "none", "--kv-dtype", "int8")
    assert run(monkeypatch, "run", str(tiny_checkpoint), "hello", "--max-tokens", "2", *how) == 0
    (made,) = (tmp_path / "inferloom" / "artifacts").glob("*/")
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["numerics"]["quantized_weights"] == {"int8": 8, "int8-wo": 1}  # four a layer; the embedding
    assert {layer["dtype"] for group in manifest["state"]["groups"] for layer in group["layers"]} == {"i8"}
    assert run(monkeypatch, "run", str(made), "hello", "--max-tokens", "2", *how) == 0
    capsys.readouterr()
    for command, more in (("run", ["hello"]), ("chat", []), ("bench", []), ("serve", [])):
        assert run(monkeypatch, command, str(made), *more, "--quant", "int4") == 1
        assert "with --quant int8, not int4: leave --quant out" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "run", str(made), "hello", "--quant-embedding", "int4") == 1
    assert "with --quant-embedding none" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "run", str(made), "hello", "--kv-dtype", "fp8") == 1
    assert "with --kv-dtype int8, not fp8" in " ".join(capsys.readouterr().err.split())
