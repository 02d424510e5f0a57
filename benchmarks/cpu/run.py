"""Rounds over all systems, one process each, side by side; every process's outcome is a JSON line, written as it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferloom.benchmarks.cost import step_cost
from inferloom.benchmarks.cpu import prepare
from inferloom.benchmarks.cpu.checkpoints import operations
from inferloom.benchmarks.cpu.job import weights
from inferloom.benchmarks.cpu.systems import HERE, LONG, MANY, OURS, STREAM, SYSTEMS, Process
from inferloom.benchmarks.machine import probe
from inferloom.errors import InferloomError

#: Seconds that a process is thought to take while none like it has been seen.
GUESS = 60.0
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One process of one round."""

    model: str
    precision: str
    system: str
    process: Process
    round: int

    @property
    def kind(self) -> str:
        return f"{self.model} {self.precision} {self.system} {'+'.join(self.process.metrics)}"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.round}"


def jobs(models: Sequence[str], systems: Sequence[str], precisions: Sequence[str], rounds: int, only: str = "") -> list[Job]:
    """In the order of a run: all of the first round before the second, single streams before many requests.

    Systems of one precision follow each other, so that what is compared lies close in time. Many requests and long
    contexts take long, and int4 of these is not asked for: the first shape's come after the first round of single streams,
    the others' after the second one, and later rounds of all after the last one.
    """
    made: list[tuple[tuple[int, ...], Job]] = []
    for number in range(rounds):
        for m, model in enumerate(models):
            for p, precision in enumerate(precisions):
                for s, name in enumerate(systems):
                    if precision not in SYSTEMS[name].formats:
                        continue
                    for process in SYSTEMS[name].processes:
                        slow = process.metrics in (MANY, LONG)
                        if slow and precision == "int4" or len(process.metrics) > len(STREAM) and number:
                            continue
                        stage = number if not slow else rounds if number else 0 if process.metrics == LONG or not m else 1
                        order = (stage, slow, process.metrics == LONG, number, m, p, s)
                        made.append((order, Job(model, precision, name, process, number)))
    return [job for _, job in sorted(made, key=lambda entry: entry[0]) if re.search(only, job.key)]


def run(root: Path, out: Path, wanted: Sequence[Job], threads: int, wrap: Sequence[str] = (), minutes: float | None = None,
        progress: Callable[[str], None] = print) -> None:
    """Run the jobs that `out` does not have yet, each as `wrap` plus its command, until `minutes` are over."""
    end = None if minutes is None else time.monotonic() + minutes * 60
    out.parent.mkdir(parents=True, exist_ok=True)
    log = Log(out)
    places = Places(root, progress)
    for job in wanted:
        if log.done(job):
            continue
        if end is not None and time.monotonic() + log.seconds(job) > end:
            progress(f"{job.key}: no time for it")
            continue
        try:
            spec, facts = places.spec(job, threads)
        except InferloomError as error:
            log.add(job, {"missing": str(error)})
            progress(f"{job.key}: {error}")
            continue
        command = [*wrap, sys.executable, "-m", "inferloom.benchmarks.cpu.job", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            outcome = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            outcome = {"lines": [], "status": done.returncode or 1, "said": (done.stdout + done.stderr)[-1500:], "seconds": 0}
        log.add(job, facts | outcome)
        progress(f"{job.key}: {said(outcome)}")


def said(outcome: dict[str, Any]) -> str:
    values = ", ".join(f"{line['metric']} {line['value']:.4g} {line['unit']}" for line in outcome["lines"])
    others = max((line.get("others", 0.0) for line in outcome["lines"]), default=0.0)
    failure = f" FAILED ({outcome['status']}): {outcome['said'][-200:]}" if outcome["status"] else ""
    return f"{values}; {outcome['seconds']} s, others {others:.0%}{failure}"


class Log:
    """The JSON lines of a run: what was done, how often it was tried, how long it took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: set[str] = set()
        self._tries: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        for other in path.parent.parent.glob(f"*/{path.name}"):  # earlier runs tell how long things take, no more
            self._seconds |= {line["kind"]: line["seconds"] for line in read(other) if line.get("status") == 0}
        for line in read(path):
            self._note(line)

    def done(self, job: Job) -> bool:
        return job.key in self._done or self._tries.get(job.key, 0) >= ATTEMPTS

    def seconds(self, job: Job) -> float:
        return self._seconds.get(job.kind, GUESS)

    def add(self, job: Job, outcome: dict[str, Any]) -> None:
        line = {"key": job.key, "kind": job.kind, "model": job.model, "precision": job.precision, "system": job.system,
                "round": job.round, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **outcome}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        if "missing" in line:
            return
        self._tries[line["key"]] = self._tries.get(line["key"], 0) + 1
        if line["status"] == 0:
            self._done.add(line["key"])
            self._seconds[line["kind"]] = line["seconds"]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run; one that was cut off by a stop is left out."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class Places:
    """Where each system finds what it runs, made or checked on first use."""

    def __init__(self, root: Path, progress: Callable[[str], None]) -> None:
        self._root, self._progress = root, progress
        self._ours: dict[tuple[str, str], Path | InferloomError] = {}

    def spec(self, job: Job, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What job.py is told, and facts for the report. InferloomError where something is not there."""
        system = SYSTEMS[job.system]
        if job.system == OURS:
            path, python = self._artifact(job.model, job.precision), sys.executable
        else:
            path = prepare.place(self._root, system.formats[job.precision], job.model)
            python = str(prepare.environment_of(self._root, system) / "bin" / "python")
            if not prepare.installed(self._root, system):
                raise InferloomError("not installed: run the step `prepare`")
            if not path.exists():
                raise InferloomError(f"{path} is missing: run the step `prepare`")
        command = [python, str(HERE / "process.py"), "--engine", system.engine, "--model", str(path), "--metrics",
                   ",".join(job.process.metrics), "--threads", str(threads), "--options", json.dumps(job.process.options),
                   "--probe", str(probe())]
        files = weights(path)
        per_token, per_row = operations(self._root / "models" / job.model)
        facts = {"format": system.formats[job.precision].name, "flops_per_token": per_token, "flops_per_row": per_row,
                 "weight_bytes": sum(p.stat().st_size for p in files), "threads": threads}
        if job.system == OURS:
            facts |= _artifact_facts(path)
        spec = {"command": command, "environment": system.environment, "files": [str(p) for p in files], "threads": threads}
        return spec, facts

    def _artifact(self, model: str, precision: str) -> Path:
        """Compiled once in a run; what failed is not tried again."""
        at = (model, precision)
        if at not in self._ours:
            try:
                self._ours[at] = prepare.ours(self._root, model, precision, self._progress)
            except InferloomError as error:
                self._ours[at] = error
        found = self._ours[at]
        if isinstance(found, InferloomError):
            raise found
        return found


def _artifact_facts(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_text())
    state = manifest["state"]
    return {"weight_bytes": round(step_cost(path).bytes_of(1)), "chip": manifest["chip"]["name"],
            "state_bytes_per_token": state["bytes_per_block"] / state["block_tokens"]}


def choose(names: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """`names` if all are known. InferloomError else."""
    chosen, every = list(names), list(known)
    for name in chosen:
        if name not in every:
            raise InferloomError(f"no {what} is called {name!r}; choose from: {', '.join(every)}")
    return chosen
