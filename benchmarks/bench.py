"""Engine-level speed of one artifact, as ratios to ceilings that are measured in the same run.

`inferloom bench DIR` runs this. Prompts are random tokens, all different (no prefix is ever found in the cache),
decoding is greedy and does not stop at end tokens. Each metric is a median; the ceilings are probed before and
after each metric, since other users of a machine change what it can give.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from inferloom.benchmarks.cost import step_cost
from inferloom.benchmarks.machine import ceilings, describe
from inferloom.benchmarks.probe import between
from inferloom.benchmarks.work import NEW, PREFILL, PROMPT, Work
from inferloom.errors import InferloomError
from inferloom.runtime.speculative import SpeculativeConfig

_FRESH = """
import json, resource, sys, time
start = time.perf_counter()
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
llm = LLM(sys.argv[1], **json.loads(sys.argv[3]))
loaded = time.perf_counter()
llm.generate([json.loads(sys.argv[2])], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
print(json.dumps({"import_and_load": loaded - start, "first_token": time.perf_counter() - loaded,
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured value: the median of `runs`; `others` is the largest share of the machine others used."""

    name: str
    unit: str
    value: float
    runs: tuple[float, ...]
    others: float
    ceilings: dict[str, float]
    ratio: float | None = None
    ratio_is: str = ""


def bench(artifact: Path, threads: int, runs: int = 3, batches: tuple[int, ...] = (1, 4, 16),
          with_ceilings: bool = True, progress: Callable[[str], None] = lambda _: None,
          speculative: SpeculativeConfig | None = None, pin: bool = False) -> dict[str, Any]:
    """Measure `artifact`; returns one JSON-able report. Raises `InferloomError` where a probe cannot run."""
    return _Bench(artifact, threads, runs, with_ceilings, progress, speculative, pin).report(batches)


class _Bench:
    def __init__(self, artifact: Path, threads: int, runs: int, with_ceilings: bool,
                 progress: Callable[[str], None], speculative: SpeculativeConfig | None, pin: bool) -> None:
        self.speculative, self.pin = speculative, pin
        self.artifact, self.threads, self.runs, self.progress = artifact, threads, runs, progress
        self.with_ceilings = with_ceilings
        self.manifest = json.loads((artifact / "manifest.json").read_text())
        chip = self.manifest["chip"]
        if chip["driver"] != "none":
            raise InferloomError(f"bench measures CPUs, and the artifact is for {chip['name']}: see docs/gpu-benchmarks.md")
        self.cost = step_cost(artifact)
        self.metrics: list[Metric] = []

    def report(self, batches: tuple[int, ...]) -> dict[str, Any]:
        from inferloom.runtime.llm import LLM
        from inferloom.runtime.params import SamplingParams

        limit = self.manifest["model"]["max_model_len"]
        if limit < PROMPT + NEW:
            raise InferloomError(f"bench needs {PROMPT + NEW} tokens of context; the artifact was compiled for {limit}")
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._fresh_process()
        llm = LLM(self.artifact, threads=self.threads, speculative=self.speculative, pin=self.pin)

        def generate(prompts: list[list[int]], new: int) -> list[tuple[int, ...]]:
            made = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
            return [tuple(m.outputs[0].token_ids) for m in made]

        work = Work(generate, 3, self.manifest["model"]["vocab_size"])
        work.generate(1, PROMPT, 4)
        for batch in batches:
            self._measure(f"decode_{batch}", "tok/s", partial(work.decode, batch), partial(self._decode_ratio, batch))
        length = min(PREFILL, limit - 1)
        self._measure(f"prefill_{length}", "tok/s", partial(work.prefill, length), self._prefill_ratio)
        if self.speculative is not None:
            accepted = llm.stats.accepted / max(llm.stats.drafted, 1)
            self._add(Metric("drafts_accepted", "of 1", accepted, (accepted,), 0.0, {}))
        llm.close()
        return {"artifact": self.artifact.name, "model": self.manifest["model"], "chip": self.manifest["chip"],
                "versions": self.manifest["versions"], "machine": describe(), "threads": self.threads,
                "time": started, "weight_bytes_per_step": round(self.cost.bytes_of(1)),
                "flops_per_token": self.cost.flops_per_token, "arithmetic": sorted(self.cost.token_flops),
                "metrics": [{name: getattr(m, name) for name in Metric.__slots__} for m in self.metrics]}

    def _fresh_process(self) -> None:
        """Load to first token, and peak memory, of a process that does nothing else."""
        loads, sizes = [], []
        for _ in range(self.runs):
            options = json.dumps({"threads": self.threads, "pin": self.pin})
            command = [sys.executable, "-c", _FRESH, str(self.artifact), json.dumps(list(range(3, 19))), options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise InferloomError(f"a fresh process could not run the artifact:\n{done.stderr.strip()}")
            got = json.loads(done.stdout.splitlines()[-1])
            loads.append(got["import_and_load"] + got["first_token"])
            sizes.append(got["rss"])
        self._add(Metric("load_to_first_token", "s", statistics.median(loads), tuple(loads), 0.0, {}))
        self._add(Metric("peak_rss", "bytes", statistics.median(sizes), tuple(sizes), 0.0, {}))

    def _measure(self, name: str, unit: str, once: Callable[[], tuple[float, float]],
                 ratio: Callable[[float, dict[str, float]], tuple[float, str]]) -> None:
        before = ceilings(self.threads) if self.with_ceilings else {}
        got = [once() for _ in range(self.runs)]
        after = ceilings(self.threads) if self.with_ceilings else {}
        ceiling = between(before, after)
        value = statistics.median(v for v, _ in got)
        share, meaning = ratio(value, ceiling) if ceiling else (None, "")
        self._add(Metric(name, unit, value, tuple(v for v, _ in got), max(o for _, o in got), ceiling, share, meaning))

    def _add(self, metric: Metric) -> None:
        self.metrics.append(metric)
        share = f", {metric.ratio:.0%} of {metric.ratio_is}" if metric.ratio is not None else ""
        self.progress(f"{metric.name}: {metric.value:.4g} {metric.unit}{share}")

    def _decode_ratio(self, batch: int, value: float, ceiling: dict[str, float]) -> tuple[float, str]:
        """Against the roofline: a step takes at least its reading time, and at least its computing time."""
        reading = self.cost.bytes_of(batch) / (_bandwidth(ceiling) * 1e9)
        computing = self.cost.seconds(batch, batch, ceiling)
        bound = "read bandwidth" if reading >= computing else "arithmetic peak"
        return value / batch * max(reading, computing), bound

    def _prefill_ratio(self, value: float, ceiling: dict[str, float]) -> tuple[float, str]:
        return value * self.cost.seconds(1, 0, ceiling), "arithmetic peak"


def _bandwidth(ceiling: dict[str, float]) -> float:
    """GB/s of reading from whichever pages are read faster."""
    return max(ceiling["bw_4k"], ceiling["bw_huge"])
