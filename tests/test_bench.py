"""The benchmark's arithmetic, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import inferloom
from inferloom.benchmarks import machine
from inferloom.benchmarks.bench import bench
from inferloom.benchmarks.cost import step_cost
from inferloom.errors import InferloomError
from tests import zoo


def test_step_cost_counts_matmuls(tiny_artifact: Path) -> None:
    """hidden 64, inner 96, 4 + 2 + 2 heads of 16, 2 layers, vocabulary 258, whose columns are padded to 320."""
    cost = step_cost(tiny_artifact)
    layer = 64 * 128 + 64 * 64 + 64 * 192 + 96 * 64
    assert cost.token_flops == {"fp32": 2 * 2 * layer} and cost.row_flops == {"fp32": 2 * 64 * 258}
    assert cost.bytes == 4 * (2 * layer + 64 * 320)
    assert cost.seconds(3, 2, {"fp32": 2.0}) == pytest.approx((3 * cost.flops_per_token + 2 * cost.flops_per_row) / 2e9)


def test_step_cost_counts_what_is_stored(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """int8: a byte a weight, padded to 64 columns, and a scale in f32 for each column."""
    path = inferloom.compile(tiny_checkpoint, quant="int8", quant_head="none", out=tmp_path / "int8", max_tokens=32, max_seqs=4)
    cost = step_cost(path)
    layer, columns = 64 * 128 + 64 * 64 + 64 * 192 + 96 * 64, 128 + 64 + 192 + 64
    assert cost.token_flops == {"int8": 2 * 2 * layer}
    assert cost.bytes == 2 * (layer + 4 * columns) + 2 * 64 * 320
    assert cost.seconds(1, 0, {"fp32": 1.0, "int8": 4.0}) == pytest.approx(cost.flops_per_token / 4e9)
    manifest = json.loads((path / "manifest.json").read_text())
    for kernel in manifest["kernels"]:
        kernel["resources"] = {}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InferloomError, match="compile it again"):
        step_cost(path)


def test_step_cost_counts_the_experts_that_are_chosen(tmp_path: Path) -> None:
    """hidden 64, 8 experts of 32 of which a token has 3; heads as above, two layers."""
    zoo.build("qwen3_moe").save_pretrained(tmp_path / "model")
    cost = step_cost(inferloom.compile(tmp_path / "model", dtype="fp32", out=tmp_path / "fp32", max_tokens=32, max_seqs=4))
    stored = 2 * 8 * 4 * (64 * 64 + 64 * 32)  # gate and up together, then down; fp32
    assert all(e[1:] == (8, 3) for e in cost.experts) and sum(size for size, _, _ in cost.experts) == stored
    assert cost.bytes_of(1) - cost.bytes == pytest.approx(3 / 8 * stored)
    assert cost.bytes_of(1000) - cost.bytes == pytest.approx(stored)


def test_bench_measures(tiny_artifact: Path) -> None:
    said: list[str] = []
    made = bench(tiny_artifact, threads=1, runs=1, batches=(1, 2), with_ceilings=False, progress=said.append)
    names = [m["name"] for m in made["metrics"]]
    assert names == ["load_to_first_token", "peak_rss", "decode_1", "decode_2", "prefill_255"]
    assert all(m["value"] > 0 and m["ratio"] is None for m in made["metrics"])
    assert len(said) == len(names) and json.loads(json.dumps(made))["threads"] == 1


def test_ceilings_are_plausible() -> None:
    got = machine.ceilings(1)
    assert 0.5 < got["bw_4k"] < 2000 and 1 < got["fp32"] < 5000


def test_a_missing_probe_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SOURCE", tmp_path / "gone.c")
    with pytest.raises(InferloomError, match="--no-ceilings"):
        machine.ceilings(1)
