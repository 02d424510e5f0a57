"""Building one device kernel: a work-group for each chunk, buffers by space, and what its threads share.

A kernel takes the four spaces of memory as buffers (all it reads or writes is somewhere in them), then for each of its
arguments where it begins in its space, in elements of four bytes, and the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.targets.base import KernelSource
from inferloom.targets.tvm.emit import bind

Expr = Any
#: Threads of a work-group: as many as a matmul tile has columns.
THREADS = 64
SPACES = {"input": "int32", "state": "float32", "weights": "float32", "workspace": "float32"}
#: TIR wants a size for buffers of which only the caller knows it.
_MOST = 1 << 30


class Group:
    """The threads that work on one chunk, and the memory they share: at most `limit` bytes of it."""

    def __init__(self, thread: Expr, limit: int, where: str) -> None:
        self.thread, self.limit, self.where, self.used = thread, limit, where, 0

    def fits(self, elements: int) -> bool:
        return self.used + 4 * elements <= self.limit

    def shared(self, elements: int, dtype: str = "float32") -> Expr:
        """A buffer that all threads of the group see. UnsupportedError when the device has not so much."""
        if not self.fits(elements):
            raise UnsupportedError(f"{self.where}: {self.used + 4 * elements} bytes of memory for a work-group; the chip "
                                   f"promises {self.limit} (`shared` in chips.toml)")
        self.used += 4 * elements
        return T.alloc_buffer((elements,), dtype, scope="shared")

    def barrier(self) -> None:
        """Wait for the group: what it wrote to shared memory is seen by all."""
        T.evaluate(T.tvm_storage_sync("shared"))

    def spread(self, shape: Sequence[int], body: Callable[[list[Expr]], None]) -> None:
        """Run `body(index)` for every element of `shape`, neighbours on neighbouring threads."""
        size = prod(shape)
        with T.serial(0, -(-size // THREADS)) as turn:
            place = bind(turn * THREADS + self.thread)
            if size % THREADS == 0:
                body(unflatten(place, shape))
                return
            with T.If(place < size):
                with T.Then():
                    body(unflatten(place, shape))


class _Unreadable:
    """An operand that is refused if a kernel does read it."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __getitem__(self, index: object) -> Expr:
        raise UnsupportedError(self.why)


def local(elements: int) -> Expr:
    """A thread's own floats."""
    return T.alloc_buffer((elements,), "float32", scope="local")


def unflatten(place: Expr, shape: Sequence[int]) -> list[Expr]:
    """The index of an element by its row-major place."""
    index: list[Expr] = []
    for size in reversed(shape[1:]):
        index.append(place % size)
        place = place // size
    return [*([place] if shape else []), *reversed(index)]


def device_kernel(source: KernelSource, signature: Sequence[tuple[int | str, str]], limit: int,
                  body: Callable[[list[Expr], Expr, Expr, Group], None]) -> tuple[Any, int]:
    """A PrimFunc, and the bytes its groups share: `body(views, dims, chunk, group)` emits the work on one chunk.

    `signature` is that of the CPU's `kernel`; the step input "dims" is added to it as the last argument.
    """
    where = str(source.node.loc)
    spaces = ["input" if isinstance(arg, str) else source.layouts[arg].space for arg, _ in signature] + ["input"]
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(source.symbol)
            handles = {space: T.arg(space, T.handle(dtype)) for space, dtype in SPACES.items()}
            offsets = [T.arg(f"at{i:02d}", T.int32()) for i in range(len(spaces))]
            chunks = T.arg("chunks", T.int32())
            views: list[Any] = [T.decl_buffer((_MOST,), SPACES[space], data=handles[space], align=4, elem_offset=offset)
                                for space, offset in zip(spaces, offsets, strict=True)]
            for i, (arg, dtype) in enumerate(signature):
                if SPACES[spaces[i]] != dtype:
                    views[i] = _Unreadable(f"{where}: {dtype} in {spaces[i]} (argument {arg}); devices reached by source have "
                                           f"{SPACES[spaces[i]]} there")
            block, thread = T.env_thread("blockIdx.x"), T.env_thread("threadIdx.x")
            group = Group(thread, limit, where)
            # Grids may be rounded up: groups beyond do the last chunk too, which writes the same values again.
            with T.launch_thread(block, chunks + 1), T.launch_thread(thread, THREADS):
                body(views[:-1], views[-1], bind(T.min(block, chunks - 1)), group)
    return builder.get(), group.used
