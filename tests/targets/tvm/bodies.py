"""Single kernels compiled for this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from inferloom.ir.types import STATES
from inferloom.targets.base import Logits
from inferloom.targets.chips import CpuChip, find
from inferloom.targets.tvm.codegen import CpuTarget
from tests.targets.single import Bodies, Body, place, read, results
from tests.targets.tvm.harness import load


class Kernels(Bodies):
    """Bodies of one kind compiled together for this machine."""

    def __init__(self, kind: str, bodies: Mapping[str, Body], chip: str | CpuChip = "cpu") -> None:
        super().__init__(kind, bodies)
        target = CpuTarget(find(chip) if isinstance(chip, str) else chip)
        self.module = target.compile_kernels(self.sources, Logits(1, 1, 1), print)
        self.lib = load(self.module.files["kernels/kernels.so"])
        self.infos = {info.symbol: info for info in self.module.kernels}

    def run(self, name: str, inputs: Mapping[str, Any], counts: Mapping[str, int],
            more: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
        made, info = self.graphs[name], self.infos[name]
        memory = [place(v, inputs[v.name]) for v in made.inputs] + results(made, counts)
        held = {k: np.ascontiguousarray(v, np.int32) for k, v in (more or {}).items()}
        pointers = [held[a].ctypes.data if isinstance(a, str) else memory[a].ctypes.data for a in info.args]
        dims = (ctypes.c_int32 * 5)(counts.get("tokens", 0), counts.get("seqs", 0), counts.get("rows", 0),
                                    len(held.get("q_tiles", ())))
        grid = info.grid
        chunks = grid.mult * (1 if grid.dim < 0 else -(-dims[grid.dim] // grid.tile))
        function = getattr(self.lib, name)
        function.argtypes = [ctypes.c_void_p] * 17 + [ctypes.c_int32]
        for chunk in range(chunks):
            function(*pointers, *[None] * (16 - len(pointers)), ctypes.addressof(dims), chunk)
        return [read(v, m) for v, m in zip(made.outputs, memory[len(made.inputs):], strict=True)
                if not isinstance(v.type, STATES)]
