"""What is known of transformers' causal language models: which compile, for which chips, and why the others do not.

architectures.json is what `benchmarks/breadth.py` measured. `python -m inferloom.compiler.architectures docs/models.md`
writes the page from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("architectures.json")
MARKS = ("traces", "fp32", "cpu", "nvidia", "amd")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: `error` is its largest one on the CPU in fp32 (alone, in a batch, chunked), relative to the
    standard deviation of transformers' logits; `why` is the first reason for a no."""

    name: str
    traces: bool
    fp32: bool
    cpu: bool
    nvidia: bool
    amd: bool
    error: float | None
    state: tuple[str, ...]
    why: str


def document(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of breadth.py as one document; models that transformers itself cannot make small are left out."""
    made = [_entry(e) for e in sorted(entries, key=lambda e: str(e["name"])) if "class" in e]
    left = {str(e["name"]): str(e["model"]) for e in entries if "class" not in e}
    return {"transformers": version("transformers"), "architectures": [asdict(a) for a in made],
            "without_a_small_model": dict(sorted(left.items()))}


def _entry(entry: Mapping[str, Any]) -> Architecture:
    cpu, gpus = entry["cpu"], [entry["nvidia"], entry["amd"]]
    ran = "single" in cpu and "batched" in cpu
    compiled = [not e.get("why") for e in gpus]
    error = max(cpu["single"], cpu["batched"]) if ran else None
    why = next((e["why"] for e in (cpu, *gpus) if e.get("why")), "")
    return Architecture(entry["name"], ran or any(compiled), ran and not cpu.get("why"), ran, compiled[0], compiled[1], error,
                        tuple(cpu.get("state", ())), why)


def load() -> list[Architecture]:
    """All architectures, by name."""
    return [Architecture(**{**a, "state": tuple(a["state"])}) for a in json.loads(FILE.read_text())["architectures"]]


def render() -> str:
    """docs/models.md."""
    known, made_with = load(), json.loads(FILE.read_text())["transformers"]
    counts = ", ".join(f"{sum(getattr(a, mark) for a in known)} {text}" for mark, text in (
        ("traces", "trace"), ("fp32", "give transformers' logits in fp32 on the CPU"), ("nvidia", "compile for an H100"),
        ("amd", "compile for an MI300X")))
    lines = [
        "# Models", "",
        "<!-- Written by `python -m inferloom.compiler.architectures docs/models.md`. -->", "",
        f"Every architecture that transformers {made_with} loads as a causal language model, as a small random model in the",
        f"shape of its defaults: of {len(known)}, {counts}.",
        "`benchmarks/breadth.py` measures this; `inferloom models` prints it.", "",
        "fp32: the largest error of a logit against transformers, relative to the logits' standard deviation, of single",
        "sequences and of a ragged batch through chunked prefill and decode; a yes is at most 1e-3.", "",
        "| architecture | traces | fp32 | CPU | NVIDIA | AMD | state | why not |", "|" + " --- |" * 8]
    for a in known:
        error = f"{a.error:.0e}" if a.error is not None and a.fp32 else _mark(a.fp32)
        marks = [_mark(a.traces), error, *(_mark(x) for x in (a.cpu, a.nvidia, a.amd))]
        lines.append(f"| {a.name} | {' | '.join(marks)} | {', '.join(a.state)} | {_cell(a.why)} |")
    return "\n".join(lines) + "\n"


def _mark(yes: bool) -> str:
    return "yes" if yes else "no"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:200]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m inferloom.compiler.architectures")
    parser.add_argument("path", type=Path)
    parser.add_argument("--check", action="store_true", help="fail when the file is out of date")
    options = parser.parse_args(arguments)
    if not options.check:
        options.path.write_text(render())
    elif not options.path.is_file() or options.path.read_text() != render():
        print(f"{options.path} is out of date: run `python -m inferloom.compiler.architectures {options.path}`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
