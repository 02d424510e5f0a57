"""Proves a pass: its attention against dense references, on the CPU and in Triton's interpreter, and its speed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.checks.model import VOCAB, attention_model, meaning, reference
from inferloom.checks.proofs import BLOCK, LENGTHS, LONGEST, Piece, Result, facts_of, prove, step_arrays
from inferloom.compiler.build import compile_model
from inferloom.compiler.plugins import Plugin, load
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.device.cpu import CpuDevice

CHIP = "h100"
CONTEXT, STEPS = 1024, 16


def check_pass(name: str, gpu: bool = True, speed: bool = True) -> list[Result]:
    """All results for the pass of a file or name. Raises UnsupportedError for what is no pass or cannot be compiled."""
    plugins = load([name])
    made = _own_reference(plugins)
    ids, want = _sequences(plugins)
    graph = meaning(attention_model(), plugins)
    with tempfile.TemporaryDirectory() as folder, _Cpu(Path(folder), name) as cpu:
        made += [Result(f"cpu: {r.name}", r.ok, r.text) for r in prove(cpu, graph, ids, want)]
    if gpu:
        made += _in_interpreter(name)
    if speed:
        made.append(_speed(name))
    return made


def _sequences(plugins: Sequence[Plugin]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng, model = np.random.default_rng(1), attention_model()
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]
    return ids, [reference(model, plugins, i) for i in ids]


def _own_reference(plugins: Sequence[Plugin]) -> list[Result]:
    """What the pass does to an attention, against what its author says that it does."""
    own: Callable[..., Any] | None = getattr(plugins[0].module, "reference", None)
    if own is None:
        return [Result("meaning", None, "the file has no reference(q, k, v, scale): what its expressions say is taken as meant")]
    from inferloom.ir import op as ops

    graph = meaning(attention_model(), plugins)
    node = next((n for n in graph.nodes if n.op == "flex_attention"), None)
    if node is None or len(node.operands) > 3:
        return [Result("meaning", None, "reference() is not compared: the attention has tables, or is no single attention")]
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((60, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    (got,) = ops.run_reference("flex_attention", [q, k, v], node.attrs)
    want = np.asarray(own(q, k, v, float(str(node.attrs["scale"]))), np.float64)
    if want.shape != got.shape:
        return [Result("meaning", False, f"reference() gives shape {want.shape}, not {got.shape}")]
    error = float(np.abs(got - want).max())
    return [Result("meaning", error <= 1e-4, f"error {error:.1e} against the file's own reference")]


class _Cpu:
    """The model compiled for this machine."""

    exact = True

    def __init__(self, folder: Path, name: str | None, model: Any = None, longest: int = LONGEST) -> None:
        most = max(longest, sum(LENGTHS))
        path = compile_model(model or attention_model(), folder / "model", dtype="fp32", max_tokens=most, max_seqs=most,
                             max_model_len=longest, block_tokens=BLOCK, passes=[] if name is None else [name])
        artifact = Artifact.open(path)
        columns, count = -(-longest // BLOCK), len(LENGTHS)
        tables = sum(g.tables for g in artifact.manifest.state.groups)
        self.device = CpuDevice(artifact, num_blocks=tables * count * columns, threads=1)
        # Not in order: the table must be read.
        self.tables = np.random.default_rng(3).permutation(tables * count * columns).reshape(tables, count, columns)

    def step(self, ids: Sequence[np.ndarray], pieces: Sequence[Piece], tables: np.ndarray) -> np.ndarray:
        arrays: dict[str, Any] = step_arrays(ids, pieces, tables, self.device.manifest.dims.facts)
        return np.array(self.device.step(StepBatch(**arrays)))

    def poison(self, blocks: Sequence[int]) -> Callable[[], None]:
        held = {b: self.device.read_block(b) for b in blocks}
        for b, data in held.items():
            self.device.write_block(b, np.full(len(data) // 4, np.nan, np.float32).tobytes())

        def restore() -> None:
            for b, data in held.items():
                self.device.write_block(b, data)

        return restore

    def __enter__(self) -> _Cpu:
        return self

    def __exit__(self, *error: object) -> None:
        self.device.close()


def _in_interpreter(name: str) -> list[Result]:
    """The same proofs in a process of their own, in which Triton interprets."""
    command = [sys.executable, "-m", "inferloom.checks.check_pass", name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False)
    if done.returncode:
        return [Result("gpu: interpreter", False, (done.stderr.strip().splitlines() or ["died without a word"])[-1])]
    return [Result(**line) for line in json.loads(done.stdout.splitlines()[-1])]


def _interpreted(name: str) -> list[Result]:
    from inferloom.checks.interpreter import Interpreted, target
    from inferloom.compiler.passes.pack_weights import Packing
    from inferloom.compiler.pipeline import Options, lower
    from inferloom.compiler.report import Report
    from inferloom.ir.types import DType

    plugins, model, wanted = load([name]), attention_model(), target(CHIP).lowering
    columns = LONGEST // BLOCK
    packing = Packing(wanted.weight_tile, wanted.weight_k_multiple, dict(wanted.weight_pair))
    graph = lower(model.graph, Options(DType.F32, packing, wanted.gate_columns, wanted.prologue, BLOCK, LONGEST * 2, LONGEST * 2,
                                       columns, plugins), Report())
    numbers = sorted(int(v.name.removeprefix("block_tables") or 0) for v in graph.inputs if v.name.startswith("block_tables"))
    count = len(LENGTHS)
    tables = np.random.default_rng(3).permutation(len(numbers) * count * columns).reshape(len(numbers), count, columns)

    class Gpu(Interpreted):
        exact = False
        tables: np.ndarray

        def step(self, ids: Sequence[np.ndarray], pieces: Sequence[Piece], tables: np.ndarray) -> np.ndarray:
            arrays = step_arrays(ids, pieces, tables, facts_of(graph))
            arrays |= zip(facts_of(graph), arrays.pop("facts"), strict=True)
            for kind in ("slots", "block_tables"):
                for number, part in zip(numbers, arrays.pop(kind), strict=True):
                    arrays[f"{kind}{number or ''}"] = part
            return self.run(arrays, shuffle=len(pieces))

        def poison(self, blocks: Sequence[int]) -> Callable[[], None]:
            pool, held = self.pool.reshape(-1, self.plan.bytes_per_block), self.pool.copy()
            pool[list(blocks)] = np.full(self.plan.bytes_per_block // 4, np.nan, np.float32).view(np.uint8)

            def restore() -> None:
                self.pool[:] = held

            return restore

    with tempfile.TemporaryDirectory() as folder:
        params = {p.source: model.weights.load(p.source) for p in graph.params}
        gpu = Gpu(graph, params, Path(folder), blocks=tables.size, chip=CHIP)
        gpu.tables = tables
        ids, want = _sequences(plugins)
        proofs = prove(gpu, meaning(model, plugins), ids, want)
        return [Result(f"gpu: {r.name}", r.ok, r.text) for r in proofs]


def _speed(name: str) -> Result:
    """Prefill and decode on one thread against plain causal attention, the runs taken in turns."""
    ids = [np.random.default_rng(4).integers(0, VOCAB, CONTEXT + STEPS).astype(np.int32)]
    model, times = attention_model(heads=8, dim=64, longest=CONTEXT + STEPS), dict[str, list[tuple[float, float]]]()
    with tempfile.TemporaryDirectory() as folder:
        with _Cpu(Path(folder) / "a", None, model, CONTEXT + STEPS) as plain, _Cpu(Path(folder) / "b", name, model,
                                                                                 CONTEXT + STEPS) as own:
            for _ in range(3):
                for key, runner in (("plain", plain), ("own", own)):
                    begin = time.perf_counter()
                    runner.step(ids, [(0, 0, CONTEXT)], runner.tables)
                    middle = time.perf_counter()
                    for at in range(CONTEXT, CONTEXT + STEPS):
                        runner.step(ids, [(0, at, at + 1)], runner.tables)
                    times.setdefault(key, []).append((middle - begin, (time.perf_counter() - middle) / STEPS))
    best = {key: np.min(each, axis=0) for key, each in times.items()}
    prefill, decode = best["own"] / best["plain"]
    milliseconds, micros = best["own"][0] * 1e3, best["own"][1] * 1e6
    return Result("speed", None, f"prefill of {CONTEXT} tokens {prefill:.2f}x, decode after them {decode:.2f}x the time of a "
                                 f"model with plain causal attention ({milliseconds:.1f} ms, {micros:.0f} us)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    print(json.dumps([r.to_json() for r in _interpreted(parser.parse_args().name)]))
