"""From the lines that the sections wrote: one JSON report, plots, tuned configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from typing import Any

from inferloom.targets.triton.configs import KEYS

Case = dict[str, Any]
TOP = 3


def collect(files: Iterable[Path]) -> dict[str, list[Case]]:
    """Cases, failures and skips by section; a case that was begun and never ended is a failure."""
    made: dict[str, list[Case]] = {"cases": [], "failures": [], "skipped": []}
    places = {"case": "cases", "failure": "failures", "skip": "skipped"}
    for file in files:
        lines = [json.loads(line) | {"section": file.stem} for line in file.read_text().splitlines()]
        ended = {line["name"] for line in lines if line["kind"] != "start"}
        for line in lines:
            if line["kind"] in places:
                made[places[line["kind"]]].append({k: v for k, v in line.items() if k != "kind"})
            elif line["name"] not in ended:
                made["failures"].append({"section": file.stem, "name": line["name"], "why": "the process died in this case"})
    wrong = [c for c in made["cases"] if not c.get("error", {"ok": True})["ok"]]
    made["failures"] += [{"section": c["section"], "name": c["name"], "why": f"wrong result: {c['error']}"} for c in wrong]
    return made


def rates(cases: list[Case]) -> dict[str, float]:
    """Adds to each case what it reached, as a share of the ceilings and of the best peer; returns the ceilings."""
    ceilings: dict[str, float] = {}
    for case in cases:
        if case["section"] == "ceilings" and "us" in case:
            us = case["us"]["p50"]
            ceilings |= {f"{case['name']}_gbps": case["bytes"] / us / 1e3} if "bytes" in case else (
                {f"{case['name']}_tflops": case["flops"] / us / 1e6} if "flops" in case else {f"{case['name']}_us": us})
    for case in cases:
        for part in (case, *case.get("kernels", ())):
            _rate(part, ceilings)
    return ceilings


def _rate(case: Case, ceilings: dict[str, float]) -> None:
    if not case.get("us"):
        return
    us = case["us"]["p50"]
    for amount, unit, scale, ceiling in (("bytes", "gbps", 1e3, "copy_gbps"), ("flops", "tflops", 1e6, "matmul_tflops")):
        if case.get(amount):
            case[unit] = case[amount] / us / scale
            if ceiling in ceilings:
                case[f"of_{ceiling}"] = case[unit] / ceilings[ceiling]
    peers = [p["us"]["p50"] for p in case.get("peers", {}).values() if "us" in p]
    if peers:  # whole models are compared by the wall's clock, as their peers are
        case["of_peer"] = min(peers) / (case.get("wall_us") or case["us"])["p50"]


def tuned(cases: list[Case]) -> list[dict[str, Any]]:
    """The best configuration of each matmul shape and range of rows, and of each attention, as configs.py reads them.

    Best is the smallest geometric mean of the times over the range's numbers of rows (or the sizes of batches).
    """
    times: dict[tuple[Any, ...], dict[str, list[Case]]] = {}
    for case in cases:
        p = case["parameters"] if "candidates" in case else {}
        key = (("matmul", p["n"], p["k"], p["rows"][1]) if "rows" in p else (p["op"], *p["heads"])) if p else None
        for candidate in case.get("candidates", ()):
            if candidate["us"]:
                at = {"at": case["name"], "us": candidate["us"]["p50"]}
                times.setdefault(key, {}).setdefault(candidate["name"], []).append(candidate | at)  # type: ignore[arg-type]
    entries = []
    for key, candidates in times.items():
        whole = max(len(measured) for measured in candidates.values())
        ranked = sorted(({"config": c[0]["config"], "us": round(exp(sum(log(e["us"]) for e in c) / len(c)), 3),
                          "hash": c[0]["hash"], "by_case": {e["at"]: round(e["us"], 3) for e in c}}
                         for c in candidates.values() if len(c) == whole), key=lambda e: e["us"])
        entries.append({**dict(zip(("op", *KEYS[key[0]]), key)), "dtype": "bf16", "source": "measured",
                        "config": ranked[0]["config"], "us": ranked[0]["us"], "hash": ranked[0]["hash"], "top": ranked[:TOP]})
    return entries


def write_tuned(path: Path, entries: list[dict[str, Any]], device: dict[str, Any]) -> None:
    """Entries measured before stay where there is no new one."""
    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return (entry["op"], entry["dtype"], *(entry[k] for k in KEYS[entry["op"]]))

    held = {key(e): e for e in json.loads(path.read_text())["entries"]} if path.exists() else {}
    held |= {key(e): e for e in entries}
    write(path, {"device": device, "entries": [held[k] for k in sorted(held)]})


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    path.with_suffix(".part").replace(path)


def summary(report: dict[str, Any]) -> str:
    """A line for each case, then what failed."""
    lines = ["ceilings: " + ", ".join(f"{k} {v:.0f}" for k, v in sorted(report["ceilings"].items()))]
    for case in report["cases"]:
        parts = [f"{case['us']['p50']:.1f} us"] if case.get("us") else []
        parts += [f"{case[k]:.0f} {unit}" for k, unit in (("gbps", "GB/s"), ("tflops", "TFLOP/s")) if k in case]
        parts += [f"{case[k]:.0%} {name}" for k, name in (("of_copy_gbps", "of copy"), ("of_matmul_tflops", "of peak"),
                                                            ("of_peer", "of peer")) if k in case]
        parts += [f"error {case['error']['max']:.1e}"] if "error" in case else []
        lines.append(f"{case['section']:9} {case['name']:32} {', '.join(parts)}")
    lines += [f"FAILED {f['section']} {f['name']}: {f['why'][:300]}" for f in report["failures"]]
    counts = ", ".join(f"{len(report[part])} {part}" for part in ("cases", "failures", "skipped"))
    return "\n".join([*lines, counts])


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """One picture a section of shares of the ceiling and of the best peer; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    for section in ("matmul", "attention", "models"):
        shown = [c for c in report["cases"] if c["section"] == section and "gbps" in c]
        if not shown:
            continue
        figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(shown)))
        ceiling = [max(c.get("of_copy_gbps", 0), c.get("of_matmul_tflops", 0)) for c in shown]
        places = range(len(shown))
        axes.barh(places, ceiling, label="share of the nearer ceiling")
        axes.plot([c.get("of_peer") for c in shown], places, "k.", label="speed relative to the best peer")
        axes.set_yticks(places, [c["name"] for c in shown], fontsize=6)
        axes.axvline(1, color="grey", linewidth=0.5)
        axes.invert_yaxis()
        axes.legend(fontsize=7)
        axes.set_title(f"{section}, {report['device'].get('name', '')}", fontsize=9)
        figure.tight_layout()
        made.append(folder / f"{section}.png")
        figure.savefig(made[-1], dpi=130)
        plt.close(figure)
    return made
