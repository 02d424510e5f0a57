"""Timelines: phases and kernels of steps, as numbers and as a trace file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from inferloom.benchmarks.profile import profile, summary
from inferloom.cli import main
from inferloom.runtime.llm import LLM
from inferloom.runtime.manifest import Grid, Kernel
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.trace import PHASES, Timeline

KERNELS = [Kernel(name, "row", ("m.py:1",), Grid(0, 1, 1), None, {}) for name in ("a", "b", "a")]


def recorded() -> Timeline:
    """Two steps; phases take 1, 2, 3, ... microseconds."""
    ticks = iter(range(0, 10**9))
    now, step = [0], [0]

    def clock() -> int:
        step[0] = next(ticks)
        now[0] += 1000 * step[0]
        return now[0]

    line = Timeline(clock)
    for _ in range(2):
        line.begin()
        for phase in ("schedule", "batch", "inputs"):
            line.mark(phase)
        line.kernels(KERNELS, [400, 0, 600])
        for phase in ("sample", "outputs"):
            line.mark(phase)
    return line


def test_spans_follow_each_other(tmp_path: Path) -> None:
    line = recorded()
    phases = [s for s in line.spans if s.kernel is None and s.step == 1]
    assert [s.name for s in phases] == list(PHASES)
    assert all(a.start + a.ns == b.start for a, b in zip(phases, phases[1:], strict=False))
    first, second = (s for s in line.spans if s.kernel is not None and s.step == 1)
    begin = next(s.start for s in phases if s.name == "kernels")
    assert (first.start, first.ns, second.start, second.ns) == (begin, 400, begin + 400, 600)
    line.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shown = [e for e in events if e["ph"] == "X"]
    assert len(shown) == len(line.spans) and min(e["ts"] for e in shown) == 0
    assert {e["tid"] for e in shown if e["name"] == "a"} == {1} and shown[0]["args"] == {"step": 1}


def test_summary_sums_calls_and_takes_medians() -> None:
    made = summary(recorded())
    assert made["steps"] == 2 and list(made["phases"]) == list(PHASES)
    assert made["kernels"] == [{"kernel": "a", "kind": "row", "calls": 2, "us": 1.0}]
    assert made["python"] == pytest.approx(sum(t for name, t in made["phases"].items() if name != "kernels"))


def test_an_engine_is_traced_and_answers_the_same(tiny_artifact: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(tiny_artifact, threads=1) as llm:
        want = llm.generate([1, 2, 3], params)[0].outputs
        line = Timeline()
        llm.engine.trace(line)
        assert llm.generate([1, 2, 3], params)[0].outputs == want
        llm.engine.trace(None)
        count = len(line.spans)
        llm.generate([1, 2, 3], params)
        assert len(line.spans) == count and line.steps == 6
        for step in range(1, 7):
            spans = [s for s in line.spans if s.step == step]
            assert [s.name for s in spans if s.kernel is None] == list(PHASES)
            calls = [s for s in spans if s.kernel is not None]
            whole = next(s for s in spans if s.name == "kernels")
            assert len(calls) <= len(llm.manifest.plan) and 0 < sum(s.ns for s in calls) <= whole.ns


def test_profile_of_an_artifact(tiny_artifact: Path, tmp_path: Path) -> None:
    made = profile(tiny_artifact, 1, (1, 3), tmp_path / "t.json")
    assert [b["batch"] for b in made["batches"]] == [1, 3]
    assert all(b["steps"] > 50 and b["python"] > 0 and b["kernels"] for b in made["batches"])
    assert (tmp_path / "t.json").stat().st_size > 1000


def test_command_line(tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["inferloom", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    said = run("bench", str(tiny_artifact), "--profile", "--batches", "2", "--threads", "1")
    assert "batch 2" in said and all(phase in said for phase in PHASES) and "all but kernels" in said
    run("run", str(tiny_artifact), "abc", "--max-tokens", "2", "--trace", str(tmp_path / "run.json"))
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]
