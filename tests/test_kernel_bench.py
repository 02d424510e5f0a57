"""The benchmark of kernels: its arithmetic, and that it runs every kind of weight."""

from __future__ import annotations

import json

import pytest

from inferloom.benchmarks.cpu import kernels
from inferloom.targets.chips import find


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COPIES_BYTES", 1 << 16)
    peaks = {"bw_4k": 1.0, "bw_huge": 2.0, "fp32": 4.0, "bf16": 8.0, "int8": 8.0}
    monkeypatch.setattr(kernels, "ceilings", lambda threads: peaks)


def test_the_bound_is_the_longer_of_reading_and_computing(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--shape", "70x64", "--kind", "fp32", "--rows", "1", "16", "--threads", "1", "--json"])
    one, many = json.loads(capsys.readouterr().out)["results"]
    stored = 2 * 64 * 64 * 4  # two tiles of columns
    assert one["bound"] == pytest.approx(stored / 2e9) and one["bound_is"] == "reading"
    assert many["bound"] == pytest.approx(2 * 70 * 64 * 16 / 4e9) and many["bound_is"] == "computing"
    assert all(r["seconds"] > 0 and r["ratio"] == pytest.approx(r["bound"] / r["seconds"]) for r in (one, many))


@pytest.mark.parametrize("kinds", [
    ("fp32", "bf16", "int4", "fp8"), pytest.param(tuple(kernels.KINDS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_kinds_run(kinds: tuple[str, ...]) -> None:
    said: list[str] = []
    cases = [(kind, 128, 128) for kind in kinds]
    results = kernels.measure(cases, [1, 3], find("cpu"), 2, 1, said.append)  # type: ignore[arg-type]
    assert [(r.kind, r.rows) for r in results] == [(kind, rows) for kind in kinds for rows in (1, 3)]
    assert len(said) == len(results)
