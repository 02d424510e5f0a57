"""A file in memory at once: mapped from the page cache under a lease, and copied when there is time.

Bytes that are mapped could change after they were hashed. A read lease (fcntl(2), F_SETLEASE) keeps that from happening:
the system grants it only while nobody has the file open for writing, and makes whoever opens it for writing, or cuts it
short, wait for its end, but no longer than `lease-break-time` (45 s). By then the bytes are copied. The copy is in huge
pages, and takes the place of the file piece by piece, under the same addresses, while others read there. Then the lease
ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import sys
import threading
import time
import weakref
from functools import cache
from typing import Any

import numpy as np

from inferloom.runtime.errors import ArtifactError

LEAST, MOST = 64 << 20, 8 << 30
"""Bytes of a file that is mapped: fewer are read as fast, more might not be copied in time for one who waits."""
RESIDENT = 0.95
"""Share of its pages that must be in the page cache."""
CALM = 60.0
"""Seconds until the copy is begun although nobody waits for it: loading and short runs are over by then."""
POLL = 0.5
"""Seconds between looks for somebody who waits."""
REST = 9
"""How many times as long as it copies the copier rests, while nobody waits."""
_HUGE = 2 << 20
_PIECE = 4 * _HUGE
_MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0x10, 0x4000, 0x8000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2


class MappedFile:
    """A file's bytes at `address`, which is aligned to huge pages, for as long as this object is there.

    `bytes` is a uint8 array of them, which does not keep them there.
    """

    def __init__(self, region: _Region) -> None:
        self._region, self.address = region, region.address
        self.bytes = np.frombuffer((ctypes.c_ubyte * region.size).from_address(region.address), np.uint8)
        weakref.finalize(self, region.close).atexit = False
        region.copier.start()

    @staticmethod
    def open(path: str | os.PathLike[str], size: int) -> MappedFile | None:
        """The file, unless it should rather be read.

        That is so when it is small or huge or not in the page cache, has another size, is somebody else's, is open for
        writing, or lies where the system has no leases.
        """
        if not LEAST <= size <= MOST or not sys.platform.startswith("linux") or sys.maxsize < 2**32:
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None  # whoever reads it says why
        try:
            # Its holder is told of a break by a signal that does nothing by default: it looks for itself.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            if os.fstat(fd).st_size == size and (region := _Region.map(fd, size, os.fspath(path))) is not None:
                return MappedFile(region)
        except OSError:
            pass
        os.close(fd)
        return None

    def check(self) -> None:
        """ArtifactError when the bytes are no longer sure to be the file's."""
        if self._region.lost is not None:
            raise ArtifactError(self._region.lost)


class _Region:
    """The memory, and the thread that copies into it; unlike `MappedFile`, that thread holds it."""

    def __init__(self, fd: int, size: int, reserved: int, reserved_bytes: int, where: str) -> None:
        self._fd, self._where, self._reserved, self._closed = fd, where, (reserved, reserved_bytes), threading.Event()
        self.size, self.address = size, -(-reserved // _HUGE) * _HUGE
        self.lost: str | None = None
        self.copier = threading.Thread(target=self._run, name="inferloom-copy", daemon=True)

    @staticmethod
    def map(fd: int, size: int, where: str) -> _Region | None:
        """None when too little of it is in the page cache. OSError."""
        room = -(-size // _HUGE) * _HUGE + _HUGE
        region = _Region(fd, size, _mmap(None, room, 0, _MAP_NORESERVE | mmap.MAP_ANONYMOUS), room, where)
        try:
            _mmap(region.address, size, mmap.PROT_READ, _MAP_FIXED, fd)
            pages = -(-size // mmap.PAGESIZE)
            present = np.zeros(pages, np.uint8)
            _check(_libc().mincore(region.address, size, present.ctypes.data))
            if np.count_nonzero(present & 1) < RESIDENT * pages:
                region._unmap()
                return None
            _mmap(region.address, size, mmap.PROT_READ, _MAP_FIXED | _MAP_POPULATE, fd)
        except OSError:
            region._unmap()
            raise
        return region

    def close(self) -> None:
        self._closed.set()
        self.copier.join()
        self._unmap()
        self._release()

    def _run(self) -> None:
        at, begin = 0, time.monotonic() + CALM
        while at < self.size and not self._closed.is_set():
            now, awaited = time.monotonic(), fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
            if now < begin and not awaited:
                self._closed.wait(min(POLL, begin - now))
                continue
            try:
                at += self._copy(at)
            except OSError as error:
                if awaited:
                    self.lost = (f"{self._where} is being written to, and cannot be copied before that: {error.strerror}; "
                                 "leave an artifact that is in use as it is, and start again")
                    return
                begin = now + CALM
            else:
                begin = time.monotonic() + REST * (time.monotonic() - now)
        if at >= self.size:
            self._release()

    def _copy(self, at: int) -> int:
        """Put a copy in the place of the next piece; its bytes."""
        libc, size = _libc(), min(_PIECE, -(-(self.size - at) // _HUGE) * _HUGE)
        room = _mmap(None, size + _HUGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_ANONYMOUS)
        copy = -(-room // _HUGE) * _HUGE
        libc.madvise(copy, size, mmap.MADV_HUGEPAGE)  # without huge pages: slower, the same bytes
        ctypes.memmove(copy, self.address + at, min(size, self.size - at))
        try:
            _check(libc.mprotect(copy, size, mmap.PROT_READ))
            if libc.mremap(copy, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, self.address + at) != self.address + at:
                raise _error()
        except OSError:
            libc.munmap(room, size + _HUGE)
            raise
        # What lay beside the copy; its own place may be somebody else's by now.
        for begin, end in ((room, copy), (copy + size, room + size + _HUGE)):
            if begin < end:
                libc.munmap(begin, end - begin)
        return size

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _unmap(self) -> None:
        _libc().munmap(*self._reserved)


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, takes in (("mmap", (address, size, number, number, number, ctypes.c_int64)),
                        ("mremap", (address, size, size, number, address)), ("munmap", (address, size)),
                        ("madvise", (address, size, number)), ("mprotect", (address, size, number)),
                        ("mincore", (address, size, address))):
        function = getattr(library, name)
        function.argtypes = takes
        function.restype = address if name in ("mmap", "mremap") else number
    return library


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int = -1) -> int:
    made = _libc().mmap(address, size, protection, mmap.MAP_PRIVATE | flags, fd, 0)
    if made == ctypes.c_void_p(-1).value:
        raise _error()
    return int(made)


def _check(status: int) -> None:
    if status != 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno() or errno.EINVAL
    return OSError(number, os.strerror(number))
