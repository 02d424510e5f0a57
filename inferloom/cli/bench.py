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
    pin: options.Pin = False,
    runs: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 3,
    batches: Annotated[str, typer.Option(help="Batch sizes of the decode measurements.")] = "1,4,16",
    profile: Annotated[bool, typer.Option("--profile", help="Instead, show where a decode step's time goes: phases and "
                                                            "kernels.")] = False,
    trace: Annotated[Path | None, typer.Option("--trace", show_default=False, metavar="FILE",
                                               help="Instead, write the steps of the last of --batches as a trace for "
                                                    "ui.perfetto.dev.")] = None,
    ceilings: Annotated[bool, typer.Option(help="Measure the machine's ceilings in the same run.")] = True,
    output: Annotated[Path | None, typer.Option("--out", "-o", show_default=False,
                                                help="Write the report here as JSON.")] = None,
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    quant: options.Quant = None,
    quant_head: options.QuantHead = None,
    quant_embedding: options.QuantEmbedding = None,
    quant_activations: options.QuantActivations = None,
    kv_dtype: options.KvDtype = None,
    speculative: options.Speculative = None,
    num_speculative_tokens: options.SpeculativeTokens = None,
    json_: options.Json = False,
) -> None:
    """Measure decode, prefill, load time and memory, as ratios to this machine's ceilings."""
    set_json(json_)
    from inferloom.benchmarks.bench import bench as measure
    from inferloom.benchmarks.profile import profile as measure_steps
    from inferloom.llm import resolve_draft

    sizes = options.parse_counts(batches)
    show = _show_steps if profile or trace is not None else _show
    with progress(f"measuring {model}") as report:
        wanted = options.compile_options(chip, dtype, max_model_len, quant, quant_head, quant_embedding, quant_activations,
                                                 kv_dtype)
        path = resolve(model, wanted, report)
        drafts = resolve_draft(options.speculative(speculative, num_speculative_tokens), wanted, report)
        if profile or trace is not None:
            made = measure_steps(path, threads, sizes, trace, drafts, pin)
        else:
            made = measure(path, threads or len(os.sched_getaffinity(0)), runs, sizes, ceilings, report,
                           drafts, pin)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    if json_:
        emit(made)
    else:
        show(made)


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


def _show_steps(made: dict[str, Any]) -> None:
    out.print(f"{made['model']['name']} {made['model']['dtype']}: median decode step in microseconds")
    for step in made["batches"]:
        total = step["python"] + step["phases"]["kernels"]
        title = f"batch {step['batch']}, {step['steps']} steps, {step['tokens_per_step']:.1f} tokens a step"
        rows = table(title, "phase or kernel", "kind", "calls", "us", "share", right=("calls", "us", "share"))
        for name, us in step["phases"].items():
            rows.add_row(name, "phase", "", f"{us:.1f}", f"{us / total:.1%}")
        rows.add_row("all but kernels", "", "", f"{step['python']:.1f}", f"{step['python'] / total:.1%}", end_section=True)
        for k in step["kernels"]:
            rows.add_row(k["kernel"], k["kind"], str(k["calls"]), f"{k['us']:.1f}", f"{k['us'] / total:.1%}")
        out.print(rows)
