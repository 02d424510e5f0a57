"""From a run's lines to medians, ratios to ceilings and to peers, what was missed by how much, tables and plots."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferloom.benchmarks.cpu.checkpoints import SHAPES
from inferloom.benchmarks.cpu.process import LONG_BATCH, LONG_CONTEXT
from inferloom.benchmarks.cpu.systems import OURS, PRECISIONS, SYSTEMS
from inferloom.benchmarks.probe import between
from inferloom.benchmarks.work import NEW, PREFILL, PROMPT
from inferloom.errors import InferloomError

Line = dict[str, Any]
#: A value counts as undisturbed while others used less than this share of the machine.
CLEAN = 0.03
BEGIN, END = "<!-- cpu-benchmarks: begin -->", "<!-- cpu-benchmarks: end -->"
METRICS = {"decode_1": "decode, batch 1, tok/s", "prefill_512": "prefill, 512 tokens, tok/s",
           "requests_16": "16 requests (128 in, 128 out), tok/s", "context_8192": "decode, batch 4 at 8k context, tok/s",
           "load": "load to first token, s", "rss": "peak memory, MB"}
SMALLER_IS_BETTER = ("load", "rss")


@dataclass(frozen=True, slots=True)
class Target:
    """What this engine is to reach: a share of the ceiling, a multiple of the best peer's speed, a bound."""

    metric: str
    precision: str
    ceiling: float | None = None
    peer: float | None = None
    most: float | None = None
    model: str | None = None


TARGETS = (
    Target("decode_1", "bf16", 0.90, 1.1), Target("decode_1", "int8", 0.85, 1.25), Target("decode_1", "int4", 0.75, 1.2),
    Target("prefill_512", "bf16", 0.85, 1.1), Target("prefill_512", "int8", 0.70, 1.3),
    Target("requests_16", "bf16", None, 1.5), Target("requests_16", "int8", None, 1.5),
    Target("context_8192", "bf16", 0.6), Target("load", "int8", None, 1.0, 1.0, "llama-3.2-1b"))


def summarize(lines: Iterable[Line], scores: dict[str, Line] | None = None) -> dict[str, Any]:
    """Cells (model, precision, system, metric), each with its median, and where this engine stands to its targets."""
    scores = scores or {}
    every = list(lines)
    found: dict[tuple[str, str, str, str], list[Line]] = {}
    absent = {f"{line['model']} {line['precision']} {line['system']}": line["missing"] for line in every if "missing" in line}
    for line in every:
        if "missing" in line or line["status"] != 0:
            continue
        for measured in line["lines"]:
            ceiling = measured.get("ceilings") or between(line["before"], line["after"])
            at = (line["model"], line["precision"], line["system"], measured["metric"])
            found.setdefault(at, []).append(measured | {"ceilings": ceiling, "line": line})
    cells = [_cell(at, values, scores) for at, values in sorted(found.items())]
    _against_peers(cells)
    return {"cells": cells, "targets": [t for model in dict.fromkeys(c["model"] for c in cells) for t in _targets(model, cells)],
            "missing": absent | {line["kind"]: line["said"][-300:] for line in every if line.get("status")
                                 and not any(o["kind"] == line["kind"] and o.get("status") == 0 for o in every)}}


def _cell(at: tuple[str, str, str, str], values: list[Line], scores: dict[str, Line]) -> Line:
    """The median over undisturbed processes, or over all where each was disturbed."""
    model, precision, system, metric = at
    clean = [v for v in values if v.get("others", 0.0) < CLEAN]
    used = clean or values
    line = used[-1]["line"]
    cell = {"model": model, "precision": precision, "system": system, "metric": metric, "unit": used[0]["unit"],
            "value": statistics.median(v["value"] for v in used), "runs": [v["value"] for v in used], "disturbed": not clean,
            "others": max(v.get("others", 0.0) for v in used), "format": line["format"], "weight_bytes": line["weight_bytes"],
            "ceilings": {name: statistics.median(v["ceilings"][name] for v in used) for name in used[0]["ceilings"]},
            "tokens": scores.get(line["kind"])}
    for name, share in (("ratio", ratio), ("ratio_4k", ratio_4k)):
        shares = [s for v in used if (s := share(metric, v["value"], precision, v["ceilings"], v["line"])) is not None]
        if shares:
            cell[name] = statistics.median(shares)
    if metric == "rss" and used[-1].get("contract"):
        cell["contract"] = used[-1]["contract"]
    if versions := {v["version"] for v in values if "version" in v}:
        cell["version"] = versions.pop()
    return cell


def peak(precision: str, ceilings: dict[str, float]) -> float:
    """GFLOP/s of the instruction that this precision is multiplied with: int4 is widened to int8."""
    name = "int8" if precision in ("int8", "int4") else "bf16"
    return ceilings.get(name, ceilings["fp32"])


