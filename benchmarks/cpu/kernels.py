"""Matmul kernels against the roofline: `python -m inferloom.benchmarks.cpu.kernels --shape 4864x896 --rows 1 4 16`.

Each kernel is made by the code generator that artifacts come from, and runs on the stepper that they carry. Its weights
are read in turn from as many copies as do not fit the last-level cache, as a step reads those of its layers. The bound
is the longer of reading the weights and of computing; both ceilings are probed in the same run, before and after.

A kind of weight is a function that emits the kernel's body (`KINDS`), so any packed op can be timed: operands without
rows are what is read.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inferloom.benchmarks.machine import ceilings, describe
from inferloom.benchmarks.probe import between
from inferloom.compiler.plan import Rows, tensor_bytes
from inferloom.compiler.quantization.scheme import parse
from inferloom.ir.graph import Builder, Graph, Value
from inferloom.ir.types import DType, Sym, TensorType
from inferloom.runtime.device.cpu import Call
from inferloom.runtime.device.library import KernelLibrary
from inferloom.runtime.memory import Arena
from inferloom.targets.base import KernelSource, Layout, Logits, Lowering
from inferloom.targets.chips import CpuChip, find
from inferloom.targets.tvm.codegen import CpuTarget

MOST_ROWS = 4096
#: Copies of a weight take at least so many bytes together: several times a large last-level cache.
COPIES_BYTES = 256 << 20
#: Projections of common models, columns x inner dimension.
SHAPES = {"qwen2.5-0.5b": ("1152x896", "896x896", "9728x896", "896x4864", "151936x896"),
          "llama-3.2-1b": ("3072x2048", "2048x2048", "16384x2048", "2048x8192", "128256x2048")}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of weight: `emit(builder, lowering, rows, n, k)` gives a body's result, `peak` is its ceiling's name."""

    emit: Callable[[Builder, Lowering, Sym, int, int], Value]
    peak: Callable[[CpuChip], str]


@dataclass(frozen=True, slots=True)
class Result:
    """One kernel at one number of rows: seconds of a call, those of the bound, and their ratio (1 is ideal)."""

    kind: str
    n: int
    k: int
    rows: int
    seconds: float
    bound: float
    bound_is: str
    ratio: float


