"""The GPU launcher of an artifact: its C functions, with errors as exceptions. See targets/triton/launcher.c."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.device.library import Library, unload
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import MAX_ARGS

ABI = 1
_OUT = POINTER(c_void_p)
_LAUNCHES = (c_void_p, c_void_p, c_int32, POINTER(c_int32))
_FUNCTIONS: dict[str, tuple[object, ...]] = {
    "open": (c_char_p, c_int32, _OUT), "close": (c_void_p,),
    "info": (c_void_p, c_char_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_int32), POINTER(c_int32)),
    "module": (c_void_p, c_char_p, _OUT), "function": (c_void_p, c_void_p, c_char_p, c_uint32, _OUT),
    "alloc": (c_void_p, c_uint64, POINTER(c_uint64)), "free": (c_void_p, c_uint64),
    "pinned": (c_void_p, c_uint64, _OUT), "unpin": (c_void_p, c_void_p),
    "upload": (c_void_p, c_uint64, c_void_p, c_uint64), "download": (c_void_p, c_void_p, c_uint64, c_uint64),
    "copy": (c_void_p, c_uint64, c_uint64, c_uint64), "zero": (c_void_p, c_uint64, c_uint64), "sync": (c_void_p,),
    "step": _LAUNCHES, "capture": (*_LAUNCHES, _OUT), "replay": (c_void_p, c_void_p), "drop": (c_void_p, c_void_p),
    "time": (*_LAUNCHES, POINTER(c_float)),
}
_LOST = "close the device and open the artifact again; if it happens again, compile the model again"
#: What to do about a failure of these; of the others, see _LOST.
_ADVICE = {
    "open": "is there a free GPU of that number, and may this process use it?",
    "alloc": "free memory of the GPU, give less memory, or compile with smaller limits",
    "pinned": "free memory of this machine, or raise the limit of locked memory",
    "function": "compile the model again for this GPU",
    "capture": "open the device with graphs=False",
}


class GpuError(ArtifactError):
    """A call of the driver failed with `code`, or the launcher refused it (-1)."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Launch(ctypes.Structure):
    """il_launch of the launcher's ABI."""

    _fields_ = [("function", c_void_p), ("args", c_uint64 * MAX_ARGS), ("nargs", c_int32), ("dim", c_int32),
                ("tile", c_int32), ("mult", c_int32), ("least", c_int32), ("most", c_int32), ("threads", c_uint32),
                ("shared", c_uint32)]


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """A GPU's name, bytes of memory that are free and in all, compute capability."""

    name: str
    free: int
    total: int
    capability: tuple[int, int]


class Launcher(Library):
    """A GPU, opened by the launcher in an artifact; for one thread at a time.

    Addresses are those of the GPU's memory. Copies run in the order they are asked for, together with steps, and
    are over after `sync`; an upload's source must not change before that. Every failure is a GpuError that
    says which driver call failed, with which code, and what to do. The GPU is closed when neither the launcher nor
    pinned memory from it is held any more.
    """

    def __init__(self, code: bytes, where: str, driver: str, ordinal: int) -> None:
        super().__init__(code, where)
        self._gpu = c_void_p()
        self._images: list[bytes] = []
        try:
            self._call("open", driver.encode(), ordinal, ctypes.byref(self._gpu), gpu=False)
        except BaseException:
            self._unload()
            raise
        weakref.finalize(self, _close, self._lib, self._gpu, self._fd, self._images)

    def _declare(self) -> None:
        self._check_abi("il_gpu_abi", ABI)
        self.symbol("il_gpu_error")
        self._lib.il_gpu_error.restype = c_char_p
        for name, types in _FUNCTIONS.items():
            self.symbol(f"il_gpu_{name}")
            getattr(self._lib, f"il_gpu_{name}").argtypes = types

    def _call(self, name: str, *args: object, gpu: bool = True) -> None:
        if code := getattr(self._lib, f"il_gpu_{name}")(*((self._gpu, *args) if gpu else args)):
            text = self._lib.il_gpu_error().decode("utf-8", "replace")
            raise GpuError(f"GPU: {text}; {_ADVICE.get(name, _LOST)}", code)

    def info(self) -> GpuInfo:
        name, numbers = ctypes.create_string_buffer(256), (c_uint64(), c_uint64(), c_int32(), c_int32())
        self._call("info", name, *(ctypes.byref(n) for n in numbers))
        free, total, major, minor = (n.value for n in numbers)
        return GpuInfo(name.value.decode("utf-8", "replace"), free, total, (major, minor))

    def module(self, image: bytes) -> c_void_p:
        """Load a cubin or code object."""
        self._images.append(image)  # HIP reads it as long as the module lives
        module = c_void_p()
        self._call("module", image, ctypes.byref(module))
        return module

    def function(self, module: c_void_p, name: str, shared: int) -> int:
        """A kernel of a module, to be launched with at most `shared` bytes of dynamic shared memory."""
        function = c_void_p()
        self._call("function", module, name.encode(), shared, ctypes.byref(function))
        return function.value or 0

    def alloc(self, size: int) -> int:
        address = c_uint64()
        self._call("alloc", max(size, 1), ctypes.byref(address))
        return address.value

    def free(self, address: int) -> None:
        self._call("free", address)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Page-locked memory, which the GPU copies without the CPU; given back when no array over it is held."""
        address = c_void_p()
        self._call("pinned", max(size, 1), ctypes.byref(address))
        return np.asarray(_Pinned(self, address.value or 0, size))

    def upload(self, to: int, source: int, size: int) -> None:
        """`source`: an address in this process."""
        self._call("upload", to, source, size)

    def download(self, to: int, source: int, size: int) -> None:
        """`to`: an address in this process."""
        self._call("download", to, source, size)

    def copy(self, to: int, source: int, size: int) -> None:
        self._call("copy", to, source, size)

    def zero(self, to: int, size: int) -> None:
        self._call("zero", to, size)

    def sync(self) -> None:
        """Wait until everything that was asked for is over."""
        self._call("sync")

    def step(self, launches: ctypes.Array[Launch], dims: Sequence[int]) -> None:
        """Enqueue a step of these counts (`manifest.DIMS`)."""
        self._call("step", launches, len(launches), _dims(dims))

    def capture(self, launches: ctypes.Array[Launch], dims: Sequence[int]) -> c_void_p:
        """A graph of a step, not run yet."""
        graph = c_void_p()
        self._call("capture", launches, len(launches), _dims(dims), ctypes.byref(graph))
        return graph

    def replay(self, graph: c_void_p) -> None:
        self._call("replay", graph)

    def drop(self, graph: c_void_p) -> None:
        self._call("drop", graph)

    def time(self, launches: ctypes.Array[Launch], dims: Sequence[int]) -> list[float]:
        """Run a step to its end; microseconds of each launch, 0 for those that were skipped."""
        times = (c_float * len(launches))()
        self._call("time", launches, len(launches), _dims(dims), times)
        return list(times)


class _Pinned:
    """What NumPy arrays over pinned memory hold on to."""

    def __init__(self, launcher: Launcher, address: int, size: int) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, False)}
        weakref.finalize(self, _unpin, launcher, address)


def _unpin(launcher: Launcher, address: int) -> None:
    launcher._lib.il_gpu_unpin(launcher._gpu, address)  # there is nothing to be done about a failure


def _close(library: ctypes.CDLL, gpu: c_void_p, fd: int, images: list[bytes]) -> None:
    library.il_gpu_close(gpu)
    images.clear()
    unload(library, fd)


def _dims(counts: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * 8)(*counts)
