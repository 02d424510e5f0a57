"""OpenCL and WebGPU artifacts on software devices: a whole model's steps against this machine's."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferloom
from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.errors import ArtifactError
from tests.targets.cross.conftest import missing, steps
from tests.targets.cross.device import SPACES, Device, run
from tests.targets.cross.job import run_here


class OpenCL(Device):
    """The first OpenCL device there is, such as PoCL's."""

    def __init__(self, sizes: dict[str, int]) -> None:
        try:
            import pyopencl as cl

            devices = [d for p in cl.get_platforms() for d in p.get_devices()]
        except Exception as error:  # the loader without any driver
            missing(f"an OpenCL device (pyopencl, pocl-opencl-icd): {error}")
        self.cl, self.context = cl, cl.Context(devices[:1])
        self.queue = cl.CommandQueue(self.context)
        self.buffers = {s: cl.Buffer(self.context, cl.mem_flags.READ_WRITE, max(n, 4)) for s, n in sizes.items()}

    def write(self, space: str, data: bytes) -> None:
        self.cl.enqueue_copy(self.queue, self.buffers[space], np.frombuffer(data, np.uint8))

    def read(self, space: str, offset: int, size: int) -> bytes:
        data = np.zeros(size, np.uint8)
        self.cl.enqueue_copy(self.queue, data, self.buffers[space], src_offset=offset)
        return data.tobytes()

    def build(self, kernel: Any, source: str) -> Any:
        return getattr(self.cl.Program(self.context, source).build(), kernel.symbol)

    def launch(self, program: Any, kernel: Any, chunks: int, scalars: Sequence[int]) -> None:
        assert kernel.launch is not None
        threads = kernel.launch.threads
        program(self.queue, (chunks * threads,), (threads,), *(self.buffers[s] for s in SPACES), *map(np.int32, scalars))


class WebGPU(Device):
    """The WebGPU adapter there is, such as Mesa's lavapipe."""

    def __init__(self, sizes: dict[str, int]) -> None:
        try:
            import wgpu

            adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        except Exception as error:
            missing(f"a WebGPU adapter (wgpu, mesa-vulkan-drivers): {error}")
        self.wgpu, self.device = wgpu, adapter.request_device_sync()
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
        self.buffers = {s: self.device.create_buffer(size=max(n, 4), usage=usage) for s, n in sizes.items()}

    def write(self, space: str, data: bytes) -> None:
        self.device.queue.write_buffer(self.buffers[space], 0, data)

    def read(self, space: str, offset: int, size: int) -> bytes:
        return bytes(self.device.queue.read_buffer(self.buffers[space], offset, size))

    def build(self, kernel: Any, source: str) -> Any:
        types = ["storage" if s in kernel.resources["writes"] else "read-only-storage" for s in SPACES] + ["uniform"]
        layout = self.device.create_bind_group_layout(entries=[
            {"binding": i, "visibility": self.wgpu.ShaderStage.COMPUTE, "buffer": {"type": t}} for i, t in enumerate(types)])
        pipeline = self.device.create_compute_pipeline(
            layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
            compute={"module": self.device.create_shader_module(code=source), "entry_point": kernel.symbol})
        return layout, pipeline

    def launch(self, program: Any, kernel: Any, chunks: int, scalars: Sequence[int]) -> None:
        layout, pipeline = program
        x = min(chunks, 65535)
        z = -(-chunks // x)
        # The uniform ends with TVM's own packGridDimX: groups beyond it return at once.
        words = struct.pack(f"<{len(scalars) + 1}i", *scalars, x * z)
        uniform = self.device.create_buffer_with_data(data=words + bytes(-len(words) % 16), usage=self.wgpu.BufferUsage.UNIFORM)
        bound = [self.buffers[s] for s in SPACES] + [uniform]
        group = self.device.create_bind_group(layout=layout, entries=[
            {"binding": i, "resource": {"buffer": b, "offset": 0, "size": b.size}} for i, b in enumerate(bound)])
        encoder = self.device.create_command_encoder()
        work = encoder.begin_compute_pass()
        work.set_pipeline(pipeline)
        work.set_bind_group(0, group)
        work.dispatch_workgroups(x, 1, z)
        work.end()
        self.device.queue.submit([encoder.finish()])


DEVICES = {"opencl": OpenCL, "webgpu": WebGPU}


@pytest.mark.slow
@pytest.mark.parametrize("chip", DEVICES)
def test_step(chip: str, compiled) -> None:  # type: ignore[no-untyped-def]
    there = compiled(chip, "fp32")
    batches = steps(there.manifest)
    got = run(DEVICES[chip], there, batches)
    for g, w in zip(got, run_here(compiled("cpu", "fp32").path, batches), strict=True):
        assert np.abs(g - w).max() <= 1e-5 * w.std(), np.abs(g - w).max() / w.std()
    # A sequence's last logits, of chunks and beside another one, and of one prompt alone.
    assert np.array_equal(got[2][1], got[3][0])


@pytest.mark.parametrize("chip", DEVICES)
def test_artifact(chip: str, compiled) -> None:  # type: ignore[no-untyped-def]
    """What it holds, and that nothing here runs it."""
    there = compiled(chip, "fp32")
    for kernel in there.manifest.kernels:
        assert kernel.launch is not None and kernel.launch.threads == 64 and kernel.launch.shared <= 16_384
        source = there.read(kernel.launch.file).decode()
        assert kernel.symbol in source and kernel.resources["buffers"] == list(SPACES)
        assert set(kernel.resources["writes"]) <= {"state", "workspace"} and kernel.resources["writes"]
    with pytest.raises(ArtifactError, match=f"chip {chip}, which this runtime has no device for"):
        inferloom.LLM(there.path)
    with pytest.raises(ArtifactError, match="no device for"):
        Artifact.open(there.path)


def test_what_does_not_lower_is_named(compiled, traced, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from inferloom.compiler.build import compile_model

    with pytest.raises(UnsupportedError, match="bf16.*opencl.*fp32"):
        compile_model(traced, tmp_path / "x", chip="opencl", dtype="bf16")
