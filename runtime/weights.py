"""Weights: verified in the memory that they are used from, so that what runs is what was hashed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import FileInfo
from inferloom.runtime.mapping import MappedFile
from inferloom.runtime.memory import Arena
from inferloom.runtime.safetensors import Header, TensorInfo, parse_header

CHUNK = 32 << 20
"""Bytes that are read at once."""
READERS = 8
"""Threads that read at most."""


class Weights:
    """The data section of a safetensors file in memory.

    `address`: of the data section, aligned to 64 bytes. `tensors`: its table, offsets relative to `address`. `memory`: of
    the whole file.
    """

    def __init__(self, memory: Arena | MappedFile, data_offset: int, tensors: dict[str, TensorInfo]) -> None:
        self.memory = memory
        self.address = memory.address + data_offset
        self.tensors = tensors

    def check(self) -> None:
        """ArtifactError when what is in memory is no longer sure to be what was verified."""
        if isinstance(self.memory, MappedFile):
            self.memory.check()


def load_weights(path: Path, info: FileInfo, data_offset: int) -> Weights:
    """Map the file, or read it into memory, and verify it there. ArtifactError when bytes or header are not as recorded."""
    memory: Arena | MappedFile | None = MappedFile.open(path, info.bytes)
    if memory is None:
        memory = load_verified(path, info)
    else:
        hasher = blake3(max_threads=blake3.AUTO)
        hasher.update(memoryview(memory.bytes))
        _check_hash(hasher, path, info)
    return Weights(memory, data_offset, _header(memoryview(memory.bytes), path, info, data_offset).tensors)


def stream_weights(path: Path, info: FileInfo, data_offset: int, buffers: Sequence[memoryview],
                   send: Callable[[memoryview, int], None], wait: Callable[[], None]) -> dict[str, TensorInfo]:
    """Send the data section elsewhere in pieces, each hashed in the buffer it is sent from; its table of tensors.

    `buffers`: two of equal size. `send(piece, to)` begins to copy a piece of a buffer to byte `to` of the section;
    `wait()` returns when all that was sent has arrived. What arrived may be used only once this has returned:
    ArtifactError when bytes or header are not as recorded.
    """
    hasher, head = blake3(max_threads=blake3.AUTO), bytearray()
    with ThreadPoolExecutor(1, "inferloom-verify") as pool:
        hashed: Future[object] | None = None
        try:
            for at, piece in _pieces(path, info.bytes, buffers):
                # The buffer before this one is the next to be read into: it must have been hashed and sent.
                if hashed is not None:
                    hashed.result()
                wait()
                hashed = pool.submit(hasher.update, piece)
                skip = min(max(data_offset - at, 0), len(piece))
                head += piece[:skip]
                if skip < len(piece):
                    send(piece[skip:], at + skip - data_offset)
        finally:
            if hashed is not None:
                hashed.result()
            wait()
    _check_hash(hasher, path, info)
    return _header(memoryview(head), path, info, data_offset).tensors


def _header(data: memoryview, path: Path, info: FileInfo, data_offset: int) -> Header:
    header = parse_header(data, info.bytes, str(path))
    if header.data_offset != data_offset:
        raise ArtifactError(f"{path}: the data section starts at {header.data_offset}, "
                            f"but manifest.weights.data_offset says {data_offset}: compile the model again")
    return header


def _check_hash(hasher: blake3, path: Path, info: FileInfo) -> None:
    if hasher.hexdigest() != info.blake3:
        raise ArtifactError(f"{path} is damaged: its BLAKE3 is not the recorded one; copy or compile it again")


def load_verified(path: Path, info: FileInfo) -> Arena:
    """A file's bytes in an arena, read once, by several threads; their BLAKE3 is computed over the arena meanwhile."""
    arena = Arena(info.bytes, str(path))
    whole, hasher = memoryview(arena.bytes), blake3(max_threads=blake3.AUTO)
    starts = range(0, len(whole), CHUNK)
    fd = _open(path)
    try:
        def read(at: int) -> memoryview:
            piece, got = whole[at : at + CHUNK], 0
            while got < len(piece):
                count = os.preadv(fd, [piece[got:]], at + got)
                if not count:
                    raise _ends(path, at + got, len(whole))
                got += count
            return piece

        if len(starts) < 2:
            for at in starts:
                hasher.update(read(at))
        else:
            with ThreadPoolExecutor(min(len(starts), len(os.sched_getaffinity(0)), READERS), "inferloom-read") as pool:
                for piece in pool.map(read, starts):
                    hasher.update(piece)
    finally:
        os.close(fd)
    _check_hash(hasher, path, info)
    return arena


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ArtifactError(f"cannot open {path}: {error.strerror}") from None


def _ends(path: Path, at: int, size: int) -> ArtifactError:
    return ArtifactError(f"{path} ends after {at} of {size} bytes; copy or compile it again")


def _pieces(path: Path, size: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, memoryview]]:
    """Read a file into the buffers in turn, each filled before it is given out; where each piece begins."""
    with os.fdopen(_open(path), "rb", buffering=0) as file:
        at = number = 0
        while at < size:
            buffer = buffers[number % len(buffers)][: size - at]
            got = 0
            while got < len(buffer):
                count = file.readinto(buffer[got:])
                if not count:
                    raise _ends(path, at + got, size)
                got += count
            yield at, buffer
            at, number = at + got, number + 1
