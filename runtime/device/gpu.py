"""GPU: kernels as modules of its driver, one table of launches, four regions of its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch, check_batch, fill_inputs, input_views, memory_needed, plan_blocks
from inferloom.runtime.device.launcher import GpuError, GpuInfo, Launch, Launcher
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.manifest import KERNELS_FILE, inputs_layout
from inferloom.runtime.top import TopRows
from inferloom.runtime.trace import Timeline
from inferloom.runtime.weights import CHUNK, stream_weights

#: Sequences of the decode steps that graphs are recorded for; the artifact's most comes on top.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
#: Codes of both drivers for an image that has nothing for this GPU.
OTHER_GPU = (200, 209)


class GpuDevice:
    """An artifact on a GPU. See `Device` for what it does.

    Give `num_blocks`, or `memory_bytes` for everything together, of which the state gets what the rest leaves; with
    neither, nine tenths of what is free there, and no more than the artifact's limits can use.
    `ordinal` is the driver's number of the GPU. With `graphs`, steps in which every sequence has one new token are
    recorded once for each of `BUCKETS`, and then replayed. ArtifactError when the artifact is damaged, was compiled
    for another chip, or does not fit, and when the driver fails; RequestError on arguments that make no sense.
    """

    def __init__(self, artifact: Artifact, num_blocks: int | None = None, memory_bytes: int | None = None,
                 ordinal: int = 0, graphs: bool = True) -> None:
        m = self.manifest = artifact.manifest
        self.timeline: Timeline | None = None
        given = num_blocks is not None or memory_bytes is not None
        self.num_blocks = plan_blocks(m, num_blocks, memory_bytes) if given else 0
        self.graphs = graphs
        if not 0 <= ordinal < 2**31:
            raise RequestError(f"ordinal={ordinal} must be the number of a GPU, from 0")
        if m.chip.driver == "none":
            raise ArtifactError(f"{artifact.path} was compiled for {m.chip.name}, which is no GPU: compile for this GPU")
        artifact.check_chip()
        self._closed = False
        self._regions: dict[str, int] = {}
        self._recorded: dict[int, ctypes.c_void_p] = {}
        self._launcher = Launcher(artifact.read(KERNELS_FILE), str(artifact.path / KERNELS_FILE), m.chip.driver, ordinal)
        try:
            info = self._launcher.info()
            self._check_arch(artifact, info)
            functions = self._load(artifact, info)
            info = self._launcher.info()
            if not given:
                useful = memory_needed(m, m.dims.seqs * m.dims.blocks_per_seq)[0]
                self.num_blocks = plan_blocks(m, None, min(info.free // 10 * 9, useful))
            self._check_memory(info)
            self._layout = inputs_layout(m.dims, m.tiles, m.state)[0]
            sizes = {"weights": m.weights.bytes, "workspace": m.memory.workspace, "input": m.memory.inputs,
                     "state": self.num_blocks * m.state.bytes_per_block}
            for space, size in sizes.items():
                self._regions[space] = self._launcher.alloc(size)
            for space in ("workspace", "input", "state"):
                self._launcher.zero(self._regions[space], sizes[space])
            self._send_weights(artifact)
            self._mirror = self._launcher.pinned(m.memory.inputs)
            self._mirror[:] = 0
            self._views = input_views(m, self._mirror)
            self._logits = self._launcher.pinned(m.dims.rows * m.output.ld * 4)
            self._steps, top = 0, m.output.top
            self._top = self._launcher.pinned(top.stats - top.keys + m.dims.rows * 8) if top else self._logits[:0]
            self._launches = self._plan(functions)
        except BaseException:
            self.close()
            raise

    def step(self, batch: StepBatch) -> NDArray[np.float32] | TopRows:
        out, rows, timeline = self.manifest.output, len(batch.logit_rows), self.timeline
        top = out.top

        def enqueue(dims: list[int]) -> None:
            bucket = self._bucket(dims) if self.graphs else None
            if timeline is not None:
                timeline.mark("inputs")
                ns = self._time(dims)
                timeline.kernels((self.manifest.kernels[call.kernel] for call in self.manifest.plan), ns)
            elif bucket is None:
                self._launcher.step(self._launches, dims)
            else:
                self._launcher.replay(self._graph(bucket))
            if rows and top is None:
                self._download(self._logits, out.offset, rows * out.ld * 4)
            elif rows and top is not None:
                self._download(self._top, top.keys, self._top.size)

        self._run(batch, enqueue)
        if top is None:
            return np.ndarray((rows, out.vocab), np.float32, self._logits, 0, (out.ld * 4, 4))
        return TopRows(np.ndarray((rows, top.count), np.int64, self._top),
                       np.ndarray((rows, 2), np.float32, self._top, top.stats - top.keys),
                       partial(self._fetch, self._steps))

    def _fetch(self, step: int, begin: int, end: int) -> NDArray[np.float32]:
        """Rows `begin` to `end` of the logits of step number `step`, which must be the last."""
        self._check_open()
        if step != self._steps:
            raise RequestError("the logits of a step are gone after the next one: fetch rows before it")
        out = self.manifest.output
        self._download(self._logits, out.offset + begin * out.ld * 4, (end - begin) * out.ld * 4)
        self._launcher.sync()
        return np.ndarray((end - begin, out.vocab), np.float32, self._logits, 0, (out.ld * 4, 4)).copy()

    def _download(self, to: NDArray[np.uint8], offset: int, size: int) -> None:
        """Copy from the workspace."""
        if size:
            self._launcher.download(to.ctypes.data, self._regions["workspace"] + offset, size)

    def profile(self, batch: StepBatch) -> list[tuple[str, int]]:
        """Run a step, never as a graph; the kernel's symbol and nanoseconds of each call, in order (0: skipped)."""
        times: list[int] = []
        self._run(batch, lambda dims: times.extend(self._time(dims)))
        return [(self.manifest.kernels[call.kernel].symbol, ns) for call, ns in zip(self.manifest.plan, times)]

    def _time(self, dims: list[int]) -> list[int]:
        return [round(us * 1000) for us in self._launcher.time(self._launches, dims)]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        places = [(self._block(source), self._block(destination)) for source, destination in pairs]
        for source, destination in places:
            if source != destination:
                self._launcher.copy(destination, source, self.manifest.state.bytes_per_block)

    def read_block(self, block: int) -> bytes:
        place, data = self._block(block), ctypes.create_string_buffer(self.manifest.state.bytes_per_block)
        self._launcher.download(ctypes.addressof(data), place, len(data))
        self._launcher.sync()
        return data.raw

    def write_block(self, block: int, data: bytes) -> None:
        place, size = self._block(block), self.manifest.state.bytes_per_block
        if len(data) != size:
            raise RequestError(f"a block of state has {size} bytes, got {len(data)}")
        self._launcher.upload(place, np.frombuffer(data, np.uint8).ctypes.data, size)
        self._launcher.sync()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # After a fault the driver refuses everything, and frees it with the context.
        for graph in self._recorded.values():
            with suppress(GpuError):
                self._launcher.drop(graph)
        for address in self._regions.values():
            with suppress(GpuError):
                self._launcher.free(address)
        # The GPU is closed, and the logits' memory goes, once no logits of the last step are held any more.
        for name in ("_launcher", "_mirror", "_views", "_logits", "_top", "_launches"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> GpuDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _run(self, batch: StepBatch, enqueue: Callable[[list[int]], None]) -> None:
        """Upload a batch, enqueue work over it (given the counts of `DIMS`), and wait until all is over."""
        self._check_open()
        m = self.manifest
        check_batch(batch, m, self.num_blocks)
        dims = fill_inputs(batch, m, self._views)
        self._steps += 1
        tiles, count = ("d_tiles", dims[4]) if dims[4] else ("q_tiles", dims[3])
        offset, _ = self._layout[tiles]
        try:
            self._upload(0, offset + count * 12)
            for i in range(m.state.kv_tables):
                self._upload(self._layout[f"block_tables{i or ''}"][0], dims[1] * m.dims.blocks_per_seq * 4)
            enqueue(dims)
        except GpuError:
            with suppress(GpuError):  # what was enqueued still reads the inputs
                self._launcher.sync()
            raise
        self._launcher.sync()

    def _upload(self, begin: int, size: int) -> None:
        self._launcher.upload(self._regions["input"] + begin, self._mirror.ctypes.data + begin, size)

    def _bucket(self, dims: list[int]) -> int | None:
        """The number of sequences of the graph that can do a step, if one can."""
        tokens, seqs, rows, q_tiles, _ = dims
        most = self.manifest.dims
        bucket = next((b for b in BUCKETS if seqs <= b < most.seqs), most.seqs)
        return None if q_tiles or tokens != seqs or rows > min(bucket, most.rows) else bucket

    def _graph(self, bucket: int) -> ctypes.c_void_p:
        if bucket not in self._recorded:
            most = self.manifest.dims
            dims = [min(bucket, most.tokens), bucket, min(bucket, most.rows), 0, bucket]
            self._recorded[bucket] = self._launcher.capture(self._launches, dims)
        return self._recorded[bucket]

    def _check_arch(self, artifact: Artifact, info: GpuInfo) -> None:
        chip = self.manifest.chip
        if chip.driver == "cuda" and chip.arch != "sm_{}{}".format(*info.capability):
            major, minor = info.capability
            raise ArtifactError(f"{artifact.path} was compiled for chip {chip.name} ({chip.arch}), this GPU is "
                                f"{info.name} (sm_{major}{minor}): compile for this GPU")

    def _check_memory(self, info: GpuInfo) -> None:
        m = self.manifest
        needed, sum_ = memory_needed(m, self.num_blocks)
        if needed > info.free:
            raise ArtifactError(f"{m.model.name} needs {needed:,} bytes of GPU memory, {info.name} has {info.free:,} "
                                f"of {info.total:,} free: {sum_}; end what else uses the GPU, ask for less, or compile "
                                "with smaller limits")

    def _load(self, artifact: Artifact, info: GpuInfo) -> list[int]:
        """Addresses of the kernels, each from a module of its own."""
        chip, functions = self.manifest.chip, []
        for kernel in self.manifest.kernels:
            launch = kernel.launch
            if launch is None:
                raise ArtifactError(f"{artifact.path}: kernel {kernel.symbol} is not for a GPU: compile the model again")
            try:
                module = self._launcher.module(artifact.read(launch.file))
            except GpuError as error:
                if error.code not in OTHER_GPU:
                    raise
                raise ArtifactError(f"{artifact.path} was compiled for chip {chip.name} ({chip.arch}), this GPU is "
                                    f"{info.name}, which cannot load it: compile for this GPU ({error})") from None
            functions.append(self._launcher.function(module, kernel.symbol, launch.shared))
        return functions

    def _send_weights(self, artifact: Artifact) -> None:
        w, launcher, to = self.manifest.weights, self._launcher, self._regions["weights"]
        info = self.manifest.files[w.file]
        buffers = [memoryview(launcher.pinned(min(CHUNK, info.bytes))) for _ in range(2)]

        def send(piece: memoryview, offset: int) -> None:
            launcher.upload(to + offset, np.frombuffer(piece, np.uint8).ctypes.data, len(piece))

        stream_weights(artifact.path / w.file, info, w.data_offset, buffers, send, launcher.sync)

    def _plan(self, functions: list[int]) -> ctypes.Array[Launch]:
        m = self.manifest
        launches = (Launch * len(m.plan))()
        for slot, call in zip(launches, m.plan):
            kernel = m.kernels[call.kernel]
            slot.function, slot.nargs = functions[call.kernel], len(call.args)
            slot.dim, slot.tile, slot.mult = kernel.grid.dim, kernel.grid.tile, kernel.grid.mult
            if kernel.launch is not None:
                slot.threads, slot.shared = kernel.launch.threads, kernel.launch.shared
                slot.least, slot.most = kernel.launch.least, kernel.launch.most
            for i, arg in enumerate(call.args):
                offset = self._layout[arg.name][0] if arg.name is not None else arg.offset or 0
                slot.args[i] = self._regions[arg.space] + offset
        return launches

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the device is closed")

    def _block(self, block: int) -> int:
        """The address of a block of state."""
        self._check_open()
        if not 0 <= block < self.num_blocks:
            raise RequestError(f"block {block} does not exist: there are {self.num_blocks}")
        return self._regions["state"] + block * self.manifest.state.bytes_per_block
