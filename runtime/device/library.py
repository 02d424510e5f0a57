"""An artifact's shared library, loaded from verified bytes rather than from a path."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import tempfile

from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import ABI


class Library:
    """A loaded kernels.so. `_declare` of a subclass checks that it is what it should be.

    ArtifactError, which names `where` it came from, when it cannot be loaded or is something else.
    """

    def __init__(self, code: bytes, where: str) -> None:
        self._where = where
        # The descriptor stays open as long as the library: the loader knows libraries by path, and a number that
        # is used again would give it the old one.
        self._fd, path = _as_file(code)
        try:
            self._lib = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            os.close(self._fd)
            raise ArtifactError(f"{where} cannot be loaded: {error}; compile the model again") from None
        self._open = True
        try:
            self._declare()
        except BaseException:
            self._unload()
            raise

    def _declare(self) -> None:
        """Check the library's functions and give ctypes their types."""

    def _check_abi(self, function: str, ours: int) -> None:
        self.symbol(function)
        abi = getattr(self._lib, function)()
        if abi != ours:
            raise ArtifactError(f"{self._where} has ABI {abi}, this runtime has {ours}: compile the model again")

    def symbol(self, name: str) -> int:
        """Address of a function. ArtifactError when the library has none of that name."""
        try:
            address = ctypes.cast(getattr(self._lib, name), ctypes.c_void_p).value
        except AttributeError:
            address = None
        if not address:
            raise ArtifactError(f"{self._where} has no function {name!r}: compile the model again")
        return address

    def _unload(self) -> None:
        self._open = False
        unload(self._lib, self._fd)


class KernelLibrary(Library):
    """CPU kernels and their stepper: `symbol`, `threads`, `step`; for one thread at a time."""

    def _declare(self) -> None:
        self.symbol("il_threads"), self.symbol("il_step")
        self._check_abi("il_abi", ABI)
        self._lib.il_step.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
        self._lib.il_step.restype = ctypes.c_int

    def threads(self, count: int) -> None:
        """Run on `count` threads, the caller's included. ArtifactError when they cannot be had."""
        running = self._lib.il_threads(count)
        if running != count:
            raise ArtifactError(f"{count} threads were asked for, {max(running, 0)} could be started: "
                                "ask for fewer, or raise the limit of processes")

    def pin(self) -> None:
        """Keep each of the threads that `threads` starts on a core of its own. ArtifactError when the library cannot."""
        self.symbol("il_pin")
        self._lib.il_pin(1)

    def step(self, calls: int, count: int, dims: int, ns: int | None) -> None:
        """Run `count` calls at address `calls` (il_call[]), with `dims` int32[4] and perhaps `ns` uint64[count]."""
        if self._lib.il_step(calls, count, dims, ns):
            raise ArtifactError("the step could not run: no memory for its stages")

    def close(self) -> None:
        """Stop the threads and unload. Closing twice is fine."""
        if self._open:
            self._lib.il_threads(1)
            self._unload()


def unload(library: ctypes.CDLL, fd: int) -> None:
    """Unload a library and close the descriptor of its file."""
    _ctypes.dlclose(library._handle)
    os.close(fd)


def _as_file(code: bytes) -> tuple[int, str]:
    """An open descriptor of a file with these bytes that no other process can change, and a path to it."""
    try:
        fd = os.memfd_create("inferloom-kernels", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # no memfd here: an unlinked private file
        fd, path = tempfile.mkstemp(prefix="inferloom-kernels-")
        os.unlink(path)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(code)
    return fd, f"/proc/self/fd/{fd}"
