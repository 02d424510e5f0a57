"""`inferloom inspect`: what is in an artifact, and why it became what it is."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.syntax import Syntax

from inferloom.cache import resolve, size_on_disk
from inferloom.cli import options
from inferloom.cli.console import emit, err, human_bytes, out, progress, quantized, set_json, table
from inferloom.errors import UsageError
from inferloom.runtime.manifest import DIMS, Embedding

ITEMSIZE = {"f32": 4, "fp32": 4, "bf16": 2, "f16": 2, "i8": 1, "u8": 1, "f8": 1}


def inspect(
    model: options.Model,
    ir: Annotated[str | None, typer.Option("--ir", metavar="PHASE", show_default=False,
                                           help="Print the IR after a phase: its name or number, or `list`.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="With --ir: what changed since the phase before.")] = False,
    why: Annotated[bool, typer.Option("--why", help="What each pass did, and what it did not do and why.")] = False,
    memory: options.Memory = None,
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    json_: options.Json = False,
) -> None:
    """Show the kernels with their source lines and the memory contract; the IR; the reasons."""
    set_json(json_)
    with progress(f"looking at {model}") as report:
        path = resolve(model, options.compile_options(chip, dtype, max_model_len), report)
    if ir is not None:
        _show_ir(path, ir, diff, json_)
    elif why:
        _show_why(path, json_)
    else:
        budget = options.parse_bytes(memory) if memory else None
        manifest = _read_json(path / "manifest.json")
        if json_:
            emit({"path": str(path), "bytes": size_on_disk(path), "contract": contract(manifest, budget),
                  "manifest": manifest})
        else:
            _show_manifest(path, manifest, budget)


def contract(manifest: dict[str, Any], budget: int | None = None) -> dict[str, Any]:
    """The memory contract in bytes, with the arithmetic as text; `blocks` only for a budget.

    Fixed memory is weights + workspace + inputs; all else is blocks of state. `state` says how many of them a group of
    layers takes for every `block_tokens` tokens, or for a sequence.
    """
    memory, state = manifest["memory"], manifest["state"]
    weights = weights_in_memory(manifest)
    fixed = weights + memory["workspace"] + memory["inputs"]
    groups = [_group(group, state["block_tokens"]) for group in state["groups"]]
    # What every further token takes for good: windows and recurrent states stop growing.
    growing = sum(g["blocks"] for g in groups if g["kind"] == "paged_kv")
    made: dict[str, Any] = {
        "fixed": fixed, "bytes_per_block": memory["bytes_per_block"], "block_tokens": state["block_tokens"],
        "fixed_is": f"weights {weights} + workspace {memory['workspace']} + inputs {memory['inputs']}",
        "state": groups,
        "adds_up": state["bytes_per_block"] == memory["bytes_per_block"] and all(
            g["bytes"] <= g["blocks"] * memory["bytes_per_block"] for g in groups),
        "bytes_per_token": growing * memory["bytes_per_block"] / state["block_tokens"],
    }
    if budget is not None:
        blocks = max(0, (budget - fixed) // memory["bytes_per_block"])
        made |= {"budget": budget, "blocks": blocks, "tokens": blocks // growing * state["block_tokens"] if growing else None,
                 "blocks_are": f"({budget} - {fixed}) // {memory['bytes_per_block']}"}
    return made


def _group(group: dict[str, Any], block_tokens: int) -> dict[str, Any]:
    """A group's blocks per `block_tokens` tokens (or per sequence), the bytes used of them, and what these are."""
    terms = []
    for (shape, dtype), count in Counter((tuple(x["shape"]), x["dtype"]) for x in group["layers"]).items():
        size = ITEMSIZE.get(dtype, 0)
        if group["kind"] == "recurrent" or len(shape) == 2:
            terms.append(f"{count} layers x {' x '.join(map(str, shape))} x {size} bytes")
        else:
            scales = f" + {1 + (shape[2] > 0)} scales x 4 bytes" if dtype in ("i8", "f8") else ""
            each = f"({shape[1]} + {shape[2]}) x {size} bytes{scales}"
            terms.append(f"{count} layers x {shape[0]} heads x {block_tokens} tokens x {f'({each})' if scales else each}")
    per = "sequence" if group["kind"] == "recurrent" else f"{block_tokens} tokens"
    return {"kind": group["kind"], "window": group["window"], "blocks": group["tables"], "per": per,
            "bytes": sum(x["bytes"] for x in group["layers"]), "is": " + ".join(terms)}


