"""Runs single kernels next to the interpreter: bodies in, arrays compared."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Graph, Value
from inferloom.ir.ops import kernel as kernel_op
from inferloom.ir.types import DType, StateType, Sym, TensorType
from inferloom.targets.base import KernelSource, Layout
from inferloom.targets.chips import find
from inferloom.targets.tvm.codegen import compile_kernels
from tests.targets.tvm.harness import STORED, aligned, load, to_float

TOKENS, ROWS = Sym("tokens", 64), Sym("rows", 16)
DIMS = {"tokens": 0, "rows": 2}
Body = Callable[[Builder], Sequence[Value]]


def tensor(*shape: Any, dtype: DType = DType.F32) -> TensorType:
    return TensorType(dtype, tuple(shape))


def graph(body: Body) -> Graph:
    """The graph of a function that emits it and returns its outputs."""
    builder = Builder("body")
    return builder.finish(body(builder))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 as bits of the nearest bf16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Kernels:
    """Bodies of one kind compiled together for this machine, rows a little apart as the planner lays them."""

    def __init__(self, kind: str, bodies: Mapping[str, Body], chip: str = "cpu") -> None:
        self.graphs = {name: graph(body) for name, body in bodies.items()}
        sources = []
        for name, made in self.graphs.items():
            builder = Builder("step")
            operands = [builder.input(v.name, v.type) for v in made.inputs]
            node = builder.emit_node("kernel", operands, {"kind": kind, "body": made}, name)
            sources.append(KernelSource(name, node, tuple(_layout(v) for v in (*made.inputs, *made.outputs))))
        self.module = compile_kernels(sources, find(chip))
        self.lib = load(self.module.data)
        self.infos = {info.symbol: info for info in self.module.kernels}

    def run(self, name: str, inputs: Mapping[str, Any], counts: Mapping[str, int],
            more: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
        """Results of one kernel; `counts` are the run-time dims, `more` the step inputs that it asks for by name.

        Operands are float32 (or int32) arrays; a state operand is the pool's bytes, which the kernel may change.
        """
        made, info = self.graphs[name], self.infos[name]
        sizes = {Sym(k, 1).name: n for k, n in counts.items()}
        memory: list[np.ndarray] = [_place(v, inputs[v.name]) for v in made.inputs]
        for value in made.outputs:
            rows = 0 if isinstance(value.type, StateType) else sizes[str(value.type.shape[0])]
            memory.append(aligned(rows * _layout(value).ld * value.type.dtype.itemsize))
        held = {k: np.ascontiguousarray(v, np.int32) for k, v in (more or {}).items()}
        pointers = [held[a].ctypes.data if isinstance(a, str) else memory[a].ctypes.data for a in info.args]
        dims = (ctypes.c_int32 * 4)(sizes.get("tokens", 0), sizes.get("seqs", 0), sizes.get("rows", 0),
                                    len(held.get("q_tiles", ())))
        grid = info.grid
        chunks = grid.mult * (1 if grid.dim < 0 else -(-dims[grid.dim] // grid.tile))
        function = getattr(self.lib, name)
        function.argtypes = [ctypes.c_void_p] * 17 + [ctypes.c_int32]
        for chunk in range(chunks):
            function(*pointers, *[None] * (16 - len(pointers)), ctypes.addressof(dims), chunk)
        return [_read(v, m) for v, m in zip(made.outputs, memory[len(made.inputs):], strict=True)
                if not isinstance(v.type, StateType)]

    def want(self, name: str, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        made = self.graphs[name]
        return kernel_op.run(made, [inputs[v.name] for v in made.inputs])

    def check(self, name: str, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> list[np.ndarray]:
        """Compare with the interpreter, within the tolerances that the ops declare."""
        got, want = self.run(name, inputs, counts), self.want(name, inputs)
        made = self.graphs[name]
        rtol = max([ops.get(n.op).tolerance.rtol for n in made.nodes] + [1e-5])
        atol = max([ops.get(n.op).tolerance.atol for n in made.nodes] + [1e-6])
        for value, g, w in zip(made.outputs, got, want, strict=True):
            assert g.shape == np.shape(w), f"{name}: {g.shape} is not {np.shape(w)}"
            relative = ops.BF16_RELATIVE if value.type.dtype is DType.BF16 else rtol
            assert np.isfinite(g).all() or np.array_equal(np.isfinite(g), np.isfinite(w)), name
            with np.errstate(invalid="ignore"):
                error = np.where(g == w, 0, np.abs(g - w) - relative * np.abs(w)).max()
            assert error <= atol * max(1.0, float(np.abs(w[np.isfinite(w)]).max(initial=0))), f"{name}: {error}"
        return got


def random_inputs(made: Graph, counts: Mapping[str, int], seed: int = 0, high: int = 7) -> dict[str, np.ndarray]:
    """Normal floats (exact in the operand's element type), integers below `high`."""
    rng = np.random.default_rng(seed)
    values = {}
    for v in made.inputs:
        assert isinstance(v.type, TensorType)
        shape = [d if isinstance(d, int) else counts[str(d)] for d in v.type.shape]
        if v.type.dtype is DType.I32:
            values[v.name] = rng.integers(0, high, shape).astype(np.int32)
        else:
            x = rng.standard_normal(shape).astype(np.float32)
            values[v.name] = to_float(to_bf16(x), DType.BF16) if v.type.dtype is DType.BF16 else x
    return values


def alone(inputs: Mapping[str, np.ndarray], made: Graph, row: int) -> dict[str, np.ndarray]:
    """The inputs of one row of a batch."""
    symbolic = {v.name for v in made.inputs if isinstance(v.type, TensorType) and v.type.shape
                and not isinstance(v.type.shape[0], int)}
    return {k: x[row:row + 1] if k in symbolic else x for k, x in inputs.items()}


def _symbolic(type: Any) -> bool:
    return isinstance(type, TensorType) and bool(type.shape) and not isinstance(type.shape[0], int)


def _elements(type: TensorType) -> int:
    size = 1
    for d in type.shape[1:]:
        size *= int(str(d))
    return size


def _layout(value: Value) -> Layout:
    """Rows of whole cache lines and one more, so that a kernel that ignores `ld` fails."""
    if isinstance(value.type, StateType):
        return Layout("state", 0, value.type.bytes_per_block + 128)
    if not _symbolic(value.type):
        return Layout("weights")
    if value.name and value.type.dtype is DType.I32:  # a step input: dense
        return Layout("input")
    line = 64 // value.type.dtype.itemsize
    return Layout("workspace", (-(-_elements(value.type) // line) + 1) * line)


def _place(value: Value, x: Any) -> np.ndarray:
    """An operand in memory."""
    if isinstance(value.type, StateType):
        return np.asarray(x)
    assert isinstance(value.type, TensorType)
    kind, ld = STORED[value.type.dtype], _layout(value).ld
    stored = to_bf16(x) if value.type.dtype is DType.BF16 else np.ascontiguousarray(x, kind)
    if not ld:
        memory = aligned(max(stored.nbytes, 64))
        memory[:stored.nbytes] = stored.reshape(-1).view(np.uint8)
        return memory
    memory = aligned(len(stored) * ld * stored.itemsize)
    memory.view(kind).reshape(len(stored), ld)[:, :_elements(value.type)] = stored.reshape(len(stored), _elements(value.type))
    return memory


def _read(value: Value, memory: np.ndarray) -> np.ndarray:
    assert isinstance(value.type, TensorType)
    ld = _layout(value).ld or 1
    data = memory.view(STORED[value.type.dtype])
    data = data.reshape(len(data) // ld, ld)
    size = _elements(value.type)
    assert not data[:, size:].any(), "written past the end of a row"
    rows = to_float(data[:, :size].copy(), value.type.dtype)
    return rows.reshape(len(rows), *[int(str(d)) for d in value.type.shape[1:]])
