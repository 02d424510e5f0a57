"""The benchmark of kernels: its arithmetic, and that it runs every kind of weight."""

from __future__ import annotations

import json

import pytest

from inferloom.benchmarks.cpu import kernels
from inferloom.targets.chips import find


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COPIES_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "ceilings", lambda threads: {"bw_4k": 1.0, "bw_huge": 2.0, "fp32": 4.0, "bf16": 8.0})


def test_the_bound_is_the_longer_of_reading_and_computing(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--shape", "70x64", "--kind", "fp32", "--rows", "1", "16", "--threads", "1", "--json"])
    one, many = json.loads(capsys.readouterr().out)["results"]
    stored = 2 * 64 * 64 * 4  # two tiles of columns
    assert one["bound"] == pytest.approx(stored / 2e9) and one["bound_is"] == "reading"
    assert many["bound"] == pytest.approx(2 * 70 * 64 * 16 / 4e9) and many["bound_is"] == "computing"
    assert all(r["seconds"] > 0 and r["ratio"] == pytest.approx(r["bound"] / r["seconds"]) for r in (one, many))


def test_every_kind_runs() -> None:
    said: list[str] = []
    cases = [(kind, 128, 64) for kind in kernels.KINDS]
    results = kernels.measure(cases, [1, 3], find("cpu"), 2, 1, said.append)  # type: ignore[arg-type]
    assert [(r.kind, r.rows) for r in results] == [(kind, rows) for kind in kernels.KINDS for rows in (1, 3)]
    assert len(said) == len(results)