def dense(dtype: DType, builder: Builder, lowering: Lowering, rows: Sym, n: int, k: int) -> Value:
    """x @ w.T, with x of the type that the target wants."""
    pair, tile = lowering.weight_pair[dtype], lowering.weight_tile
    steps = -(-k // lowering.weight_k_multiple) * lowering.weight_k_multiple // pair
    x = builder.input("x", TensorType(lowering.inputs.get(dtype, dtype), (rows, k)))
    packed = builder.input("packed", TensorType(dtype, (-(-n // tile), steps, tile, pair)))
    return builder.emit("packed_linear", x, packed, n=n, k=k)


def quantized(name: str, builder: Builder, lowering: Lowering, rows: Sym, n: int, k: int) -> Value:
    """x @ w.T with w in the scheme of that name, and x of integers where the scheme says so."""
    scheme, tile = parse(name), lowering.weight_tile
    tiles, padded = -(-n // tile), -(-k // lowering.weight_k_multiple) * lowering.weight_k_multiple
    integers = scheme.activations == "int8"
    x = builder.input("x", TensorType(DType.I8 if integers else DType.F32, (rows, k)))
    scale = builder.input("scale", TensorType(DType.F32, (rows, 1))) if integers else None
    sums = builder.input("sums", TensorType(DType.I32, (rows, scheme.groups(k)))) if integers else None
    packed = builder.input("packed", TensorType(DType.U8, (tiles, padded * scheme.bits // 32, tile, 4)))
    kind = TensorType(DType.F16, (tiles, scheme.groups(k), tile)) if scheme.group else TensorType(DType.F32, (n, 1))
    scales = builder.input("scales", kind)
    offsets = None if scheme.symmetric else builder.input("offsets", kind)
    return builder.emit("packed_quantized_linear", x, scale, sums, packed, scales, offsets, n=n, k=k, format=scheme.format,
                        group=scheme.group)


SCHEMES = ("int8", "int8-g32", "int4", "int4-g128", "int4-asym", "int8-wo", "int4-wo", "int4-g128-wo", "fp8")
KINDS: dict[str, Kind] = {
    "fp32": Kind(partial(dense, DType.F32), lambda chip: "fp32"),
    "bf16": Kind(partial(dense, DType.BF16), lambda chip: "bf16" if chip.bf16_dot else "fp32"),
    **{name: Kind(partial(quantized, name), partial(lambda peak, chip: peak, "int8" if parse(name).activations == "int8"
                                                    else "fp32")) for name in SCHEMES},
}


class Bench:
    """Kernels of `cases` (kind, n, k), compiled together for `chip`."""

    def __init__(self, cases: Sequence[tuple[str, int, int]], chip: CpuChip, threads: int,
                 say: Callable[[str], None] = lambda _: None) -> None:
        self.cases, self.chip, self.threads = cases, chip, threads
        self.target = CpuTarget(chip)
        self.graphs = [self._graph(*case) for case in cases]
        sources = [self._source(i, graph) for i, graph in enumerate(self.graphs)]
        module = self.target.compile_kernels(sources, Logits(1, 1, 1), say)
        self.infos = {info.symbol: info for info in module.kernels}
        self.sources = sources
        self.library = KernelLibrary(module.files["kernels/kernels.so"], "the benchmark")
        self.library.threads(threads)

    def close(self) -> None:
        self.library.close()

    def seconds(self, case: int, rows: Sequence[int], runs: int) -> list[float]:
        """Seconds of a call at each number of rows: the median of `runs` sweeps over all copies of its weights."""
        graph, source = self.graphs[case], self.sources[case]
        values = [*graph.inputs, *graph.outputs]
        sizes = [self._bytes(v, layout, max(rows)) for v, layout in zip(values, source.layouts)]
        per_copy = sum(size for size, layout in zip(sizes, source.layouts) if layout.space == "weights")
        copies = max(2, -(-COPIES_BYTES // per_copy))
        weights, work = Arena(per_copy * copies, "weights"), Arena(sum(sizes) - per_copy, "activations")
        calls = (Call * copies)()
        info, at, used = self.infos[source.symbol], 0, 0
        random = np.random.default_rng(0)
        places: list[tuple[int, int]] = []  # address, distance between copies
        for value, size, layout in zip(values, sizes, source.layouts):
            arena, offset, apart = (weights, at, per_copy) if layout.space == "weights" else (work, used, 0)
            for copy in range(copies if apart else 1):
                part = arena.bytes[offset + copy * apart:offset + copy * apart + size]
                part[:] = _fill(random, value, size) if copy == 0 else arena.bytes[offset:offset + size]
            places.append((arena.address + offset, apart))
            at, used = (at + size, used) if apart else (at, used + size)
        for i, call in enumerate(calls):
            call.fn, call.dim, call.tile, call.mult = (self.library.symbol(source.symbol), info.grid.dim, info.grid.tile,
                                                       info.grid.mult)
            for j, arg in enumerate(info.args):
                if not isinstance(arg, int):
                    raise TypeError(f"{source.symbol} takes {arg!r}, which a benchmark has not")
                call.args[j] = places[arg][0] + places[arg][1] * i
        return [self._time(calls, count, runs) for count in rows]

    def _time(self, calls: Any, rows: int, runs: int) -> float:
        dims = np.array([rows] * 5 + [0] * 3, np.int32)
        ns = np.zeros(len(calls), np.uint64)
        totals = []
        for _ in range(runs + 1):
            self.library.step(ctypes.addressof(calls), len(calls), dims.ctypes.data, ns.ctypes.data)
            totals.append(float(np.median(ns)) * 1e-9)
        return statistics.median(totals[1:])

    def _graph(self, kind: str, n: int, k: int) -> Graph:
        builder = Builder("body")
        return builder.finish([KINDS[kind].emit(builder, self.target.lowering, Sym("tokens", MOST_ROWS), n, k)])

    def _source(self, number: int, graph: Graph) -> KernelSource:
        builder = Builder("step")
        operands = [builder.input(v.name, v.type) for v in graph.inputs]
        node = builder.emit_node("kernel", operands, {"kind": "matmul", "body": graph}, "benchmark")
        lowering = self.target.lowering
        rows = Rows(lowering.row_align, lowering.avoid)
        layouts = tuple(Layout("workspace", rows.leading(_tensor(v))) if _has_rows(v) else Layout("weights")
                        for v in (*graph.inputs, *graph.outputs))
        return KernelSource(f"k{number}", node, layouts)

    def _bytes(self, value: Value, layout: Layout, rows: int) -> int:
        type = _tensor(value)
        return tensor_bytes(type) if layout.space == "weights" else rows * layout.ld * type.dtype.itemsize


def measure(cases: Sequence[tuple[str, int, int]], rows: Sequence[int], chip: CpuChip, threads: int, runs: int,
            say: Callable[[str], None]) -> list[Result]:
    """Time every case at every number of rows, ceilings around each case."""
    bench = Bench(cases, chip, threads)
    results = []
    for i, (kind, n, k) in enumerate(cases):
        before = ceilings(threads)
        seconds = bench.seconds(i, rows, runs)
        after = ceilings(threads)
        ceiling = between(before, after)
        size = sum(tensor_bytes(_tensor(v)) for v in bench.graphs[i].inputs if not _has_rows(v))
        for count, took in zip(rows, seconds):
            reading = size / (max(ceiling["bw_4k"], ceiling["bw_huge"]) * 1e9)
            computing = 2 * n * k * count / (ceiling[KINDS[kind].peak(chip)] * 1e9)
            bound = max(reading, computing)
            results.append(Result(kind, n, k, count, took, bound, "reading" if reading >= computing else "computing",
                                  bound / took))
            say(f"{kind} {n}x{k} rows {count:4}: {took * 1e6:9.1f} us, {bound / took:4.0%} of {results[-1].bound_is} "
                f"({size / took * 1e-9:.1f} GB/s, {2 * n * k * count / took * 1e-9:.0f} GFLOP/s)")
    bench.close()
    return results


def _fill(random: np.random.Generator, value: Value, size: int) -> NDArray[np.uint8]:
    """Bytes of small normal numbers, or of any integers."""
    dtype = _tensor(value).dtype
    if dtype is DType.F32:
        return (random.standard_normal(size // 4, np.float32) * np.float32(0.1)).view(np.uint8)
    if dtype is DType.BF16:
        wide = random.standard_normal(size // 2, np.float32) * np.float32(0.1)
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if dtype is DType.F16:
        return (random.standard_normal(size // 2, np.float32) * np.float32(0.1)).astype(np.float16).view(np.uint8)
    return random.integers(0, 256, size, np.uint8)


def _has_rows(value: Value) -> bool:
    shape = _tensor(value).shape
    return bool(shape) and not isinstance(shape[0], int)


def _tensor(value: Value) -> TensorType:
    if not isinstance(value.type, TensorType):
        raise TypeError(value)
    return value.type


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", nargs="+", default=["qwen2.5-0.5b"],
                        help=f"columns x inner dimension, or a model: {', '.join(SHAPES)}")
    parser.add_argument("--kind", nargs="+", default=["bf16"], choices=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--chip", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)
    chip = find(args.chip)
    if not isinstance(chip, CpuChip):
        parser.error(f"{chip.name} is no CPU")
    shapes = [tuple(map(int, s.split("x"))) for name in args.shape for s in SHAPES.get(name, (name,))]
    results = measure([(kind, n, k) for kind in args.kind for n, k in shapes], args.rows, chip, args.threads, args.runs,
                      (lambda _: None) if args.json else print)
    if args.json:
        json.dump({"machine": describe(), "chip": chip.name, "threads": args.threads,
                   "results": [asdict(r) for r in results]}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
