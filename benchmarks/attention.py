"""What attention kernels alone reach: a prefill's share of the arithmetic peak, a decode step's share of the bandwidth.

    python -m inferloom.benchmarks.attention ARTIFACT [--prefill 512,2048] [--context 8192] [--batch 4] [--threads N]

Times come from the device's own profile of a step: the artifact's kernels run as they do when it serves. Prompts start
at position 0, so a query sees half of the keys on average; masked pairs count as no work. Ceilings are measured before
and after, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.benchmarks.machine import ceilings
from inferloom.benchmarks.probe import between
from inferloom.errors import InferloomError
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.device.cpu import CpuDevice


def measure(path: Path, prefill: tuple[int, ...], context: int, batch: int, threads: int, runs: int,
            with_ceilings: bool = True) -> dict[str, Any]:
    """One JSON-able report. InferloomError where the artifact is too small for what is asked."""
    artifact = Artifact.open(path)
    m = artifact.manifest
    (group, *more) = m.state.groups
    if more or group.kind != "paged_kv" or group.tables != 1 or m.chip.driver != "none":
        raise InferloomError("this benchmark is for models on a CPU whose layers all keep all keys")
    heads = query_heads(path)
    blocks = -(-context // m.state.block_tokens)
    if max(*prefill, context) > m.model.max_model_len or max(prefill) > m.dims.tokens or batch > m.dims.seqs:
        raise InferloomError(f"the artifact takes {m.dims.tokens} tokens and {m.dims.seqs} sequences a step, and "
                             f"{m.model.max_model_len} tokens a sequence")
    before = ceilings(threads) if with_ceilings else {}
    found: dict[str, Any] = {}
    needed = max(blocks * batch, -(-max(prefill) // m.state.block_tokens))
    with CpuDevice(artifact, num_blocks=needed, threads=threads) as device:
        # Unwritten memory would be read from one page of zeros.
        noise = np.random.default_rng(0).integers(0, 256, m.state.bytes_per_block, np.uint8)
        noise[1::2] = noise[1::2] & 0x80 | 0x3F  # whatever the element type, numbers around 1
        for block in range(device.num_blocks):
            device.write_block(block, noise.tobytes())
        layers = len(group.layers)
        dims = [layer.shape[1] + (layer.shape[2] or layer.shape[1]) for layer in group.layers]
        for length in prefill:
            ns, total = _attention_ns(device, _batch(m, [length], [length]), runs)
            flops = sum(2 * heads * d * length * (length + 1) // 2 for d in dims)
            found[f"prefill_{length}"] = {"us_per_layer": ns / layers / 1e3, "share_of_step": ns / total, "gflops": flops / ns}
        ns, total = _attention_ns(device, _batch(m, [1] * batch, [context] * batch), runs)
        read = batch * blocks * sum(layer.bytes for layer in group.layers)
        speed = {"us_per_layer": ns / layers / 1e3, "share_of_step": ns / total, "gb_per_s": read / ns}
        found[f"decode_{batch}x{context}"] = speed
    after = ceilings(threads) if with_ceilings else {}
    ceiling = between(before, after)
    for values in found.values():
        if ceiling and "gflops" in values:
            peak = ceiling["bf16" if m.model.dtype == "bf16" and "avx512_bf16" in m.chip.features else "fp32"]
            values["of_peak"] = values["gflops"] / peak
        elif ceiling:
            values["of_bandwidth"] = values["gb_per_s"] / max(ceiling["bw_4k"], ceiling["bw_huge"])
    return {"artifact": path.name, "threads": threads, "ceilings": ceiling, "attention": found}


def query_heads(path: Path) -> int:
    """Query heads of the first attention, from the artifact's last graph."""
    from inferloom.ir.parser import parse_graph

    graph = parse_graph(sorted((path / "ir").glob("*.txt"))[-1].read_text())
    for node in graph.nodes:
        for inner in getattr(node.attrs.get("body"), "nodes", ()):
            if inner.op == "paged_attention":
                return int(inner.operands[0].type.shape[1])
    raise InferloomError(f"{path} has no attention")


def _batch(m: Any, counts: list[int], lens: list[int]) -> StepBatch:
    size = m.state.block_tokens
    per_seq = [-(-n // size) for n in lens]
    table = np.zeros((1, len(lens), max(per_seq)), np.int32)
    for i, count in enumerate(per_seq):
        table[0, i, :count] = sum(per_seq[:i]) + np.arange(count)
    positions = [np.arange(n - c, n, dtype=np.int32) for c, n in zip(counts, lens, strict=True)]
    slots = [table[0, i, p // size] * size + p % size for i, p in enumerate(positions)]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    return StepBatch(np.full(sum(counts), 5, np.int32), np.concatenate(positions), np.concatenate(slots)[None].astype(np.int32),
                     starts, np.array(lens, np.int32), table, starts[1:] - 1)


def _attention_ns(device: CpuDevice, batch: StepBatch, runs: int) -> tuple[float, float]:
    """Median nanoseconds in attention kernels, and in the whole step."""
    kinds = {k.symbol: k.kind for k in device.manifest.kernels}
    times = []
    for _ in range(runs + 1):
        made = device.profile(batch)
        times.append((sum(t for name, t in made if kinds[name] == "attention"), sum(t for _, t in made)))
    return statistics.median(t for t, _ in times[1:]), statistics.median(t for _, t in times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prefill", default="512,2048")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    lengths = tuple(int(n) for n in args.prefill.split(","))
    print(json.dumps(measure(args.artifact, lengths, args.context, args.batch, args.threads, args.runs), indent=1))


if __name__ == "__main__":
    main()
