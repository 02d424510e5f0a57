"""The benchmarks that start servers of their own measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inferloom.benchmarks.serve import agents, overhead

pytestmark = pytest.mark.slow


def test_agents_whose_state_waits_compute_less_again(demo_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "agents.json"
    monkeypatch.setattr("sys.argv", ["agents", str(demo_bf16), "--memory", "44MiB", "--ram", "8MiB", "--agents", "30", "--turns",
                                     "4", "--speed", "20", "--scale", "0.3", "--out", str(out)])
    agents.main()
    made = json.loads(out.read_text())
    assert made["with"]["answers"] == made["without"]["answers"] == 120 and not made["with"]["errors"]
    assert made["with"]["recomputed_tokens"] * 3 < made["without"]["recomputed_tokens"]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_http_costs(demo_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "overhead.json"
    monkeypatch.setattr("sys.argv", ["overhead", str(demo_bf16), "--streams", "4", "--prompt", "8", "--tokens", "8", "--rounds",
                                     "2", "--out", str(out)])
    overhead.main()
    rates = json.loads(out.read_text())["tokens_per_second"]
    assert all(len(each) == 2 and min(each) > 0 for each in rates.values())
