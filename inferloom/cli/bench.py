"""`inferloom bench`: how fast an artifact is here, next to what this machine can do at most."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from inferloom.cache import resolve
from inferloom.cli import options
from inferloom.cli.console import emit, human_bytes, out, progress, set_json, table


def bench(
    model: options.Model,
    threads: options.Threads = None,
    runs: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 3,
    batches: Annotated[str, typer.Option(help="Batch sizes of the decode measurements.")] = "1,4,16",
    ceilings: Annotated[bool, typer.Option(help="Measure the machine's ceilings in the same run.")] = True,
    output: Annotated[Path | None, typer.Option("--out", "-o", show_default=False,
                                                help="Write the report here as JSON.")] = None,
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    json_: options.Json = False,
) -> None:
    """Measure decode, prefill, load time and memory, as ratios to this machine's ceilings."""
    set_json(json_)
    from inferloom.benchmarks.bench import bench as measure

    with progress(f"measuring {model}") as report:
        path = resolve(model, options.compile_options(chip, dtype, max_model_len), report)
        made = measure(path, threads or len(os.sched_getaffinity(0)), runs, options.parse_counts(batches), ceilings,
                       report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    if json_:
        emit(made)
    else:
        _show(made)


def _show(made: dict[str, Any]) -> None:
    model = made["model"]
    out.print(f"{model['name']} {model['dtype']} on {made['machine']['cpu']}, {made['threads']} threads")
    rows = table("", "metric", "value", "of the ceiling", "spread", "others", right=("value", "spread", "others"))
    for m in made["metrics"]:
        value = human_bytes(m["value"]) if m["unit"] == "bytes" else f"{m['value']:.4g} {m['unit']}"
        share = "" if m["ratio"] is None else f"{m['ratio']:.0%} of {m['ratio_is']}"
        spread = (max(m["runs"]) - min(m["runs"])) / m["value"] if m["value"] else 0.0
        rows.add_row(m["name"], value, share, f"{spread:.0%}", f"{m['others']:.0%}")
    out.print(rows)