def weights_in_memory(manifest: dict[str, Any]) -> int:
    """Bytes of weights in memory: the file as a whole, its header included."""
    return int(manifest["files"][manifest["weights"]["file"]]["bytes"])


def _show_manifest(path: Path, manifest: dict[str, Any], budget: int | None) -> None:
    model, chip, dims = manifest["model"], manifest["chip"], manifest["dims"]
    out.print(f"[bold]{path}[/]  {human_bytes(size_on_disk(path))}")
    out.print(f"model    {model['name']}: {model['architecture']}, {model['dtype']}{quantized(manifest)}, "
              f"vocabulary {model['vocab_size']}, up to {model['max_model_len']} tokens")
    needs = f"{chip['driver']} device {chip['arch']}" if chip["arch"] else ", ".join(chip["features"]) or "nothing special"
    out.print(f"chip     {chip['name']}: {chip['triple'] or 'source for any ' + chip['driver'] + ' device'}, needs {needs}")
    out.print(f"task     {_task(manifest)}")
    out.print(f"step     up to {dims['tokens']} tokens, {dims['seqs']} sequences, {dims['rows']} rows of "
              f"{'logits' if manifest.get('task', 'generate') == 'generate' else 'hidden states'}")
    out.print("made by  " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()))
    _show_contract(manifest, contract(manifest, budget))
    calls = Counter(call["kernel"] for call in manifest["plan"])
    kernels = table(f"Kernels: {len(manifest['kernels'])} for {len(manifest['plan'])} calls in a step",
                    "kernel", "kind", "calls", "chunks", "source in the model", right=("calls",))
    for index, kernel in enumerate(manifest["kernels"]):
        kernels.add_row(kernel["symbol"], kernel["kind"], str(calls[index]), _grid(kernel["grid"]),
                        "\n".join(_short(kernel["source"])))
    out.print()
    out.print(kernels)
    if chip["arch"]:
        _show_resources(manifest["kernels"])
    err.print("[dim]More: --why, --ir list, --ir PHASE --diff, --memory 4GiB, --json[/]")


def _task(manifest: dict[str, Any]) -> str:
    if manifest.get("task", "generate") == "generate":
        return "generate"
    how = asdict(Embedding()) | manifest.get("embedding", {})
    return (f"embed: {'the mean of all final hidden states' if how['pooling'] == 'mean' else 'the last final hidden state'}, "
            f"{'of length 1' if how['normalize'] else 'as long as it is'}")


def _show_resources(kernels: list[dict[str, Any]]) -> None:
    """What each GPU kernel takes of its chip."""
    columns = {"threads": "threads", "registers": "registers", "spilled_bytes": "spilled", "shared_bytes": "shared",
               "matrix_instructions": "matrix instructions", "rows": "rows", "tile": "tile"}
    rows = table("Resources", "kernel", *columns.values(), right=tuple(columns.values())[:5])
    for kernel in kernels:
        facts = {**kernel["resources"], "threads": kernel["launch"]["threads"]}
        rows.add_row(kernel["symbol"], *(str(facts.get(key, "")) for key in columns))
    out.print()
    out.print(rows)


