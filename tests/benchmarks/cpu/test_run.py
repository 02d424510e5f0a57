"""Order, resuming and failures of a run, with engines that only pretend."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from inferloom.benchmarks.cpu import job as jobs
from inferloom.benchmarks.cpu import prepare, process, run
from inferloom.benchmarks.cpu.__main__ import main
from inferloom.benchmarks.cpu.systems import (
    HERE,
    LONG,
    MANY,
    OURS,
    PRECISIONS,
    STREAM,
    SYSTEMS,
    Format,
    Process,
    System,
)
from inferloom.errors import InferloomError

SHAPE = "qwen2.5-0.5b"
CEILINGS = {"bw_4k": 1.0, "bw_huge": 1.0, "fp32": 1.0}


class Fake:
    """Gives each prompt its own last token, again and again."""

    version = "fake 1"

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return [[p[-1]] * new for p in prompts]

    def decode_at(self, context: int, batch: int, steps: int) -> float:
        return float(context + batch + steps)


def wanted(*names: str, rounds: int = 1) -> list[run.Job]:
    return run.jobs([SHAPE], names, ["bf16"], rounds)


def test_rounds_are_interleaved() -> None:
    made = run.jobs([SHAPE, "llama-3.2-1b"], [OURS, "llama.cpp", "vllm"], PRECISIONS, 2)
    assert len({j.key for j in made}) == len(made)
    first = [(j.model, j.precision, j.system) for j in made if j.process.metrics != MANY and j.process.metrics != LONG][:4]
    assert first == [(SHAPE, "bf16", OURS), (SHAPE, "bf16", "llama.cpp"), (SHAPE, "bf16", "vllm"), (SHAPE, "int8", OURS)]
    streams = [j for j in made if "decode_1" in j.process.metrics]
    assert [j.round for j in streams] == sorted(j.round for j in streams)
    many = [(j.model, j.round, made.index(j) > made.index(streams[-1])) for j in made if j.process.metrics == MANY]
    assert many[0] == (SHAPE, 0, False) and many[-1] == ("llama-3.2-1b", 1, True)
    assert not [j for j in made if j.precision == "int4" and j.process.metrics in (MANY, LONG)]
    assert {j.round for j in made if j.system == "vllm"} == {0}  # it takes a minute to start
    assert run.jobs([SHAPE], [OURS], ["bf16"], 1, only="requests")[0].process.metrics == MANY


def test_each_metric_is_measured() -> None:
    lines = {line["metric"]: line for line in process.measure(Fake(), [*STREAM, *MANY, *LONG])}
    assert set(lines) == {"load", "rss", "decode_1", "prefill_512", "requests_16", "context_8192"}
    assert 0 < lines["load"]["value"] and lines["load"]["version"] == "fake 1" and lines["rss"]["value"] > 1 << 20
    assert lines["context_8192"]["value"] == 8192 + process.LONG_BATCH + process.LONG_NEW
    prompt, new = lines["requests_16"]["made"][0]
    assert len(lines["requests_16"]["made"]) == process.KEPT_REQUESTS and new == [prompt[-1]] * process.KEPT_TOKENS
    again = {line["metric"]: line for line in process.measure(Fake(), [*STREAM, *MANY])}
    assert again["decode_1"]["made"] == lines["decode_1"]["made"]  # every engine gets the same prompts


def test_ceilings_are_measured_around_each_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SETTLED", 0)
    program = tmp_path / "probe"
    program.write_text(f"""#!/bin/sh\necho "$@" >> {tmp_path}/calls; echo "{{\\"bw_huge\\": $(wc -l < {tmp_path}/calls)}}"\n""")
    program.chmod(0o755)
    lines = list(process.measure(Fake(), ["load", "decode_1", "prefill_512"], partial(process.ceilings, str(program), 3)))
    assert [line.get("ceilings") for line in lines] == [None, None, {"bw_huge": 1.5}, {"bw_huge": 3.5}]
    assert set((tmp_path / "calls").read_text().split("\n")) == {"quick 3", ""}


def test_an_engine_that_stops_early_is_refused() -> None:
    class Short(Fake):
        def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
            return [ids[:20] for ids in super().generate(prompts, new)]

    with pytest.raises(ValueError, match="1 requests for 32 tokens gave"):
        list(process.measure(Short(), ["decode_1"]))


