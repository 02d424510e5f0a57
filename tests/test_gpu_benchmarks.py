"""The GPU benchmark without a GPU: what it builds, refuses and writes. Its sections: tests/interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inferloom.benchmarks.gpu import build, report, shapes
from inferloom.benchmarks.gpu.run import SECTIONS, refusal
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType
from inferloom.targets.chips import GpuChip, find
from inferloom.targets.triton import configs
from inferloom.targets.triton.configs import AttentionConfig, MatmulConfig

RUN = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"
JOB = replace(shapes.FULL, models=(), linears=(shapes.Linear(256, 1024),), heads=(shapes.Heads(8, 2, 64),), variants=1)


def chip() -> GpuChip:
    found = find("h100")
    assert isinstance(found, GpuChip)
    return found


def us(p50: float) -> dict[str, float]:
    return {"p10": p50 * 0.9, "p50": p50, "p90": p50 * 1.1}


def test_build_is_reproducible(tmp_path: Path) -> None:
    one, two = (build.build("h100", tmp_path / name, JOB, lambda text: None) for name in "ab")
    names = sorted(str(f.relative_to(one)) for f in one.rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(two)) for f in two.rglob("*") if f.is_file())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    made = json.loads((one / "sets.json").read_text())
    assert {s["op"] for s in made["sets"]} == {"matmul", "decode", "prefill"} and not made["rejected"]
    assert all((one / k["file"]).is_file() for s in made["sets"] for k in s["kernels"])


def test_build_wants_an_nvidia_gpu(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mi300x is not an NVIDIA GPU"):
        build.build("mi300x", tmp_path, JOB)


def test_every_variant_fits_the_chip() -> None:
    for shape in shapes.FULL.linears:
        made = list(shapes.matmuls(chip(), shape, 99))
        assert len(made) == len(set(made)) > 12
        assert all(c.shared(2) <= chip().shared for _, _, c in made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_run_refuses_without_a_gpu(tmp_path: Path) -> None:
    built = build.build("h100", tmp_path, replace(JOB, linears=(), heads=()), lambda text: None)
    done = subprocess.run([sys.executable, str(RUN), "--built", str(built)], capture_output=True, text=True, check=False,
                          cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "run.py: there is no GPU here (torch finds no CUDA device)\n"
    assert "build --chip h200 --out" in refusal(tmp_path / "h200", list(SECTIONS))
    assert "no section is called 'nope'" in refusal(built, ["nope"])


def test_report_rates_against_ceilings_and_peers() -> None:
    cases = [{"section": "ceilings", "name": "copy", "us": us(1000), "bytes": 3_000_000_000},
             {"section": "ceilings", "name": "matmul", "us": us(2), "flops": 1_600_000_000},
             {"section": "matmul", "name": "m1", "parameters": {}, "us": us(10), "bytes": 24_000_000, "flops": 24_000_000,
              "peers": {"a": {"us": us(12)}, "b": {"us": us(8)}, "c": {"skipped": "why"}}}]
    ceilings = report.rates(cases)
    assert ceilings == {"copy_gbps": 3000.0, "matmul_tflops": 800.0}
    assert cases[2]["of_copy_gbps"] == pytest.approx(0.8) and cases[2]["of_peer"] == pytest.approx(0.8)
    made = {"ceilings": ceilings, "cases": cases, "failures": [{"section": "s", "name": "n", "why": "w"}], "skipped": []}
    text = report.summary(made)
    assert "80% of copy" in text and "FAILED s n: w" in text and "3 cases, 1 failures, 0 skipped" in text


def test_a_case_that_never_ended_is_a_failure(tmp_path: Path) -> None:
    lines = [{"kind": "start", "name": "a"}, {"kind": "case", "name": "a", "error": {"ok": False, "max": 9}},
             {"kind": "start", "name": "b"}, {"kind": "skip", "name": "c", "why": "out of time"}]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = report.collect([tmp_path / "kernels.jsonl"])
    assert [f["name"] for f in made["failures"]] == ["b", "a"] and "died" in made["failures"][0]["why"]
    assert made["skipped"] == [{"section": "kernels", "name": "c", "why": "out of time"}]


def test_tuned_files_are_what_the_compiler_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, fast = MatmulConfig(16, 32, 64, 4, 3), MatmulConfig(16, 64, 128, 8, 4)
    decode = AttentionConfig(16, 128, 8, 2, splits=7)

    def case(name: str, parameters: dict[str, object], *times: tuple[MatmulConfig | AttentionConfig, float]) -> report.Case:
        return {"name": name, "parameters": parameters, "candidates": [
            {"name": str(c), "config": build.changed(c), "hash": "", "us": us(t)} for c, t in times]}

    rows = {"n": 4096, "k": 4096, "rows": [1, 16]}
    entries = report.tuned([
        case("m1", rows | {"m": 1}, (matmul, 4.0), (fast, 5.0)), case("m16", rows | {"m": 16}, (matmul, 9.0), (fast, 6.0)),
        case("d", {"op": "decode", "heads": [32, 8, 128]}, (decode, 3.0))])
    assert [e["op"] for e in entries] == ["matmul", "decode"] and len(entries[0]["top"]) == 2
    report.write_tuned(tmp_path / "h100.json", entries, {"name": "a GPU"})
    report.write_tuned(tmp_path / "h100.json", [], {"name": "a GPU"})
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    configs._tuned.cache_clear()
    try:
        assert configs.matmul(chip(), DType.BF16, 4096, 4096, 1, 16)[0] == fast
        assert configs.decode(chip(), DType.BF16, 4, 4, 8, 128, 128)[0] == decode
    finally:
        configs._tuned.cache_clear()
