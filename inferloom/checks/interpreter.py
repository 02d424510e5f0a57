"""Runs a kernel-level graph through its generated Triton kernels in Triton's interpreter, on this machine's memory.

Triton decides when it is imported whether it interprets: TRITON_INTERPRET=1 must be in the environment of the process.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from triton.runtime import interpreter

import inferloom.checks.shim  # noqa: F401  (before any kernel runs)
from inferloom.compiler.kernels import select_kernels
from inferloom.compiler.plan import Rows, plan_memory, row_elements, tensor_bytes
from inferloom.compiler.weights import weight_buffers
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import RecurrentArrays
from inferloom.ir.types import DType, RecurrentType, StateType, TensorType
from inferloom.runtime.device.base import make_tiles
from inferloom.runtime.manifest import DIMS, Tiles
from inferloom.targets.base import KernelSource, Scratch
from inferloom.targets.chips import GpuChip, find
from inferloom.targets.triton.aot import module_text
from inferloom.targets.triton.codegen import TritonTarget
from inferloom.targets.triton.source import KernelText

STORED = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: ml_dtypes.bfloat16, DType.I32: np.int32}
TORCH = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32,
         "*i64": torch.int64}
_set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
_order: list[np.ndarray] = []


def _permuted(self: Any, x: int, y: int, z: int) -> None:
    _set_grid_idx(self, int(_order[-1][x]) if _order else x, y, z)


interpreter.InterpreterBuilder.set_grid_idx = _permuted


def load_module(text: str, folder: Path) -> ModuleType:
    """Generated source as a module."""
    path = folder / "kernels.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("kernels", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return module


def pointer(memory: np.ndarray, offset: int, type: str) -> torch.Tensor:
    """A kernel's argument: kernels reach the memory behind it, the interpreter copies no more than one element."""
    dtype = TORCH[type]
    return torch.from_numpy(memory[offset:offset + dtype.itemsize]).view(dtype)


