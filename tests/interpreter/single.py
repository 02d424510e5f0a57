"""Single kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.ir.types import STATES
from inferloom.runtime.device.base import make_tiles
from inferloom.runtime.manifest import DIMS, Tiles
from inferloom.targets.base import Scratch
from inferloom.targets.triton.aot import module_text
from tests.interpreter.harness import launch, load_module, pointer, target
from tests.targets.single import Bodies, Body, place, read, results


class Kernels(Bodies):
    """Bodies of one kind for a chip; `levels` picks another than the first configuration of each."""

    def __init__(self, kind: str, bodies: Mapping[str, Body], folder: Path, chip: str = "h100", level: int = 0,
                 **options: Any) -> None:
        super().__init__(kind, bodies)
        self.target = target(chip, **options)
        choices = self.target.choices(self.sources)
        levels = [min(level, len(c.options) - 1) for c in choices]
        self.picked = self.target.pick(self.sources, choices, levels)
        self.module = load_module(module_text(self.picked.kernels), folder)

    def run(self, name: str, inputs: Mapping[str, Any], counts: Mapping[str, int],
            more: Mapping[str, np.ndarray] | None = None, shuffle: int | None = None,
            padded: Mapping[str, int] | None = None) -> list[np.ndarray]:
        made, rng = self.graphs[name], np.random.default_rng(shuffle)
        memory = [place(v, inputs[v.name]) for v in made.inputs] + results(made, counts)
        held = {k: np.ascontiguousarray(v, np.int32) for k, v in (more or {}).items()}
        counts = dict(counts)
        if "seq_starts" in inputs:
            held["q_tiles"], held["d_tiles"] = make_tiles(inputs["seq_starts"], Tiles(*self.picked.tiles))
            counts |= {k: len(held[k]) for k in ("q_tiles", "d_tiles")}
        dims = [counts.get(d, 0) for d in DIMS]
        held["dims"] = np.array([*dims, 0, 0, 0], np.int32)
        grid = [max(n, (padded or {}).get(d, 0)) for d, n in zip(DIMS, dims, strict=True)]
        # Not zeros: what is read without having been written must show.
        scratch = np.random.default_rng(5).integers(0, 255, max(self.picked.scratch, 4), np.uint8)

        def argument(arg: object, type: str) -> Any:
            if isinstance(arg, Scratch):
                return pointer(scratch, arg.offset, type)
            data = held[arg] if isinstance(arg, str) else memory[arg]  # type: ignore[index]
            return pointer(np.append(data.reshape(-1).view(np.uint8), np.zeros(4, np.uint8)) if not data.size
                           else data.reshape(-1).view(np.uint8), 0, type)

        for kernel in (k for k in self.picked.kernels if self.sources[k.source].symbol == name):
            args = [argument(a, t) for a, (_, t) in zip(kernel.args, kernel.parameters)]
            launch(self.module, kernel, args, grid, rng if shuffle is not None else None)
        return [read(v, m) for v, m in zip(made.outputs, memory[len(made.inputs):], strict=True)
                if not isinstance(v.type, STATES)]
