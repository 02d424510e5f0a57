"""Percentiles of what users saw, and how much of it was good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferloom.benchmarks.serve.client import Timing
from inferloom.errors import MissingExtraError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """An answer is good when its first token comes within `first` seconds and the others within `gap` on average."""

    first: float
    gap: float

    def met(self, timing: Timing) -> bool:
        if timing.error is not None or timing.first is None:
            return False
        return timing.first <= self.first and (not timing.gaps or sum(timing.gaps) / len(timing.gaps) <= self.gap)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of them lie, interpolated.

    >>> percentile([1, 2, 3, 4], 50)
    2.5
    """
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(timings: Sequence[Timing], slo: Slo) -> dict[str, Any]:
    """One report of a run; times in seconds, rates a second of the time from the first question to the last answer."""
    good = [t for t in timings if t.error is None]
    span = max((t.start + t.whole for t in timings), default=0.0) - min((t.start for t in timings), default=0.0)
    errors: dict[str, int] = {}
    for t in timings:
        if t.error is not None:
            kind = str(t.status) if t.status not in (0, 200) else t.error.split(":")[0]
            errors[kind] = errors.get(kind, 0) + 1
    series = {"first_token": [t.first for t in good if t.first is not None], "between_tokens": [g for t in good for g in t.gaps],
              "whole_answer": [t.whole for t in good]}
    return {
        "answers": len(good), "errors": errors, "seconds": span,
        "tokens": sum(t.tokens for t in good), "prompt_tokens": sum(t.prompt_tokens for t in good),
        "cached_tokens": sum(t.cached for t in good),
        "computed_prompt_tokens": sum(t.prompt_tokens - t.cached for t in good),
        "recomputed_tokens": sum(max(0, t.seen - t.cached) for t in good),
        "tokens_per_second": sum(t.tokens for t in good) / span if span else 0.0,
        "answers_per_second": len(good) / span if span else 0.0,
        "slo": {"first_token": slo.first, "between_tokens": slo.gap},
        "goodput": sum(map(slo.met, timings)) / span if span else 0.0,
        "met_slo": sum(map(slo.met, timings)) / len(timings) if timings else 0.0,
        **{name: {f"p{p}": percentile(values, p) for p in PERCENTILES} | {"mean": sum(values) / len(values)}
           for name, values in series.items() if values},
    }


def plot(timings: Sequence[Timing], slo: Slo, file: Path) -> None:
    """First tokens and whole answers over the time of the run, and how they are distributed. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib; run: pip install 'inferloom[bench]'") from None
    good = [t for t in timings if t.error is None and t.first is not None]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    over, spread = figure.subplots(1, 2)
    over.scatter([t.start for t in good], [t.first for t in good], s=8, label="first token")
    over.scatter([t.start for t in timings if t.error], [0.0 for t in timings if t.error], s=12, marker="x", label="error")
    over.axhline(slo.first, linewidth=0.8, linestyle="--", color="grey", label="wanted")
    over.set(xlabel="asked at (s)", ylabel="first token after (s)")
    over.legend(fontsize=8)
    for name, values in (("first token", [t.first or 0.0 for t in good]), ("between tokens", [g for t in good for g in t.gaps]),
                         ("whole answer", [t.whole for t in good])):
        if values:
            spread.plot(sorted(values), [(i + 1) / len(values) for i in range(len(values))], label=name)
    spread.set(xlabel="seconds", ylabel="share of all", xscale="log")
    spread.legend(fontsize=8)
    figure.savefig(file)