def ratio(metric: str, value: float, precision: str, ceilings: dict[str, float], line: Line,
          bandwidth: str = "bw_huge") -> float | None:
    """The share of what the machine could do: the least seconds that the work takes over the seconds it took."""
    computing = lambda tokens, rows: ((tokens * line["flops_per_token"] + rows * line["flops_per_row"])  # noqa: E731
                                      / (peak(precision, ceilings) * 1e9))
    reading = lambda size: size / (ceilings[bandwidth] * 1e9)  # noqa: E731
    if metric == "decode_1":
        return value * max(reading(line["weight_bytes"]), computing(1, 1))
    if metric.startswith("prefill_"):
        return value / PREFILL * computing(PREFILL, 1)
    if metric.startswith("requests_"):
        count = int(metric.partition("_")[2])
        least = computing(count * PROMPT, count) + (NEW - 1) * max(reading(line["weight_bytes"]), computing(count, count))
        return value / (count * NEW) * least
    if metric.startswith("context_") and "state_bytes_per_token" in line:
        size = line["weight_bytes"] + LONG_BATCH * LONG_CONTEXT * line["state_bytes_per_token"]
        return value / LONG_BATCH * reading(size)
    return None


def ratio_4k(metric: str, value: float, precision: str, ceilings: dict[str, float], line: Line) -> float | None:
    """The same of decoding against the bandwidth of pages of 4 KB."""
    return ratio(metric, value, precision, ceilings, line, "bw_4k") if metric == "decode_1" else None


def _against_peers(cells: list[Line]) -> None:
    """Each cell of ours gets the best sane peer at the same bits, and how many times as fast it is."""
    for cell in cells:
        if cell["system"] != OURS:
            continue
        peers = [c for c in cells if c["system"] != OURS and (c["tokens"] or {"sane": True})["sane"]
                 and all(c[k] == cell[k] for k in ("model", "precision", "metric"))]
        if peers:
            smaller = cell["metric"] in SMALLER_IS_BETTER
            best = (min if smaller else max)(peers, key=lambda c: c["value"])
            cell["best_peer"] = best["system"]
            cell["of_peer"] = best["value"] / cell["value"] if smaller else cell["value"] / best["value"]


def _targets(model: str, cells: list[Line]) -> list[Line]:
    """Each target of a model: what was reached, and the share of it; `reached` is None where nothing was measured."""
    made = []
    for target in TARGETS:
        if target.model not in (None, model):
            continue
        cell = next((c for c in cells if (c["model"], c["precision"], c["system"], c["metric"])
                     == (model, target.precision, OURS, target.metric)), None)
        for kind, wanted, key in (("ceiling", target.ceiling, "ratio"), ("best peer", target.peer, "of_peer"),
                                  ("bound", target.most, "value")):
            if wanted is not None:
                got = None if cell is None else cell.get(key)
                share = None if got is None else (wanted / got if kind == "bound" else got / wanted)
                made.append({"model": model, "metric": target.metric, "precision": target.precision, "against": kind,
                             "wanted": wanted, "reached": got, "share": share,
                             "peer": cell.get("best_peer") if cell and kind == "best peer" else None})
    return made


def table(report: dict[str, Any], model: str) -> str:
    """One model's cells in Markdown: a row for each precision and system, a column for each metric."""
    cells = {(c["precision"], c["system"], c["metric"]): c for c in report["cells"] if c["model"] == model}
    shown = [m for m in METRICS if any(at[2] == m for at in cells)]
    rows = [f"| Weights | System | {' | '.join(METRICS[m] for m in shown)} |", "| --- | --- |" + " --- |" * len(shown)]
    for precision in PRECISIONS:
        for system in SYSTEMS:
            mine = {m: cells[precision, system, m] for m in shown if (precision, system, m) in cells}
            if mine:
                form = next(iter(mine.values()))["format"]
                name = f"**{system}**" if system == OURS else f"{system} ({form})"
                rows.append(f"| {precision} | {name} | {' | '.join(_shown(mine.get(m)) for m in shown)} |")
    return "\n".join(rows)


def _shown(cell: Line | None) -> str:
    if cell is None:
        return ""
    value = cell["value"] / 1e6 if cell["unit"] == "bytes" else cell["value"]
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    if "ratio" in cell:
        text += f" ({cell['ratio']:.0%})"
    if (cell["tokens"] or {"sane": True})["sane"] is False:
        return f"~~{text}~~"
    return text + ("*" if cell["disturbed"] else "")


