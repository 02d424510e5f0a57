"""Runs a kernel-level graph kernel by kernel, next to the interpreter, on plain memory."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import ml_dtypes
import numpy as np

from inferloom.compiler.kernels import select_kernels
from inferloom.compiler.plan import Rows, plan_memory, row_elements, tensor_bytes
from inferloom.compiler.weights import weight_buffers
from inferloom.ir import op as ops
from inferloom.ir.graph import Graph, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import RecurrentArrays
from inferloom.ir.types import DType, RecurrentType, StateType, TensorType
from inferloom.targets.base import Logits
from inferloom.targets.chips import find
from inferloom.targets.tvm.codegen import CpuTarget
from tests.targets.single import aligned, before, compare


class Call(ctypes.Structure):
    """`il_call` of stepper.c."""

    _fields_ = [("fn", ctypes.c_void_p), ("args", ctypes.c_void_p * 16), ("dim", ctypes.c_int32),
                ("tile", ctypes.c_int32), ("mult", ctypes.c_int32), ("flags", ctypes.c_int32)]


def load(data: bytes) -> ctypes.CDLL:
    """A shared library from bytes."""
    fd = os.memfd_create("kernels")
    os.write(fd, data)
    return ctypes.CDLL(f"/proc/self/fd/{fd}")


def to_float(stored: np.ndarray, dtype: DType) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype is DType.BF16 else stored


STORED = {DType.F32: np.float32, DType.BF16: np.uint16, DType.I32: np.int32}


def unpack_state(pool: np.ndarray, type: StateType, offset: int, stride: int) -> KVArrays:
    """The CPU's block layout as the arrays of the reference."""
    blocks = len(pool) // stride
    size, tiles = type.bytes_per_block, type.block_tokens // 16
    if type.scales:
        data = pool.reshape(blocks, stride)[:, offset:offset + size].reshape(blocks, type.heads, tiles, -1)
        at, parts = 0, []
        for width, shape in ((type.k_dim, (16, type.k_dim) if type.latent else (type.k_dim, 16)), (type.v_dim, (16, type.v_dim))):
            kind = np.int8 if type.dtype is DType.I8 else ml_dtypes.float8_e4m3fn
            numbers = data[..., at:at + 16 * width].view(kind).reshape(blocks, type.heads, tiles, *shape)
            scales = data[..., at + 16 * width:at + 16 * width + 64].copy().view(np.float32)
            at += 16 * width + 64
            numbers = numbers.swapaxes(-1, -2) if shape[0] == width and shape[1] == 16 and not type.latent else numbers
            x = numbers.astype(np.float32) * scales[..., None]
            parts.append(x.transpose(0, 2, 3, 1, 4).reshape(-1, type.heads, width))
            if type.latent:
                return KVArrays(parts[0], parts[0][..., :type.v_dim], type)
        return KVArrays(*parts, type)
    kind, pair = STORED[type.dtype], 2 if type.dtype is DType.BF16 else 1
    data = pool.reshape(blocks, stride)[:, offset:offset + size].copy().view(kind)
    data = data.reshape(blocks, type.heads, tiles, 16 * type.per_token)
    if type.latent:
        k = to_float(data.reshape(blocks, type.heads, tiles, 16, type.k_dim).transpose(0, 2, 3, 1, 4), type.dtype)
        k = k.reshape(-1, type.heads, type.k_dim)
        return KVArrays(k, k[..., :type.v_dim], type)
    k = data[..., :16 * type.k_dim].reshape(blocks, type.heads, tiles, type.k_dim // pair, 16, pair)
    v = data[..., 16 * type.k_dim:].reshape(blocks, type.heads, tiles, 16 // pair, type.v_dim, pair)
    k = k.transpose(0, 2, 4, 1, 3, 5).reshape(-1, type.heads, type.k_dim)
    v = v.transpose(0, 2, 3, 5, 1, 4).reshape(-1, type.heads, type.v_dim)
    return KVArrays(to_float(k, type.dtype), to_float(v, type.dtype), type)


def unpack_recurrent(pool: np.ndarray, type: RecurrentType, offset: int, stride: int) -> RecurrentArrays:
    """One layer's pages as the arrays of the reference."""
    data = pool.reshape(-1, stride)[:, offset:offset + type.bytes].copy().view(np.float32)
    return RecurrentArrays(data.reshape(-1, *type.shape), type)


class Compiled:
    """A kernel-level graph compiled for this machine, with its weights, workspace and pool."""

    def __init__(self, graph: Graph, params: dict[str, np.ndarray], blocks: int = 16, chip: str = "cpu") -> None:
        self.graph, self.params = graph, params
        self.plan = plan_memory(graph, Rows(64, 4096))
        self.selection = select_kernels(self.plan)
        self.module = CpuTarget(find(chip)).compile_kernels(self.selection.sources, Logits(1, 1, 1), print)
        self.lib = load(self.module.files["kernels/kernels.so"])
        self.lib.il_threads(2)
        self.workspace, self.weights = aligned(self.plan.workspace), aligned(self.plan.weight_bytes)
        self.pool = aligned(max(self.plan.bytes_per_block, 1) * blocks)
        at = 0
        for part in weight_buffers(graph, self.plan.weights, params.__getitem__, tensor_bytes):
            self.weights[at:at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)

    def run(self, inputs: dict[str, Any], check: bool = False) -> np.ndarray:
        """The first output; with `check`, every kernel's results are compared with the interpreter's."""
        held = {k: np.ascontiguousarray(v) for k, v in inputs.items() if isinstance(v, np.ndarray)}
        starts = held["seq_starts"]
        held["q_tiles"] = np.array([(s, t, min(16, starts[s + 1] - t)) for s in range(len(starts) - 1)
                                    for t in range(starts[s], starts[s + 1], 16)], np.int32)
        dims = (ctypes.c_int32 * 5)(len(held["tokens"]), len(held["kv_lens"]), len(held["logit_rows"]),
                                    len(held["q_tiles"]))
        base = {"workspace": self.workspace.ctypes.data, "weights": self.weights.ctypes.data,
                "state": self.pool.ctypes.data}
        self.held = held
        calls = (Call * len(self.selection.calls))()
        for made, call in zip(calls, self.selection.calls, strict=True):
            info = self.module.kernels[call.kernel]
            made.fn = ctypes.cast(getattr(self.lib, info.symbol), ctypes.c_void_p)
            for i, arg in enumerate(info.args):
                place = None if isinstance(arg, str) else call.places[arg]
                if place is None or place.space == "input":
                    made.args[i] = held[arg if place is None else place.name].ctypes.data
                else:
                    made.args[i] = base[place.space] + place.offset
            made.dim, made.tile, made.mult = info.grid.dim, info.grid.tile, info.grid.mult
        if not check:
            assert self.lib.il_step(calls, len(calls), dims, None) == 0
        else:
            for i, node in enumerate(self.plan.kernels):
                operands = [None if v is None else self.read(v, inputs) for v in node.operands]
                want = ops.run_reference("kernel", operands, node.attrs)
                assert self.lib.il_step(ctypes.byref(calls[i]), 1, dims, None) == 0
                for value, w in zip(node.results, want, strict=True):
                    compare(self.read(value, inputs), w, before(self.plan, node, value, operands),
                            2.0**-7 if value.type.dtype is DType.BF16 else 2e-5,
                            self.module.kernels[self.selection.calls[i].kernel].symbol)
        return self.read(self.graph.outputs[0], inputs)

    def read(self, value: Value, inputs: dict[str, Any]) -> Any:
        """A value of the graph from memory, as the interpreter holds it."""
        place = self.plan.places[value]
        if place.space == "input":
            return self.held[place.name]
        if isinstance(value.type, RecurrentType):
            return unpack_recurrent(self.pool, value.type, place.offset, self.plan.bytes_per_block)
        if isinstance(value.type, StateType):
            return unpack_state(self.pool, value.type, place.offset, self.plan.bytes_per_block)
        assert isinstance(value.type, TensorType)
        kind = STORED[value.type.dtype]
        if place.space == "weights":
            size = value.type.max_size
            flat = self.weights[place.offset:place.offset + size * value.type.dtype.itemsize].view(kind)
            return to_float(flat, value.type.dtype).reshape([int(str(d)) for d in value.type.shape])
        rows = len(self.held[{"tokens": "tokens", "rows": "logit_rows"}[str(value.type.shape[0])]])
        size = rows * place.ld * value.type.dtype.itemsize
        data = self.workspace[place.offset:place.offset + size].view(kind).reshape(rows, place.ld)
        data = data[:, :row_elements(value.type)]
        return to_float(data.copy(), value.type.dtype).reshape(rows, *[int(str(d)) for d in value.type.shape[1:]])


