"""Devices: what holds an artifact's weights and state in memory and runs its steps."""

from __future__ import annotations

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import Device


def open_device(artifact: Artifact, memory_bytes: int | None, threads: int | None, gpu: int, pin: bool) -> Device:
    """An artifact on the device of its chip: `threads` and `pin` are a CPU's, `gpu` is the driver's number of a GPU."""
    # Only what is used is imported: a process starts sooner.
    if artifact.manifest.chip.driver == "none":
        from inferloom.runtime.device.cpu import CpuDevice

        return CpuDevice(artifact, memory_bytes=memory_bytes, threads=threads, pin=pin)
    from inferloom.runtime.device.gpu import GpuDevice

    return GpuDevice(artifact, memory_bytes=memory_bytes, ordinal=gpu)
