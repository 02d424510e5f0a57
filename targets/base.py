"""The interface between the compiler and a target's code generator."""

from __future__ import annotations

from dataclasses import dataclass

from inferloom.ir.graph import Node


@dataclass(frozen=True, slots=True)
class Layout:
    """How one operand or result lies in memory.

    `ld`: elements between rows (0: no rows). `block_stride`: bytes of a block of paged state (0: no state).
    """

    space: str
    ld: int = 0
    block_stride: int = 0


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A `kernel` node to generate: `layouts` are those of its operands, then of its results."""

    symbol: str
    node: Node
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Chunks of work in one call: `ceil(dims[dim] / tile) * mult`; dim -1 means just `mult`.

    dims are tokens (0), seqs (1), rows (2) and q_tiles (3).
    """

    dim: int
    tile: int
    mult: int


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """A compiled kernel. `args` are indices into operands-then-results, or names of step inputs."""

    symbol: str
    kind: str
    grid: Grid
    args: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """All kernels of an artifact in one loadable file."""

    filename: str
    data: bytes
    kernels: tuple[KernelInfo, ...]
