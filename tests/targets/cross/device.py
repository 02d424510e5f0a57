"""A step's plan on a device that is reached by source code: what a program that runs such artifacts has to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from inferloom.ir.types import STATES
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch, check_batch, fill_inputs, input_views
from inferloom.runtime.manifest import inputs_layout
from inferloom.targets.base import Logits
from inferloom.targets.chips import find
from inferloom.targets.select import target_for
from tests.targets.cross.job import BLOCKS, weights_of
from tests.targets.single import Bodies, Body, place, read, results

SPACES = ("input", "state", "weights", "workspace")


class Device:
    """A device's memory and programs; subclasses speak its language."""

    def __init__(self, sizes: dict[str, int]) -> None:
        raise NotImplementedError

    def write(self, space: str, data: bytes) -> None:
        raise NotImplementedError

    def read(self, space: str, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def build(self, kernel: Any, source: str) -> object:
        """Compile a kernel's source."""
        raise NotImplementedError

    def launch(self, program: object, kernel: Any, chunks: int, scalars: Sequence[int]) -> None:
        """Run `chunks` work-groups; a kernel's arguments are the four buffers, then the scalars."""
        raise NotImplementedError


def run(device: type[Device], artifact: Artifact, steps: Sequence[StepBatch]) -> list[np.ndarray]:
    """The logits of each step."""
    m = artifact.manifest
    sizes = {"input": m.memory.inputs, "state": BLOCKS * m.state.bytes_per_block, "weights": m.weights.bytes,
             "workspace": m.memory.workspace}
    made = device(sizes)
    made.write("weights", weights_of(artifact))
    for space in ("state", "workspace"):
        made.write(space, bytes(sizes[space]))
    programs = [made.build(k, artifact.read(k.launch.file).decode()) for k in m.kernels if k.launch is not None]
    places = inputs_layout(m.dims, m.tiles, m.state)[0]
    memory, results = np.zeros(m.memory.inputs, np.uint8), []
    for step in steps:
        check_batch(step, m, BLOCKS)
        counts = fill_inputs(step, m, input_views(m, memory))
        made.write("input", memory.tobytes())
        for call in m.plan:
            kernel = m.kernels[call.kernel]
            grid = kernel.grid
            chunks = grid.mult * -(-counts[grid.dim] // grid.tile)
            begins = [places[a.name][0] if a.name is not None else a.offset or 0 for a in call.args]
            assert all(b % 4 == 0 for b in begins)
            made.launch(programs[call.kernel], kernel, chunks, [*(b // 4 for b in begins), chunks])
        out = m.output
        rows = np.frombuffer(made.read("workspace", out.offset, len(step.logit_rows) * out.ld * 4), np.float32)
        results.append(rows.reshape(-1, out.ld)[:, :out.vocab].copy())
    return results


class SourceKernels(Bodies):
    """Bodies of one kind compiled for a chip that takes source, and run on a device."""

    def __init__(self, kind: str, bodies: Mapping[str, Body], device: type[Device], chip: str) -> None:
        super().__init__(kind, bodies)
        # Names of cases may be words of the language; those of an artifact's kernels never are.
        self.sources = [replace(s, symbol=f"k_{s.symbol}") for s in self.sources]
        target = target_for(find(chip))
        self.device, self.module = device, target.compile_kernels(self.sources, Logits(1, 1, 1), print)
        self.infos = {info.symbol: info for info in self.module.kernels}

    def run(self, name: str, inputs: Mapping[str, Any], counts: Mapping[str, int],
            more: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
        made, info = self.graphs[name], self.infos[f"k_{name}"]
        memory = [place(v, inputs[v.name]) for v in made.inputs] + results(made, counts)
        held = {k: np.ascontiguousarray(v, np.int32) for k, v in (more or {}).items()}
        sizes = (counts.get("tokens", 0), counts.get("seqs", 0), counts.get("rows", 0), len(held.get("q_tiles", ())))
        held["dims"] = np.array([*sizes, 0, 0, 0, 0], np.int32)
        layouts = next(s for s in self.sources if s.symbol == info.symbol).layouts
        parts: dict[str, list[np.ndarray]] = {space: [] for space in SPACES}
        begins = []
        for arg in info.args:
            space = "input" if isinstance(arg, str) else layouts[arg].space
            data = held[arg] if isinstance(arg, str) else memory[arg]
            begins.append((space, sum(p.nbytes for p in parts[space])))
            parts[space].append(np.resize(np.ascontiguousarray(data).view(np.uint8).reshape(-1), -(-data.nbytes // 64) * 64))
        device = self.device({space: sum(p.nbytes for p in each) for space, each in parts.items()})
        for space, each in parts.items():
            if each:
                device.write(space, np.concatenate(each).tobytes())
        chunks = info.grid.mult * -(-sizes[info.grid.dim] // info.grid.tile)
        program = device.build(info, self.module.files[info.launch.file].decode())
        device.launch(program, info, chunks, [*(at // 4 for _, at in begins), chunks])
        for arg, (space, at) in zip(info.args, begins):
            if not isinstance(arg, str) and space in ("workspace", "state"):
                memory[arg].view(np.uint8).reshape(-1)[:] = np.frombuffer(device.read(space, at, memory[arg].nbytes), np.uint8)
        return [read(v, x) for v, x in zip(made.outputs, memory[len(made.inputs):], strict=True)
                if not isinstance(v.type, STATES)]
