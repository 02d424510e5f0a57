"""Weights: loaded into private memory, and verified there, so that what runs is what was hashed."""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path

from blake3 import blake3

from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import FileInfo
from inferloom.runtime.memory import Arena
from inferloom.runtime.safetensors import TensorInfo, parse_header

_CHUNK = 32 << 20


class Weights:
    """The data section of a safetensors file in memory.

    `address`: of the data section, aligned to 64 bytes. `tensors`: its table, offsets relative to `address`.
    """

    def __init__(self, arena: Arena, data_offset: int, tensors: dict[str, TensorInfo]) -> None:
        self.arena = arena
        self.address = arena.address + data_offset
        self.tensors = tensors


def load_weights(path: Path, info: FileInfo, data_offset: int) -> Weights:
    """Read the file into memory once and verify the copy. ArtifactError when bytes or header are not as recorded."""
    arena = load_verified(path, info)
    header = parse_header(memoryview(arena.bytes), info.bytes, str(path))
    if header.data_offset != data_offset:
        raise ArtifactError(f"{path}: the data section starts at {header.data_offset}, "
                            f"but manifest.weights.data_offset says {data_offset}: compile the model again")
    return Weights(arena, data_offset, header.tensors)


def load_verified(path: Path, info: FileInfo) -> Arena:
    """A file's bytes in an arena, read once; their BLAKE3 is computed over the arena while reading goes on."""
    arena = Arena(info.bytes, str(path))
    whole = memoryview(arena.bytes)
    hasher = blake3(max_threads=blake3.AUTO)
    ready: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()

    def hash_what_is_read() -> None:
        while (span := ready.get()) is not None:
            hasher.update(whole[span[0] : span[1]])

    thread = threading.Thread(target=hash_what_is_read, name="inferloom-verify", daemon=True)
    thread.start()
    try:
        _read(path, whole, ready)
    finally:
        ready.put(None)
        thread.join()
    if hasher.hexdigest() != info.blake3:
        raise ArtifactError(f"{path} is damaged: its BLAKE3 is not the recorded one; copy or compile it again")
    return arena


def _read(path: Path, whole: memoryview, ready: queue.SimpleQueue[tuple[int, int] | None]) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ArtifactError(f"cannot open {path}: {error.strerror}") from None
    with os.fdopen(fd, "rb", buffering=0) as file:
        at = 0
        while at < len(whole):
            count = file.readinto(whole[at : at + _CHUNK])
            if not count:
                raise ArtifactError(f"{path} ends after {at} of {len(whole)} bytes; copy or compile it again")
            ready.put((at, at + count))
            at += count
