"""Ceilings, this engine and its peers, side by side on this CPU (docs/cpu-benchmarks.md).

    python -m inferloom.benchmarks.cpu --root DIR                  prepare, run, report
    python -m inferloom.benchmarks.cpu run report --root DIR ...   some of these steps

All that is made lies below DIR. A run that was stopped goes on where it was; --name begins another one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from inferloom.benchmarks.cpu import report as reports
from inferloom.benchmarks.cpu import run as runs
from inferloom.benchmarks.cpu.checkpoints import SHAPES
from inferloom.benchmarks.cpu.prepare import prepare
from inferloom.benchmarks.cpu.score import Reference, score
from inferloom.benchmarks.cpu.systems import BEST, PRECISIONS, SYSTEMS
from inferloom.benchmarks.machine import describe
from inferloom.errors import InferloomError

STEPS = ("prepare", "run", "report")


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where something that was asked for could not be made or measured, or 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m inferloom.benchmarks.cpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; all, if none is named")
    parser.add_argument("--root", type=Path, required=True, help="folder for checkpoints, environments, formats, results")
    parser.add_argument("--models", default="qwen2.5-0.5b,llama-3.2-1b", help=", ".join(SHAPES))
    parser.add_argument("--systems", default=",".join(BEST), help=f"{', '.join(SYSTEMS)}, or all")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--only", default="", metavar="REGEX", help="of the lines of --list, those that it matches")
    parser.add_argument("--list", action="store_true", help="show the processes of a run, in order")
    parser.add_argument("--name", default="run", help="name of the run below DIR/results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="begin no process that would end later; the rest is left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--wrap", default="", metavar="COMMAND", help="a command to put before each measured process")
    parser.add_argument("--out", type=Path, help="folder for the report; DIR/results/NAME if not given")
    parser.add_argument("--readme", type=Path, help="file whose marked part the report fills")
    asked = parser.parse_args(arguments)
    try:
        return _steps(asked)
    except InferloomError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _steps(asked: argparse.Namespace) -> int:
    steps = runs.choose(asked.steps or STEPS, STEPS, "step")
    models = runs.choose(asked.models.split(","), SHAPES, "model")
    systems = runs.choose(SYSTEMS if asked.systems == "all" else asked.systems.split(","), SYSTEMS, "system")
    precisions = runs.choose(asked.precisions.split(","), PRECISIONS, "precision")
    wanted = runs.jobs(models, systems, precisions, asked.rounds, asked.only)
    if asked.list:
        print("\n".join(job.key for job in wanted))
        return 0
    root = asked.root.resolve()
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    folder = root / "results" / asked.name
    lines = folder / "lines.jsonl"
    failed: list[str] = []
    if "prepare" in steps:
        failed += prepare(root, models, systems, precisions, _say)
    if "run" in steps:
        runs.run(root, lines, wanted, asked.threads, shlex.split(asked.wrap), asked.minutes, _say)
    if "report" in steps:
        made = report(root, lines, asked.threads)
        reports.write(made, asked.out or folder)
        print(reports.markdown(made))
        failed += made["missing"]
        if asked.readme:
            reports.fill(asked.readme, reports.short(made, str(asked.out or folder)))
    return 1 if failed else 0


def report(root: Path, lines: Path, threads: int) -> dict[str, Any]:
    """The report of a run's lines, tokens scored; scores are kept beside the lines. InferloomError without lines."""
    every = list(runs.read(lines))
    if not every:
        raise InferloomError(f"{lines} holds nothing: run the step `run`")
    kept = lines.with_name("scores.json")
    scores: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for model in dict.fromkeys(line["model"] for line in every):
        new = [line for line in every if line["model"] == model and line["kind"] not in scores
               and any("made" in measured for measured in line.get("lines", ()))]
        if new:
            _say(f"scoring the tokens of {model}")
            scores |= score(new, Reference(root / "models" / model, threads))
            kept.write_text(json.dumps(scores, indent=1))
    return {"machine": describe(), "threads": threads, "date": every[-1]["time"][:10],
            "versions": {"inferloom": _version()}, **reports.summarize(every, scores), "scores": scores}


def _version() -> str:
    from inferloom import __version__

    return __version__


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
