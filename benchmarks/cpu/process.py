"""The measured process: loads one engine, times each metric, prints a JSON line for each.

    python benchmarks/cpu/process.py --engine NAME --model PATH --metrics load,decode_1,prefill_512 --threads 2 [--probe PROGRAM]

It runs in the engine's own environment, where this project need not be installed, and imports only the standard
library besides the engine. Time begins when the process does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script; its own folder must not shadow other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from checkout import bootstrap
    sys.path.pop(0)
    bootstrap()

from inferloom.benchmarks.probe import between, probed
from inferloom.benchmarks.work import Timed, Work

MARK = "JSON "
#: Ids of prompts: in every vocabulary, and none of them special.
FIRST, LAST = 300, 29000
#: Requests and tokens of each that are kept, to be scored against the reference.
KEPT_REQUESTS, KEPT_TOKENS = 4, 8
LONG_CONTEXT, LONG_BATCH, LONG_NEW = 8192, 4, 32
#: New tokens of the decode metric: one step less is measured.
DECODED = 64
#: Seconds after which threads of engines no longer spin for work.
SETTLED = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--probe", help="program that measures the machine's ceilings, run around each metric")
    asked = parser.parse_args()
    engine = import_module(f"inferloom.benchmarks.cpu.engines.{asked.engine}").Engine(asked.model, asked.threads, asked.options)
    probe = None if asked.probe is None else partial(ceilings, asked.probe, asked.threads)
    for line in measure(engine, asked.metrics.split(","), probe):
        print(MARK + json.dumps(line), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some engines hang in their destructors


def measure(engine: Any, metrics: list[str], probe: Callable[[], dict[str, float]] | None = None) -> Iterator[dict[str, Any]]:
    """Yields a line for each metric, each with its value, unit and the share of the machine that others used.

    With a probe also the ceilings: the means of just before and just after it.
    """
    load = Work(engine.generate, FIRST, LAST, seed=1)
    with Timed() as first:
        load.generate(1, 16, 1)
    if "load" in metrics:
        yield {"metric": "load", "value": since_start(), "unit": "s", "others": first.others, "version": engine.version}
    load.generate(1, 128, 32)
    if "load" in metrics:
        yield {"metric": "rss", "value": peak_rss(), "unit": "bytes", "contract": getattr(engine, "contract", None)}
    for metric in metrics:
        if metric == "load":
            continue
        before = probe() if probe else {}
        line = timed(engine, metric)
        after = probe() if probe else {}
        ceiling = between(before, after)
        yield {"metric": metric, "unit": "tok/s", **line} | ({"ceilings": ceiling} if ceiling else {})


def timed(engine: Any, metric: str) -> dict[str, Any]:
    """Value and others of a metric, and what the engine was asked and made where that can be scored."""
    kind, _, size = metric.partition("_")
    work = Work(engine.generate, FIRST, LAST, seed=2)
    if kind == "context":
        with Timed() as block:
            value = engine.decode_at(int(size), LONG_BATCH, LONG_NEW)
        return {"value": value, "others": block.others}
    ways: dict[str, Callable[[int], tuple[float, float]]] = {
        "decode": partial(work.decode, new=DECODED), "prefill": work.prefill, "requests": work.requests}
    if kind == "requests":
        work.generate(int(size), 16, 2)  # a shape that was not seen yet
    value, others = max(ways[kind](int(size)) for _ in range(2 if kind == "prefill" else 1))
    return {"value": value, "others": others, "made": [[p, ids[:KEPT_TOKENS]] for p, ids in work.made[:KEPT_REQUESTS]]}


def ceilings(program: str, threads: int) -> dict[str, float]:
    """What the probe prints, once the engine's threads have gone to sleep."""
    time.sleep(SETTLED)
    return probed(program, threads)


def since_start() -> float:
    """Seconds since this process began, its interpreter included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss() -> int:
    """Bytes that were resident at most, mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
