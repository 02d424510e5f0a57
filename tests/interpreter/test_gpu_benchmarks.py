"""The sections of the GPU benchmark on a mocked driver: data, arguments, references and reports, without times."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inferloom.benchmarks.gpu import attention, build, endtoend, first_token, model, products, report, session, shapes
from inferloom.runtime.device.launcher import Launch
from tests.interpreter.driver import interpreted
from tests.runtime.toy_gpu import Mock, mock

TINY = shapes.Model("tiny", "LlamaConfig", shapes.LLAMA_1B.arguments | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 512})
JOB = replace(shapes.FULL, models=(TINY,), linears=(shapes.Linear(96, 544),), heads=(shapes.Heads(4, 2, 64),), variants=1,
              limits={"max_tokens": 64, "max_seqs": 16, "max_model_len": 256, "block_tokens": 32})


class MockedGpu(session.Gpu):
    """A GPU whose work is done and never timed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._functions = folder, {}
        self.launcher = session.Launcher((folder / build.KERNELS_FILE).read_bytes(), "kernels.so", "cuda", 0)
        # The driver knows only memory of its own, and here torch's tensors are the GPU's.
        self.launcher.upload = self.launcher.download = ctypes.memmove  # type: ignore[method-assign,assignment]

    def time(self, launches: Sequence[Launch], dims: Sequence[int], per: int, seconds: float = 0.05) -> dict[str, float]:
        self.run(launches[:4], dims)
        return session.quantiles([2.0])

    def time_torch(self, calls: Sequence[Callable[[], Any]], graph: bool = True, seconds: float = 0.05) -> dict[str, float]:
        calls[0]()
        return session.quantiles([1.0])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build("h100", tmp_path_factory.mktemp("built"), JOB, lambda text: None)


@pytest.fixture
def gpu(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MockedGpu:
    for module in (session, products, attention, endtoend, model):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(session, "ROTATE", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 << 30, 16 << 30))
    driver: Mock = mock("cuda")
    sources = [built / "kernels" / "kernels.py", *sorted(built.glob("models/*/kernels/kernels.py"))]
    kernels: dict[str, Callable[..., None]] = {}
    for number, source in enumerate(sources):
        (folder := tmp_path / str(number)).mkdir()
        kernels |= interpreted(source.read_text(), folder)
    driver.run(kernels)
    made = MockedGpu(built)
    yield made
    assert not driver.errors, driver.errors


def run(section: Callable[..., None], gpu: MockedGpu, folder: Path, quick: bool = False) -> dict[str, list[dict[str, Any]]]:
    sets = json.loads((gpu.folder / "sets.json").read_text())["sets"]
    section(gpu, session.Recorder(folder / "lines.jsonl", 600, quick), sets)
    made = report.collect([folder / "lines.jsonl"])
    assert made["cases"] and not made["failures"], made["failures"]
    return made


def test_matmul(gpu: MockedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "ROWS", (1, 40, 70, 300))
    made = run(products.matmul, gpu, tmp_path)
    assert [c["parameters"]["m"] for c in made["cases"]] == [1, 40, 70, 300]
    assert all("us" in c["peers"]["cublas"] for c in made["cases"])
    assert sum(len(c["candidates"]) for c in made["cases"]) > len(made["cases"])
    entries = report.tuned(made["cases"])
    assert {(e["op"], e["n"], e["k"], e["dtype"]) for e in entries} == {("matmul", 96, 544, "bf16")} and len(entries) == 4


def test_attention(gpu: MockedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DECODE", ((1, 70), (3, 200)))
    monkeypatch.setattr(attention, "PREFILL", ((70, 0), (33, 60)))
    made = run(attention.attention, gpu, tmp_path)
    assert [c["name"] for c in made["cases"]] == ["decode-4-2-64-1x70", "decode-4-2-64-3x200", "prefill-4-2-64-70x0",
                                                  "prefill-4-2-64-33x60"]
    assert {e["op"] for e in report.tuned(made["cases"])} == {"decode", "prefill"}


def test_a_wrong_kernel_is_a_failure(gpu: MockedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "ROWS", (4,))
    monkeypatch.setattr(gpu, "run", lambda launches, dims: None)
    products.matmul(gpu, session.Recorder(tmp_path / "lines.jsonl", 600), json.loads(
        (gpu.folder / "sets.json").read_text())["sets"])
    assert "wrong result" in report.collect([tmp_path / "lines.jsonl"])["failures"][0]["why"]


def test_kernels_of_a_model(gpu: MockedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endtoend, "BATCHES", {"mixed": ((1, 9, 3), (70, 9, 9))})
    monkeypatch.setattr(endtoend, "TIMED", (1, 8))
    made = run(endtoend.kernels, gpu, tmp_path)
    assert [c["name"] for c in made["cases"]] == ["tiny-mixed", "tiny-times-1", "tiny-times-8"]
    checked = {k["symbol"] for k in made["cases"][0]["kernels"]}
    assert {k["symbol"] for k in made["cases"][1]["kernels"]} == checked | {"sampling"} and len(checked) > 5


def test_models(gpu: MockedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endtoend, "LOADS", ((2, 20, 6),))
    monkeypatch.setattr(endtoend, "CHUNKS", (20, 12, 1, 1))
    made = run(endtoend.models, gpu, tmp_path)
    assert [c["name"] for c in made["cases"]] == ["tiny-logits", "tiny-2x20+6"]
    assert made["cases"][0]["error"]["same_choice"] > 0.8
    load = made["cases"][1]
    assert load["launches"] > 10 and load["tokens_per_s"] > 0 and load["bytes"] > 100_000


def test_first_token(gpu: MockedGpu) -> None:
    made = first_token.main(gpu.folder / "models" / "tiny")
    assert list(made) == ["import", "make_file", "open", "kernels", "memory", "weights", "first_token"]