def _show_contract(manifest: dict[str, Any], made: dict[str, Any]) -> None:
    memory = manifest["memory"]
    rows = table("Memory contract", "part", "bytes", "", right=("bytes",))
    sizes = {"weights": weights_in_memory(manifest), "workspace": memory["workspace"], "inputs": memory["inputs"]}
    for name, size in sizes.items():
        rows.add_row(name, f"{size:,}", human_bytes(size))
    rows.add_row("fixed", f"{made['fixed']:,}", human_bytes(made["fixed"]))
    rows.add_row("each block of state", f"{made['bytes_per_block']:,}", human_bytes(made["bytes_per_block"]))
    for group in made["state"]:
        kept = f", of the last {group['window']} tokens" if group["window"] else ""
        blocks = "1 block" if group["blocks"] == 1 else f"{group['blocks']} blocks"
        rows.add_row(group["kind"], f"{group['bytes']:,}", f"{blocks} per {group['per']}{kept}: {group['is']}")
    if "budget" in made:
        tokens = "" if made["tokens"] is None else f": {made['tokens']:,} tokens of state"
        rows.add_row("budget", f"{made['budget']:,}", f"{made['blocks']} blocks = {made['blocks_are']}{tokens}")
    out.print()
    out.print(rows)


def _grid(grid: dict[str, int]) -> str:
    if grid["dim"] < 0:
        return str(grid["mult"])
    per = DIMS[grid["dim"]]
    head = per if grid["tile"] == 1 else f"{per}/{grid['tile']}"
    return head if grid["mult"] == 1 else f"{head} x {grid['mult']}"


def _short(sources: list[str]) -> list[str]:
    """Source lines without the long part of their path, lines of one file together."""
    places = {place.rsplit("site-packages/", 1)[-1] for source in sources for place in source.split(", ")}
    pairs = sorted({(file, int(line)) for file, _, line in (p.rpartition(":") for p in places) if line.isdigit()})
    return [f"{file}:{','.join(str(line) for _, line in lines)}" for file, lines in groupby(pairs, key=lambda p: p[0])]


def phases(path: Path) -> list[Path]:
    """The artifact's IR texts, in order."""
    return sorted((path / "ir").glob("[0-9]*.txt"))


def _show_ir(path: Path, name: str, diff: bool, json_: bool) -> None:
    texts = phases(path)
    names = [text.stem for text in texts]
    if not texts:
        raise UsageError(f"{path} holds no IR texts")
    if name == "list":
        if json_:
            emit({"phases": names})
        else:
            out.print("\n".join(names))
        return
    found = [i for i, stem in enumerate(names) if name in (stem, *stem.split("-", 1))]
    if not found:
        raise UsageError(f"no phase is called {name!r}; the phases are: {', '.join(names)}")
    index = found[0]
    text = texts[index].read_text()
    if diff and index > 0:
        text = "\n".join(difflib.unified_diff(texts[index - 1].read_text().splitlines(), text.splitlines(),
                                              names[index - 1], names[index], n=1, lineterm=""))
    if json_:
        emit({"phase": names[index], "text": text})
    elif diff and out.is_terminal:
        out.print(Syntax(text, "diff", background_color="default"))
    else:
        typer.echo(text)


def _show_why(path: Path, json_: bool) -> None:
    file = path / "ir" / "report.json"
    if not file.is_file():
        raise UsageError(f"{path} holds no report of its passes (ir/report.json)")
    decisions = _read_json(file)
    if json_:
        emit(decisions)
        return
    rows = table("What the passes did, and why not", "pass", "", "what", "times", "reason", "source",
                 right=("times",))
    counted: dict[tuple[str, bool, str, str], list[str]] = {}
    for d in decisions:
        counted.setdefault((d["pass"], d["done"], d["what"], d["why"]), []).append(d["loc"])
    for (pass_name, done, what, reason), locs in counted.items():
        rows.add_row(pass_name, "[green]yes[/]" if done else "[yellow]no[/]", what, str(len(locs)), reason,
                     "\n".join(_short([loc for loc in locs if loc])))
    out.print(rows)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); the artifact is damaged, compile it again") from error