def test_a_job_reads_what_the_process_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs, "ceilings", lambda threads: CEILINGS)
    weights = tmp_path / "weights"
    weights.write_bytes(b"w")
    program = f"""print('noise'); print('{process.MARK}{{"metric": "load"}}'); print('more')"""
    spec: dict[str, Any] = {"command": [sys.executable, "-c", program], "environment": {}, "files": [str(weights)], "threads": 3}
    made = jobs.job(spec)
    assert made["lines"] == [{"metric": "load"}] and made["status"] == 0 and made["before"] == CEILINGS and made["said"] == ""
    made = jobs.job(spec | {"command": [sys.executable, "-c", "raise SystemExit('broken here')"]})
    assert made["lines"] == [] and made["status"] == 1 and "broken here" in made["said"]
    monkeypatch.setattr(jobs, "SECONDS", 2)
    late = jobs.job(spec | {"command": [sys.executable, "-uc", program + "; import time; time.sleep(60)"]})
    assert late["status"] == 124 and late["said"] == "noise\nmore\nstopped after 2 s"


def test_the_process_needs_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by its path in an interpreter that sees no packages, it comes as far as the engine that is not there."""
    monkeypatch.setattr(jobs, "ceilings", lambda threads: CEILINGS)
    command = [sys.executable, "-I", "-S", str(HERE / "process.py"), "--engine", "none", "--model", "m", "--metrics", "load",
               "--threads", "1"]
    spec = {"command": command, "environment": {}, "files": [], "threads": 1}
    made = jobs.job(spec)
    assert made["status"] == 1 and "inferloom.benchmarks.cpu.engines.none" in made["said"]


class Places:
    """Commands that print a value, or fail."""

    def __init__(self, program: str) -> None:
        self.program = program

    def spec(self, job: run.Job, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if job.system == "openvino":
            raise InferloomError("not installed")
        return {"program": self.program}, {"format": "f"}


def started(monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Any]) -> list[list[str]]:
    """Puts `outcome` in the place of each process; returns the commands that were run."""
    commands: list[list[str]] = []

    def pretend(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return type("Done", (), {"stdout": json.dumps(outcome), "stderr": "", "returncode": 0})

    monkeypatch.setattr(run, "Places", lambda root, progress: Places("p"))
    monkeypatch.setattr(run.subprocess, "run", pretend)
    return commands


GOOD = {"lines": [{"metric": "load", "value": 1.0, "unit": "s", "others": 0.01}], "status": 0, "said": "", "seconds": 7.0}
BAD = {"lines": [], "status": 1, "said": "broken", "seconds": 7.0}


def test_a_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, said = tmp_path / "results" / "lines.jsonl", []
    commands = started(monkeypatch, GOOD)
    every = wanted(OURS, "llama.cpp", rounds=2)
    run.run(tmp_path, out, every[:3], 2, ["quiet", "-x"], progress=said.append)
    assert len(commands) == 3 and commands[0][:2] == ["quiet", "-x"] and json.loads(commands[0][-1]) == {"program": "p"}
    out.write_text(out.read_text() + '{"key": "cut o')
    with out.open("a") as file:
        file.write("\n")
    run.run(tmp_path, out, every, 2, progress=said.append)
    lines = list(run.read(out))
    assert len(commands) == len(every) and [line["key"] for line in lines] == [j.key for j in every]
    assert lines[0]["round"] == 0 and lines[0]["system"] == OURS and "load 1 s; 7.0 s, others 1%" in said[0]


def test_a_failure_is_tried_again_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, said = tmp_path / "lines.jsonl", []
    commands = started(monkeypatch, BAD)
    for _ in range(3):
        run.run(tmp_path, out, wanted("llama.cpp")[:1], 2, progress=said.append)
    assert len(commands) == run.ATTEMPTS and "FAILED (1): broken" in said[0]


def test_what_is_not_there_is_said_and_tried_once_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, said = tmp_path / "lines.jsonl", []
    commands = started(monkeypatch, GOOD)
    run.run(tmp_path, out, wanted("openvino")[:1], 2, progress=said.append)
    assert not commands and next(iter(run.read(out)))["missing"] == "not installed" and "not installed" in said[0]
    assert not run.Log(out).done(wanted("openvino")[0])


def test_a_run_ends_in_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process is thought to take as long as the last one like it, or a minute."""
    out, said = tmp_path / "lines.jsonl", []
    commands = started(monkeypatch, GOOD)
    every = wanted("llama.cpp", rounds=2)
    run.run(tmp_path, out, every[:1], 2, progress=said.append)
    run.run(tmp_path, out, every, 2, minutes=0.5, progress=said.append)
    assert len(commands) == 2 and sum("no time" in text for text in said) == 2
    other = tmp_path / "another" / "lines.jsonl"
    assert run.Log(other).seconds(every[0]) == run.GUESS
    (tmp_path / "earlier").mkdir()
    out.rename(tmp_path / "earlier" / "lines.jsonl")
    assert run.Log(other).seconds(every[0]) == 7.0 and not run.Log(other).done(every[0])


