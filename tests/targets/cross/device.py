"""A step's plan on a device that is reached by source code: what a program that runs such artifacts has to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch, check_batch, fill_inputs, input_views
from inferloom.runtime.manifest import Kernel, inputs_layout
from tests.targets.cross.job import BLOCKS, weights_of

SPACES = ("input", "state", "weights", "workspace")


class Device:
    """A device's memory and programs; subclasses speak its language."""

    def __init__(self, sizes: dict[str, int]) -> None:
        raise NotImplementedError

    def write(self, space: str, data: bytes) -> None:
        raise NotImplementedError

    def read(self, space: str, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def build(self, kernel: Kernel, source: str) -> object:
        """Compile a kernel's source."""
        raise NotImplementedError

    def launch(self, program: object, kernel: Kernel, chunks: int, scalars: Sequence[int]) -> None:
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
            chunks = grid.mult * (1 if grid.dim < 0 else -(-counts[grid.dim] // grid.tile))
            begins = [places[a.name][0] if a.name is not None else a.offset or 0 for a in call.args]
            assert all(b % 4 == 0 for b in begins)
            made.launch(programs[call.kernel], kernel, chunks, [*(b // 4 for b in begins), chunks])
        out = m.output
        rows = np.frombuffer(made.read("workspace", out.offset, len(step.logit_rows) * out.ld * 4), np.float32)
        results.append(rows.reshape(-1, out.ld)[:, :out.vocab].copy())
    return results
