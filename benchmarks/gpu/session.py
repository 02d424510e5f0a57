"""A GPU that torch and the product's launcher share: torch makes data and checks, the launcher runs kernels.

Both use the device's primary context. A graph that the launcher captured is replayed on torch's stream, between
torch's events, so that our kernels and their peers are timed alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferloom.runtime.device.launcher import Launch, Launcher
from inferloom.runtime.manifest import KERNELS_FILE

#: Bytes that a timed loop goes through before it comes back to the same, several times the L2 cache.
ROTATE = 256 << 20
#: A process that has seen a fault of the GPU cannot go on.
FAULT = 3
TOLERANCE = 2.0**-7
#: Where data lies, as torch calls it.
DEVICE = "cuda"


class Gpu:
    """The first GPU, for kernels built into `folder`."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.zeros(1, device=DEVICE)
        self.folder, self.stream = folder, torch.cuda.Stream()
        self.launcher = Launcher((folder / KERNELS_FILE).read_bytes(), str(folder / KERNELS_FILE), "cuda", 0)
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.cuGraphLaunch.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._functions: dict[tuple[Path, str], int] = {}

    def launch(self, file: Path, symbol: str, grid: Sequence[int], limits: Sequence[int], block: Sequence[int],
               args: Sequence[int]) -> Launch:
        """A launch of a kernel: (dim, tile, mult), (least, most), (threads, shared bytes), addresses."""
        if (file, symbol) not in self._functions:
            module = self.launcher.module(file.read_bytes())
            self._functions[file, symbol] = self.launcher.function(module, symbol, block[1])
        return Launch(self._functions[file, symbol], (ctypes.c_uint64 * 24)(*args), len(args), *grid, *limits, *block)

    def launches(self, entry: dict[str, Any], buffers: dict[str, torch.Tensor], scratch: torch.Tensor) -> list[Launch]:
        """The launches of one entry of sets.json."""
        return [self.launch(self.folder / k["file"], k["symbol"], k["grid"], (k["least"], k["most"]),
                            (k["threads"], k["shared"]),
                            [scratch.data_ptr() + a if isinstance(a, int) else buffers[a].data_ptr() for a in k["args"]])
                for k in entry["kernels"]]

    def run(self, launches: Sequence[Launch], dims: Sequence[int]) -> None:
        torch.cuda.synchronize()
        self.launcher.step((Launch * len(launches))(*launches), dims)
        self.launcher.sync()

    def time(self, launches: Sequence[Launch], dims: Sequence[int], per: int, seconds: float = 0.05) -> dict[str, float]:
        """Microseconds of one of `per` equal pieces of work, as a graph."""
        torch.cuda.synchronize()
        graph = self.launcher.capture((Launch * len(launches))(*launches), dims)

        def replay() -> None:
            if code := self._driver.cuGraphLaunch(graph, self.stream.cuda_stream):
                raise RuntimeError(f"cuGraphLaunch: CUDA error {code}")

        try:
            return self.sample(replay, per, seconds)
        finally:
            torch.cuda.synchronize()
            self.launcher.drop(graph)

    def time_torch(self, calls: Sequence[Callable[[], Any]], graph: bool = True, seconds: float = 0.05) -> dict[str, float]:
        """The same of torch's calls."""
        with torch.cuda.stream(self.stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        if not graph:
            return self.sample(lambda: [call() for call in calls], len(calls), seconds)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=self.stream):
            for call in calls:
                call()
        return self.sample(recorded.replay, len(calls), seconds)

    def sample(self, replay: Callable[[], Any], per: int, seconds: float) -> dict[str, float]:
        with torch.cuda.stream(self.stream):
            def once() -> Callable[[], float]:
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                replay()
                events[1].record()
                return lambda: events[0].elapsed_time(events[1]) * 1000 / per

            once(), once()
            torch.cuda.synchronize()
            first = once()
            torch.cuda.synchronize()
            pending = [once() for _ in range(min(60, max(5, int(seconds * 1e6 / (first() * per + 1)))))]
            torch.cuda.synchronize()
        return quantiles([p() for p in pending])


def quantiles(us: Sequence[float]) -> dict[str, float]:
    """p10, p50, p90 of samples, and how many there are."""
    p10, p50, p90 = (float(x) for x in np.percentile(us, (10, 50, 90)))
    return {"p10": p10, "p50": p50, "p90": p90, "samples": len(us)}


def copies(size: int, most: int = 64) -> int:
    """How many copies of data make a timed loop leave the cache, at least 2."""
    return min(most, max(2, -(-ROTATE // max(size, 1))))


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, scale)


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory of which whatever is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def ints(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(values, np.int32)).to(DEVICE)


def error(got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Largest and root-mean-square error, relative to the largest value wanted and to the wanted ones' own."""
    difference, want = (got.float() - want.float()).double(), want.double()
    largest = float(difference.abs().max() / want.abs().max().clamp_min(1e-30))
    rms = float(difference.square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))
    return {"max": largest, "rms": rms, "tolerance": tolerance, "ok": largest <= tolerance}


class Recorder:
    """Writes one line for each case as it ends, so that nothing is lost when the process is.

    `done` are the names of cases that an earlier process has dealt with; past `seconds` the rest is skipped.
    """

    def __init__(self, path: Path, seconds: float, quick: bool = False) -> None:
        self.path, self.end, self.quick = path, time.monotonic() + seconds, quick
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.done = {line["name"] for line in lines}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def wanted(self, name: str) -> bool:
        if name in self.done:
            return False
        if self.left > 0:
            return True
        self._write({"kind": "skip", "name": name, "why": "out of time"})
        return False

    def skip(self, name: str, why: str) -> None:
        if name not in self.done:
            self._write({"kind": "skip", "name": name, "why": why})

    @contextmanager
    def case(self, name: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """A case that fills in what it found; a failure is written down and the run goes on, unless the GPU is lost."""
        self._write({"kind": "start", "name": name})
        made: dict[str, Any] = {"kind": "case", "name": name, "parameters": parameters}
        try:
            yield made
            torch.cuda.synchronize()
            self._write(made)
        except Exception as failure:
            self._write({"kind": "failure", "name": name, "why": f"{type(failure).__name__}: {failure}"[:2000],
                         "where": traceback.format_exc().splitlines()[-8:]})
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                os._exit(FAULT)

    def peer(self, made: dict[str, Any], name: str, measure: Callable[[], dict[str, float]]) -> None:
        """A peer's time, or why there is none."""
        try:
            made.setdefault("peers", {})[name] = {"us": measure()}
        except Exception as failure:
            made.setdefault("peers", {})[name] = {"skipped": f"{type(failure).__name__}: {failure}"[:300]}
            torch.cuda.synchronize()

    def _write(self, line: dict[str, Any]) -> None:
        self.done.add(line["name"])
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