def test_garbage_from_a_process_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    started(monkeypatch, GOOD)
    killed = type("Done", (), {"stdout": "", "stderr": "killed", "returncode": -9})
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: killed)
    run.run(tmp_path, out, wanted("llama.cpp")[:1], 2, progress=lambda text: None)
    line = next(iter(run.read(out)))
    assert line["status"] == -9 and line["said"] == "killed" and line["system"] == "llama.cpp"


def test_peers_are_checked_before_they_are_run(tmp_path: Path) -> None:
    with pytest.raises(InferloomError, match="not installed: run the step `prepare`"):
        run.Places(tmp_path, print).spec(wanted("llama.cpp")[0], 2)
    folder = prepare.environment_of(tmp_path, SYSTEMS["llama.cpp"])
    folder.mkdir(parents=True)
    (folder / "installed.json").write_text(json.dumps(list(SYSTEMS["llama.cpp"].requirements)))
    with pytest.raises(InferloomError, match="BF16.gguf is missing: run the step `prepare`"):
        run.Places(tmp_path, print).spec(wanted("llama.cpp")[0], 2)
    (folder / "installed.json").write_text("[]")  # of an older table
    assert not prepare.installed(tmp_path, SYSTEMS["llama.cpp"])


def test_a_format_is_moved_into_place_when_it_is_whole(tmp_path: Path) -> None:
    copy = ("import sys, pathlib; t = pathlib.Path(sys.argv[2]); t.write_text(sys.argv[1]); "
            "sys.exit(3 if 'bad' in sys.argv[1] else 0)")
    system = System("peer", "e", {}, (Process(STREAM),))
    form = Format("f", "made/{model}-f", (sys.executable, "-c", copy, "{source} {model}", "{target}"))
    said: list[str] = []
    prepare.convert(tmp_path, system, form, "m", Path("good"), said.append)
    prepare.convert(tmp_path, system, form, "m", Path("bad"), said.append)  # is there already
    assert (tmp_path / "made" / "m-f").read_text() == "good m" and said == ["peer: m as f"]
    with pytest.raises(InferloomError, match="ended with 3; its output is in"):
        prepare.convert(tmp_path, system, form, "n", Path("bad"), said.append)
    assert not (tmp_path / "made" / "n-f").exists()
    prepare.convert(tmp_path, system, form, "n", Path("good"), said.append)
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["m-f", "n-f"]


def test_the_table_is_complete() -> None:
    for system in SYSTEMS.values():
        assert (HERE / "engines" / f"{system.engine}.py").is_file()
        assert system.name == OURS or system.requirements and all("==" in r for r in system.requirements)
        assert set(system.formats) <= set(PRECISIONS)
    script = HERE / "convert"
    commands = [form.command for system in SYSTEMS.values() for form in system.formats.values()]
    named = {part.rpartition("/")[2] for command in commands for part in command if "{here}" in part}
    assert all((script / name).is_file() for name in named) and "to_gguf.py" in named


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--root", str(tmp_path), "--list", "--only", "llama.cpp", "--rounds", "1", "--precisions", "int8"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{SHAPE} int8 llama.cpp load+decode_1+prefill_512 0"
    for wrong, said in ((["fly"], "no step is called 'fly'"), (["--models", "x"], "no model is called 'x'"),
                        (["--systems", "x"], "no system is called 'x'"), (["--precisions", "x"], "no precision is called"),
                        (["report"], "holds nothing: run the step `run`")):
        assert main([*wrong, "--root", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