def markdown(report: dict[str, Any]) -> str:
    """The whole report: machine, a table for each model, targets, what could not be measured."""
    parts = [_head(report)]
    for model in dict.fromkeys(c["model"] for c in report["cells"]):
        parts += [f"**{SHAPES[model].title} shape**", table(report, model)]
    parts.append(_reached(report["targets"]))
    if report["missing"]:
        said = [f"- {what}: {' '.join(why.split())[:200]}" for what, why in report["missing"].items()]
        parts.append("Not measured:\n" + "\n".join(said))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(report: dict[str, Any]) -> str:
    machine, cells = report["machine"], report["cells"]
    ceilings = {name: statistics.median(c["ceilings"][name] for c in cells) for name in cells[0]["ceilings"]} if cells else {}
    said = "; ".join(f"{name} {value:.0f} {'GB/s' if name.startswith('bw') else 'GFLOP/s'}" for name, value in ceilings.items())
    versions = ", ".join(dict.fromkeys(c["version"] for c in cells if "version" in c and c["system"] != OURS))
    return (f"{report['date']}, {machine['cpu']}, {report['threads']} threads, {machine['system']}. Random weights in real "
            f"shapes, greedy; medians. In brackets: the share of the ceiling measured just before and after (decode: bytes of "
            f"weights over the read bandwidth from huge pages; else operations over the peak of the precision's instruction). "
            f"A star: others used more than {CLEAN:.0%} of the machine each time. Struck out: the tokens are not the model's. "
            f"Medians of the ceilings: {said}. Peers: {versions}.")


def _reached(targets: Sequence[Line]) -> str:
    rows = ["| Shape | Work | Weights | Against | Wanted | Reached | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for t in targets:
        against = f"best peer ({t['peer']})" if t["peer"] else t["against"]
        got = "not measured" if t["reached"] is None else f"{t['reached']:.2f}"
        verdict = "" if t["share"] is None else "yes" if t["share"] >= 1 else f"missed by {1 - t['share']:.0%}"
        rows.append(f"| {SHAPES[t['model']].title} | {METRICS[t['metric']].rpartition(',')[0] or t['metric']} | {t['precision']} "
                    f"| {against} | {t['wanted']} | {got} | {verdict} |")
    return "\n".join(rows) if targets else ""


def fill(readme: Path, text: str) -> None:
    """Put `text` between the README's markers. InferloomError when they are not there."""
    old = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise InferloomError(f"{readme} must have one line {BEGIN} and after it one line {END}")
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text.strip()}\n{END}", old))


def short(report: dict[str, Any], results: str) -> str:
    """What the README shows: a table for each model, and where the rest is."""
    parts = [_head(report)]
    for model in dict.fromkeys(c["model"] for c in report["cells"]):
        parts += [f"{SHAPES[model].title} shape:", table(report, model)]
    missed = [t for t in report["targets"] if t["share"] is None or t["share"] < 1]
    parts.append(f"Targets: {len(report['targets']) - len(missed)} of {len(report['targets'])} reached; the others, by how much, "
                 f"and plots: [{results}]({results}).")
    return "\n\n".join(parts)


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """A picture a model: a panel for each metric, bars by precision and system; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "inferloom"
    from matplotlib import pyplot as plt

    made = []
    colors = {name: f"C{i}" for i, name in enumerate(SYSTEMS)}
    for model in dict.fromkeys(c["model"] for c in report["cells"]):
        cells = [c for c in report["cells"] if c["model"] == model and (c["tokens"] or {"sane": True})["sane"]]
        shown = [m for m in METRICS if any(c["metric"] == m for c in cells)]
        if not shown:
            continue
        figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 3.4), squeeze=False)
        for axis, metric in zip(axes[0], shown):
            mine = sorted((c for c in cells if c["metric"] == metric),
                          key=lambda c: (PRECISIONS.index(c["precision"]), list(SYSTEMS).index(c["system"])))
            values = [c["value"] / 1e6 if c["unit"] == "bytes" else c["value"] for c in mine]
            axis.bar(range(len(mine)), values, color=[colors[c["system"]] for c in mine])
            for x, c in enumerate(mine):
                if "ratio" in c and c["ratio"]:
                    axis.hlines(values[x] / c["ratio"], x - 0.4, x + 0.4, color="black", linewidth=1)
            axis.set_xticks(range(len(mine)), [c["precision"] for c in mine], rotation=90, fontsize=6)
            axis.set_title(METRICS[metric], fontsize=7)
            axis.tick_params(axis="y", labelsize=6)
            if metric in SMALLER_IS_BETTER and max(values) > 8 * min(values):
                axis.set_yscale("log")
        used = [name for name in SYSTEMS if any(c["system"] == name for c in cells)]
        figure.legend([plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in used], used, ncol=len(used), fontsize=7,
                      loc="lower center")
        figure.suptitle(f"{SHAPES[model].title} shape, {report['machine']['cpu']}, {report['threads']} threads; "
                        "black: the ceiling", fontsize=8)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        made.append(folder / f"{model}.svg")
        figure.savefig(made[-1], metadata={"Date": None})
        plt.close(figure)
    return made


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    pictures = "\n".join(f"![{p.stem}]({p.name})" for p in plot(report, folder))
    (folder / "README.md").write_text(f"# CPU benchmarks\n{markdown(report)}\n{pictures}".rstrip() + "\n")
