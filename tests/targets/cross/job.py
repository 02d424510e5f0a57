"""Steps of an artifact as one file, which a driver in another language replays on another chip.

    header    int32 calls, steps; int64 bytes of weights, workspace, state, inputs; int64 offset and bytes of the output
    weights   their bytes
    calls     symbol (64 bytes), int32 dim, tile, mult, arguments; int64 space[16], offset[16]
    steps     int32 dims[8], bytes of the inputs

The driver writes the output's bytes of the workspace after each step.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch, check_batch, fill_inputs, input_views
from inferloom.runtime.device.cpu import CpuDevice
from inferloom.runtime.manifest import Grid, Manifest, inputs_layout

SPACES = ("weights", "workspace", "state", "input")
BLOCKS = 16


def batch(m: Manifest, *sequences: tuple[Sequence[int], int, int]) -> StepBatch:
    """A step that appends (tokens, how many there are already, first block) to sequences; the last logits of each."""
    counts = [len(tokens) for tokens, _, _ in sequences]
    positions = [np.arange(done, done + n) for (_, done, _), n in zip(sequences, counts)]
    size = m.state.block_tokens
    slots = [first * size + p for (_, _, first), p in zip(sequences, positions)]
    starts = np.cumsum([0, *counts])
    tables = [np.arange(first, first + m.dims.blocks_per_seq) % BLOCKS for _, _, first in sequences]

    def int32(x: object) -> np.ndarray:
        return np.ascontiguousarray(x, np.int32)

    return StepBatch(int32(np.concatenate([t for t, _, _ in sequences])), int32(np.concatenate(positions)),
                     int32(np.concatenate(slots))[None], int32(starts),
                     int32([done + n for (_, done, _), n in zip(sequences, counts)]), int32(tables)[None],
                     int32(starts[1:] - 1))


def pack(sizes: Sequence[int], output: tuple[int, int], weights: bytes,
         calls: Sequence[tuple[str, Grid, Sequence[tuple[str, int]]]],
         steps: Sequence[tuple[Sequence[int], bytes]]) -> bytes:
    """A job: sizes of the spaces in their order, offset and bytes of the output, and (dims, inputs) of each step."""
    parts = [struct.pack("<2i6q", len(calls), len(steps), *sizes, *output), weights]
    for symbol, grid, args in calls:
        pad = [0] * (16 - len(args))
        parts.append(struct.pack("<64s4i16q16q", symbol.encode(), grid.dim, grid.tile, grid.mult, len(args),
                                 *[SPACES.index(space) for space, _ in args], *pad, *[at for _, at in args], *pad))
    for dims, inputs in steps:
        parts += [struct.pack("<8i", *dims, *[0] * (8 - len(dims))), inputs]
    return b"".join(parts)


def model_job(artifact: Artifact, steps: Sequence[StepBatch]) -> bytes:
    """The job of a model's steps; its output is the logits."""
    m = artifact.manifest
    sizes = (m.weights.bytes, m.memory.workspace, BLOCKS * m.state.bytes_per_block, m.memory.inputs)
    places = inputs_layout(m.dims, m.tiles, m.state)[0]
    calls = []
    for call in m.plan:
        kernel = m.kernels[call.kernel]
        args = [(str(a.space), places[a.name][0] if a.name is not None else a.offset or 0) for a in call.args]
        calls.append((kernel.symbol, kernel.grid, args))
    memory = np.zeros(m.memory.inputs, np.uint8)
    filled = []
    for step in steps:
        check_batch(step, m, BLOCKS)
        filled.append((fill_inputs(step, m, input_views(m, memory)), memory.tobytes()))
    return pack(sizes, (m.output.offset, m.dims.rows * m.output.ld * 4), weights_of(artifact), calls, filled)


def weights_of(artifact: Artifact) -> bytes:
    """The data section of an artifact's weights."""
    w = artifact.manifest.weights
    return artifact.read(w.file)[w.data_offset:w.data_offset + w.bytes]


def read_output(data: bytes, m: Manifest, steps: Sequence[StepBatch]) -> list[np.ndarray]:
    """The logits of each step, from what a driver wrote."""
    whole = np.frombuffer(data, np.float32).reshape(len(steps), m.dims.rows, m.output.ld)
    return [whole[i, :len(s.logit_rows), :m.output.vocab] for i, s in enumerate(steps)]


def run_here(path: Path, steps: Sequence[StepBatch]) -> list[np.ndarray]:
    """The logits of each step of an artifact for this machine."""
    with CpuDevice(Artifact.open(path), num_blocks=BLOCKS, threads=1) as device:
        return [np.array(device.step(s)) for s in steps]
