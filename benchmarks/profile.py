"""Where a decode step's time goes: phases of the engine, kernels of the plan. `inferloom bench --profile` runs this."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.speculative import SpeculativeConfig
from inferloom.runtime.trace import PHASES, Timeline

PROMPT, NEW = 128, 64


def profile(artifact: Path, threads: int | None, batches: tuple[int, ...],
            trace: str | os.PathLike[str] | None = None, speculative: SpeculativeConfig | None = None,
            pin: bool = False) -> dict[str, Any]:
    """Decode greedily at each batch size, reading each text as it grows; microseconds of the median step.

    Of each batch: `tokens_per_step` of all sequences, `phases`, `python` (all but the kernels), and `kernels` with the
    times that a step calls each and what these calls take together. `trace`: a file for the steps of the last batch, see
    `Timeline.write`.
    """
    with LLM(artifact, threads=threads, speculative=speculative, pin=pin) as llm:
        made = [_decode(llm, batch, trace if batch == batches[-1] else None) for batch in batches]
        model = llm.manifest.model
    return {"artifact": artifact.name, "model": {"name": model.name, "dtype": model.dtype}, "threads": threads,
            "batches": made}


def _decode(llm: LLM, batch: int, trace: str | os.PathLike[str] | None) -> dict[str, Any]:
    rng, limits, engine = random.Random(0), llm.engine.limits, llm.engine
    prompt = min(PROMPT, limits.max_model_len - NEW - 1)
    params = SamplingParams(temperature=0, max_tokens=NEW + 1, ignore_eos=True)
    for i in range(batch):
        engine.add_request(f"profile-{i}", [rng.randrange(3, llm.manifest.model.vocab_size) for _ in range(prompt)], params)
    while any(s.computed < prompt for s in (*engine.scheduler.waiting, *engine.scheduler.running)):
        engine.step()
    timeline = Timeline()
    engine.trace(timeline)
    try:
        while engine.has_unfinished:
            for output in engine.step():
                len(output.outputs[0].text)
    finally:
        engine.trace(None)
    if trace is not None:
        timeline.write(trace)
    return {"batch": batch, "tokens_per_step": batch * NEW / timeline.steps, **summary(timeline)}


def summary(timeline: Timeline) -> dict[str, Any]:
    """Medians over the steps of a timeline, in microseconds."""
    steps: dict[int, dict[str, int]] = defaultdict(dict)
    kernels: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    about = {s.name: s.kernel for s in timeline.spans if s.kernel is not None}
    for s in timeline.spans:
        if s.kernel is None:
            steps[s.step][s.name] = s.ns
        else:
            kernels[s.name][s.step].append(s.ns)
    whole = [step for step in steps.values() if all(name in step for name in PHASES)]
    phases = [*(["draft"] if any("draft" in s for s in whole) else []), *PHASES]
    calls = [{"kernel": name, "kind": about[name].kind, "calls": len(next(iter(by_step.values()))),
              "us": median(sum(ns) for ns in by_step.values()) / 1000} for name, by_step in kernels.items()]
    return {"steps": len(whole), "phases": {name: median(s.get(name, 0) for s in whole) / 1000 for name in phases},
            "python": median(sum(s.values()) - s["kernels"] for s in whole) / 1000,
            "kernels": sorted(calls, key=lambda c: -c["us"])}
