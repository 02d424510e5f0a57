"""CPU: one library of kernels, one plan of calls, four regions of memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch, check_batch, fill_inputs, input_views, plan_blocks
from inferloom.runtime.device.library import KernelLibrary
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.manifest import KERNELS_FILE
from inferloom.runtime.memory import Arena
from inferloom.runtime.top import TopRows
from inferloom.runtime.trace import Timeline

#: Pointers that a CPU kernel takes.
MAX_ARGS = 16


class Call(ctypes.Structure):
    """il_call of the kernels' ABI."""

    _fields_ = [("fn", ctypes.c_void_p), ("args", ctypes.c_void_p * MAX_ARGS), ("dim", ctypes.c_int32),
                ("tile", ctypes.c_int32), ("mult", ctypes.c_int32), ("flags", ctypes.c_int32)]


class CpuDevice:
    """An artifact on the cores of this machine. See `Device` for what it does.

    Give `num_blocks`, or `memory_bytes` for everything together, of which the state gets what the rest leaves.
    `threads` defaults to the cores this process may use; `pin` keeps all but the caller's on a core each. ArtifactError
    when the artifact is damaged, was compiled for another chip, or does not fit; RequestError on arguments that make no
    sense.
    """

    def __init__(self, artifact: Artifact, num_blocks: int | None = None, memory_bytes: int | None = None,
                 threads: int | None = None, pin: bool = False) -> None:
        m = self.manifest = artifact.manifest
        self.timeline: Timeline | None = None
        self.num_blocks = plan_blocks(m, num_blocks, memory_bytes)
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        if not 1 <= self.threads <= 256:
            raise RequestError(f"threads={self.threads} must be 1 to 256")
        artifact.check_chip()
        self._library = KernelLibrary(artifact.read(KERNELS_FILE), str(artifact.path / KERNELS_FILE))
        self._closed, self._steps = False, 0
        self._layout: object | None = None  # of the batch that the inputs hold
        try:
            self._weights = artifact.load_weights()
            self._workspace = Arena(m.memory.workspace, "the workspace")
            self._inputs = Arena(m.memory.inputs, "the step inputs")
            self._state = Arena(self.num_blocks * m.state.bytes_per_block, f"{self.num_blocks} blocks of state")
            self._blocks = self._state.bytes.reshape(self.num_blocks, m.state.bytes_per_block)
            self._views = input_views(m, self._inputs.bytes)
            self._calls = self._plan()
            self._plan_at = ctypes.addressof(self._calls), len(m.plan), self._views["dims"].ctypes.data
            if pin:
                self._library.pin()
            self._library.threads(self.threads)
        except BaseException:
            self.close()
            raise

    def step(self, batch: StepBatch) -> NDArray[np.float32] | TopRows:
        if self.timeline is None:
            self._run(batch, None)
        else:
            self._timed(batch, self.timeline)
        rows, top, memory = len(batch.logit_rows), self.manifest.output.top, self._workspace.bytes
        if top is None:
            return self._logits(0, rows)
        sums = top.sums
        return TopRows(np.ndarray((rows, top.count), np.int64, memory, top.keys),
                       np.ndarray((rows, 2), np.float32, memory, top.stats), partial(self._fetch, self._steps),
                       np.ndarray((rows, sums.count), np.float32, memory, sums.offset) if sums else None,
                       sums.columns if sums else 0)

    def profile(self, batch: StepBatch) -> list[tuple[str, int]]:
        """Run a step; the kernel's symbol and nanoseconds of each call, in order."""
        ns = self._timed(batch, Timeline())
        return [(self.manifest.kernels[call.kernel].symbol, t) for call, t in zip(self.manifest.plan, ns)]

    def _timed(self, batch: StepBatch, timeline: Timeline) -> list[int]:
        m = self.manifest
        times = (ctypes.c_uint64 * max(len(m.plan), 1))()
        self._run(batch, ctypes.addressof(times), timeline)
        ns = [int(t) for t in times[:len(m.plan)]]
        timeline.kernels((m.kernels[call.kernel] for call in m.plan), ns)
        return ns

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for pair in pairs:
            for block in pair:
                self._check_block(block)
        for source, destination in pairs:
            self._blocks[destination] = self._blocks[source]

    def read_block(self, block: int) -> bytes:
        self._check_block(block)
        return self._blocks[block].tobytes()

    def write_block(self, block: int, data: bytes) -> None:
        self._check_block(block)
        if len(data) != self._blocks.shape[1]:
            raise RequestError(f"a block of state has {self._blocks.shape[1]} bytes, got {len(data)}")
        self._blocks[block] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._library.close()
            # Unmapped once no logits of the last step are held any more.
            self.__dict__.pop("_weights", None)
            for name in ("_workspace", "_inputs", "_state", "_blocks", "_views", "_calls"):
                self.__dict__.pop(name, None)

    def __enter__(self) -> CpuDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _run(self, batch: StepBatch, ns: int | None, timeline: Timeline | None = None) -> None:
        self._check_open()
        self._weights.check()
        m = self.manifest
        again = batch.layout is not None and batch.layout is self._layout
        check_batch(batch, m, self.num_blocks, again)
        fill_inputs(batch, m, self._views, again)
        self._layout = batch.layout
        if timeline is not None:
            timeline.mark("inputs")
        self._library.step(*self._plan_at, ns)
        self._steps += 1

    def _fetch(self, step: int, begin: int, end: int) -> NDArray[np.float32]:
        """Rows `begin` to `end` of the logits of step number `step`, which must be the last; they are there until the next."""
        self._check_open()
        if step != self._steps:
            raise RequestError("the logits of a step are gone after the next one: fetch rows before it")
        return self._logits(begin, end)

    def _logits(self, begin: int, end: int) -> NDArray[np.float32]:
        out = self.manifest.output
        return np.ndarray((end - begin, out.vocab), np.float32, self._workspace.bytes, out.offset + begin * out.ld * 4,
                          (out.ld * 4, 4))

    def _plan(self) -> ctypes.Array[Call]:
        m = self.manifest
        bases = {"workspace": self._workspace.address, "weights": self._weights.address,
                 "state": self._state.address, "input": self._inputs.address}
        functions = [self._library.symbol(k.symbol) for k in m.kernels]
        calls = (Call * max(len(m.plan), 1))()
        for slot, call in zip(calls, m.plan):
            grid = m.kernels[call.kernel].grid
            slot.fn = functions[call.kernel]
            if len(call.args) > MAX_ARGS:
                raise ArtifactError(f"kernel {m.kernels[call.kernel].symbol} takes {len(call.args)} pointers, a CPU "
                                    f"kernel at most {MAX_ARGS}: compile the model again")
            slot.dim, slot.tile, slot.mult = grid.dim, grid.tile, grid.mult
            for i, arg in enumerate(call.args):
                if arg.name is not None:
                    slot.args[i] = self._views[arg.name].ctypes.data
                elif arg.offset is not None:
                    slot.args[i] = bases[arg.space] + arg.offset
        return calls

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the device is closed")

    def _check_block(self, block: int) -> None:
        self._check_open()
        if not 0 <= block < self.num_blocks:
            raise RequestError(f"block {block} does not exist: there are {self.num_blocks}")
