"""Ceilings of the machine, and matmul kernels next to cuBLAS, in every configuration that was built."""

from __future__ import annotations

from typing import Any

import torch

from inferloom.benchmarks.gpu.session import DEVICE, Gpu, Recorder, copies, error, ints, poisoned, random
from inferloom.benchmarks.gpu.shapes import Linear

#: Candidates that are measured at length, besides the compiler's choice.
FINALISTS = 3


def ceilings(gpu: Gpu, recorder: Recorder, sets: list[dict[str, Any]]) -> None:
    """What this GPU gives at most, through torch: copy, read, bf16 matmul."""
    if recorder.wanted("copy"):
        with recorder.case("copy") as made:
            a, b = (random(2, 1 << 29) for _ in range(2))
            made |= {"bytes": 2 * a.nbytes, "us": gpu.time_torch([lambda: b.copy_(a)] * 4, seconds=0.3)}
    if recorder.wanted("read"):
        with recorder.case("read") as made:
            x = random(1 << 29, dtype=torch.float32)
            made |= {"bytes": x.nbytes, "us": gpu.time_torch([x.sum] * 4, seconds=0.3)}
    if recorder.wanted("matmul"):
        with recorder.case("matmul") as made:
            x, y = (random(8192, 8192) for _ in range(2))
            out = torch.empty_like(x)
            made |= {"flops": 2 * 8192**3, "us": gpu.time_torch([lambda: torch.mm(x, y, out=out)] * 4, seconds=0.5)}
    if recorder.wanted("launch"):
        with recorder.case("launch") as made:  # what a kernel costs that does nothing, within a graph
            one = torch.zeros(1, device=DEVICE)
            made["us"] = gpu.time_torch([lambda: one.add_(1)] * 100)


def matmul(gpu: Gpu, recorder: Recorder, sets: list[dict[str, Any]]) -> None:
    found = [s for s in sets if s["op"] == "matmul"]
    for n, k in dict.fromkeys((s["n"], s["k"]) for s in found):
        weights = torch.empty(0)
        for m in Linear(n, k).rows():
            entries = [s for s in found if (s["n"], s["k"]) == (n, k) and s["rows"][0] <= m <= s["rows"][1]]
            if (recorder.quick and m > 256) or not entries or not recorder.wanted(name := f"matmul-{n}x{k}-m{m}"):
                continue
            with recorder.case(name, n=n, k=k, m=m, rows=entries[0]["rows"]) as made:
                if not weights.numel():
                    weights = random(copies(n * k * 2), n, k, scale=k**-0.5)
                _matmul(gpu, recorder, made, entries, weights, m)


def _matmul(gpu: Gpu, recorder: Recorder, made: dict[str, Any], entries: list[dict[str, Any]], weights: torch.Tensor,
            m: int) -> None:
    count, n, k = weights.shape
    count = max(count, 4)
    xs = [random(m, k) for _ in range(min(count, 4))]
    outs = [torch.empty(m, n, dtype=torch.bfloat16, device=DEVICE) for _ in range(min(count, 4))]
    dims = [m, 1, m, 0, 0]
    scratch = torch.full((max(e["scratch"] for e in entries) + 256,), 255, dtype=torch.uint8, device=DEVICE)
    held = {"dims": ints([*dims, 0, 0, 0])}
    want = xs[0].float() @ weights[0].float().T

    def prepared(entry: dict[str, Any], i: int, out: torch.Tensor) -> list[Any]:
        return gpu.launches(entry, held | {"x": xs[i % len(xs)], "w": weights[i % len(weights)], "out": out}, scratch)

    measured = []
    for number, entry in enumerate(entries):
        out = poisoned(m + 1, n)
        gpu.run(prepared(entry, 0, out), dims)
        wrong = error(out[:m], want)
        wrong["ok"] = wrong["ok"] and bool(out[m].isnan().all())
        timed = [la for i in range(count) for la in prepared(entry, i, outs[i % len(outs)])]
        us = {} if recorder.quick or not wrong["ok"] else gpu.time(timed, dims, count, 0.006)
        measured.append({"name": entry["name"], "config": entry["config"], "hash": entry["hash"], "error": wrong, "us": us,
                         "first": not number, "timed": timed})
    good = sorted((e for e in measured if e["us"]), key=lambda e: e["us"]["p50"])
    for entry in {e["name"]: e for e in (*good[:FINALISTS], *(e for e in good if e["first"]))}.values():
        entry["us"] = gpu.time(entry["timed"], dims, count)
    for entry in measured:
        del entry["timed"]
    good.sort(key=lambda e: e["us"]["p50"])
    made |= {"bytes": (n * k + m * k + m * n) * 2, "flops": 2 * m * n * k, "candidates": measured,
             "error": max((e["error"] for e in measured), key=lambda e: (not e["ok"], e["max"]))}
    if good:
        made |= {"us": good[0]["us"], "best": good[0]["name"]}
        calls = [lambda i=i: torch.mm(xs[i % len(xs)], weights[i % len(weights)].T, out=outs[i % len(outs)])
                 for i in range(count)]
        recorder.peer(made, "cublas", lambda: gpu.time_torch(calls))