def launch(module: ModuleType, kernel: KernelText, args: Sequence[torch.Tensor], dims: Sequence[int],
           shuffle: np.random.Generator | None = None) -> None:
    """One launch as the runtime's launcher does it; programs run in random order with `shuffle`."""
    dim, tile, mult = kernel.grid
    if not kernel.least <= dims[dim] <= kernel.most:
        return
    blocks = -(-dims[dim] // tile) * mult
    if blocks:
        _order.append(np.arange(blocks) if shuffle is None else shuffle.permutation(blocks))
        try:
            with np.errstate(all="ignore"):
                getattr(module, kernel.symbol)[(blocks,)](*args)
        finally:
            _order.pop()


def unpack_state(pool: np.ndarray, type: StateType, offset: int, stride: int) -> KVArrays:
    """The GPU's block layout, K [heads, tokens, dim] and then V, as the arrays of the reference."""
    blocks, size, split = len(pool) // stride, type.bytes_per_block, type.heads * type.block_tokens * type.k_dim
    data = pool.reshape(blocks, stride)[:, offset:offset + size].copy().view(STORED[type.dtype])

    def part(data: np.ndarray, dim: int) -> np.ndarray:
        data = data.reshape(blocks, type.heads, type.block_tokens, dim).transpose(0, 2, 1, 3)
        return data.reshape(-1, type.heads, dim).astype(np.float32)

    k = part(data[:, :split], type.k_dim)
    return KVArrays(k, k[..., :type.v_dim] if type.latent else part(data[:, split:], type.v_dim), type)


def unpack_recurrent(pool: np.ndarray, type: RecurrentType, offset: int, stride: int) -> RecurrentArrays:
    """One layer's pages, which are the same on every target, as the arrays of the reference."""
    data = pool.reshape(-1, stride)[:, offset:offset + type.bytes].copy().view(np.float32)
    return RecurrentArrays(data.reshape(-1, *type.shape), type)


def target(chip: str = "h100", **options: Any) -> TritonTarget:
    found = find(chip)
    if not isinstance(found, GpuChip):
        raise TypeError(f"{chip} is no GPU")
    return TritonTarget(found, **options)


class Interpreted:
    """A kernel-level graph as Triton kernels, with its weights, workspace and pool."""

    def __init__(self, graph: Graph, params: dict[str, np.ndarray], folder: Path, blocks: int = 16,
                 chip: str = "h100", **options: Any) -> None:
        self.graph, self.target = graph, target(chip, **options)
        wanted = self.target.lowering
        self.plan = plan_memory(graph, Rows(wanted.row_align, wanted.avoid))
        self.selection = select_kernels(self.plan)
        sources: Sequence[KernelSource] = self.selection.sources
        self.picked = self.target.pick(sources, self.target.choices(sources))
        self.module = load_module(module_text(self.picked.kernels), folder)
        rng = np.random.default_rng(7)
        # Garbage, so that what is read before it is written shows.
        self.workspace = rng.integers(0, 255, self.plan.workspace, np.uint8)
        self.scratch = rng.integers(0, 255, max(self.picked.scratch, 4), np.uint8)
        self.pool = np.zeros(max(self.plan.bytes_per_block, 1) * blocks, np.uint8)
        self.weights = np.zeros(max(self.plan.weight_bytes, 64), np.uint8)
        at = 0
        for part in weight_buffers(graph, self.plan.weights, params.__getitem__, tensor_bytes):
            self.weights[at:at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)

    def look(self, node: Node) -> Any:
        """Called before each kernel, for those who want to know what it finds."""

    def ran(self, node: Node, symbol: str, looked: Any) -> None:
        """Called after each kernel, with what `look` returned."""

    def run(self, inputs: dict[str, Any], shuffle: int | None = None, padded: dict[int, int] | None = None) -> np.ndarray:
        """The first output. With `shuffle`, the programs of each kernel run in random order.

        `padded` raises counts of the launch grid, as a graph captured for more sequences does.
        """
        self.held = {k: np.ascontiguousarray(v) for k, v in inputs.items() if isinstance(v, np.ndarray)}
        tiles = Tiles(*self.picked.tiles)
        self.held["q_tiles"], self.held["d_tiles"] = make_tiles(self.held["seq_starts"], tiles)
        counts = {"tokens": "tokens", "seqs": "kv_lens", "rows": "logit_rows", "q_tiles": "q_tiles", "d_tiles": "d_tiles"}
        dims = [len(self.held[counts[name]]) for name in DIMS]
        self.held["dims"] = np.array([*dims, 0, 0, 0], np.int32)
        grid = [max(d, (padded or {}).get(i, 0)) for i, d in enumerate(dims)]
        rng = np.random.default_rng(shuffle) if shuffle is not None else None
        for node, call in zip(self.plan.kernels, self.selection.calls, strict=True):
            looked = self.look(node)
            for kernel in (k for k in self.picked.kernels if k.source == call.kernel):
                launch(self.module, kernel, [self._argument(a, t, call.places) for a, (_, t) in
                                             zip(kernel.args, kernel.parameters)], grid, rng)
            self.ran(node, self.selection.sources[call.kernel].symbol, looked)
        return np.asarray(self.read(self.graph.outputs[0]))

    def _argument(self, arg: object, type: str, places: Any) -> torch.Tensor:
        if isinstance(arg, Scratch):
            return pointer(self.scratch, arg.offset, type)
        place = None if isinstance(arg, str) else places[arg]
        if place is None or place.space == "input":
            data = self.held[str(arg) if place is None else place.name]
            return pointer(np.append(data.reshape(-1), 0).view(np.uint8) if not data.size else
                           data.reshape(-1).view(np.uint8), 0, type)
        return pointer({"workspace": self.workspace, "weights": self.weights, "state": self.pool}[place.space],
                       place.offset, type)

    def read(self, value: Value) -> Any:
        """A value of the graph from memory, as the reference holds it."""
        place = self.plan.places[value]
        if place.space == "input":
            return self.held[place.name]
        if isinstance(value.type, RecurrentType):
            return unpack_recurrent(self.pool, value.type, place.offset, self.plan.bytes_per_block)
        if isinstance(value.type, StateType):
            return unpack_state(self.pool, value.type, place.offset, self.plan.bytes_per_block)
        if not isinstance(value.type, TensorType):
            raise TypeError(value)
        kind, item = STORED[value.type.dtype], value.type.dtype.itemsize
        wide = np.float32 if value.type.dtype.is_float else np.int32
        if place.space == "weights":
            flat = self.weights[place.offset:place.offset + value.type.max_size * item].copy().view(kind)
            return flat.astype(wide).reshape([int(str(d)) for d in value.type.shape])
        rows = len(self.held[{"tokens": "tokens", "rows": "logit_rows"}[str(value.type.shape[0])]])
        data = self.workspace[place.offset:place.offset + rows * place.ld * item].copy().view(kind).reshape(rows, place.ld)
        data = data[:, :row_elements(value.type)].astype(wide)
        return data.reshape(rows, *[int(str(d)) for d in value.type.shape[1:]])
