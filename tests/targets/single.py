"""Single kernels: bodies in, memory laid out as the planner does, results compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from inferloom.compiler.plan import Plan
from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Graph, Node, Value
from inferloom.ir.ops import kernel as kernel_op
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import RecurrentArrays
from inferloom.ir.types import STATES, DType, RecurrentType, Sym, TensorType, cast_array
from inferloom.targets.base import KernelSource, Layout

TOKENS, ROWS = Sym("tokens", 64), Sym("rows", 16)
Body = Callable[[Builder], Sequence[Value]]
STORED = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: ml_dtypes.bfloat16, DType.I32: np.int32,
          DType.I8: np.int8, DType.U8: np.uint8}


def tensor(*shape: Any, dtype: DType = DType.F32) -> TensorType:
    return TensorType(dtype, tuple(shape))


def graph(body: Body) -> Graph:
    """The graph of a function that emits it and returns its outputs."""
    builder = Builder("body")
    return builder.finish(body(builder))


def aligned(size: int) -> np.ndarray:
    """Zeroed bytes that start on a cache line."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size]


class Bodies:
    """Bodies of one kind as kernel sources, rows a little apart as the planner lays them; targets add `run`."""

    def __init__(self, kind: str, bodies: Mapping[str, Body]) -> None:
        self.graphs = {name: graph(body) for name, body in bodies.items()}
        self.sources = []
        for name, made in self.graphs.items():
            builder = Builder("step")
            operands = [builder.input(v.name, v.type) for v in made.inputs]
            node = builder.emit_node("kernel", operands, {"kind": kind, "body": made}, name)
            self.sources.append(KernelSource(name, node, tuple(layout(v) for v in (*made.inputs, *made.outputs))))

    def run(self, name: str, inputs: Mapping[str, Any], counts: Mapping[str, int],
            more: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
        """Results of one kernel; `counts` are the run-time dims, `more` the step inputs that it asks for by name.

        Operands are float32 (or int32) arrays; a state operand is the pool's bytes, which the kernel may change.
        """
        raise NotImplementedError

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
            values[v.name] = cast_array(x, v.type.dtype).astype(np.float32)
    return values


def alone(inputs: Mapping[str, np.ndarray], made: Graph, row: int) -> dict[str, np.ndarray]:
    """The inputs of one row of a batch."""
    symbolic = {v.name for v in made.inputs if isinstance(v.type, TensorType) and v.type.shape
                and not isinstance(v.type.shape[0], int)}
    return {k: x[row:row + 1] if k in symbolic else x for k, x in inputs.items()}


def symbolic(type: Any) -> bool:
    return isinstance(type, TensorType) and bool(type.shape) and not isinstance(type.shape[0], int)


def elements(type: TensorType) -> int:
    size = 1
    for d in type.shape[1:]:
        size *= int(str(d))
    return size


def layout(value: Value) -> Layout:
    """Rows of whole cache lines and one more, so that a kernel that ignores `ld` fails."""
    if isinstance(value.type, STATES):
        size = value.type.bytes if isinstance(value.type, RecurrentType) else value.type.bytes_per_block
        return Layout("state", 0, size + 128)
    if not symbolic(value.type):
        return Layout("weights")
    integers = value.type.dtype is DType.I32 and value.name != "sums"
    if value.name and integers and (value.type.rank == 1 or value.type.shape[0] != TOKENS):
        # A step input: dense.
        return Layout("input")
    line = 64 // value.type.dtype.itemsize
    return Layout("workspace", (-(-elements(value.type) // line) + 1) * line)


def place(value: Value, x: Any) -> np.ndarray:
    """An operand in memory."""
    if isinstance(value.type, STATES):
        return np.asarray(x)
    assert isinstance(value.type, TensorType)
    kind, ld = STORED[value.type.dtype], layout(value).ld
    stored = np.ascontiguousarray(np.asarray(x).astype(kind))
    if not ld:
        memory = aligned(max(stored.nbytes, 64))
        memory[:stored.nbytes] = stored.reshape(-1).view(np.uint8)
        return memory
    memory = aligned(len(stored) * ld * stored.itemsize)
    memory.view(kind).reshape(len(stored), ld)[:, :elements(value.type)] = stored.reshape(len(stored), elements(value.type))
    return memory


def results(made: Graph, sizes: Mapping[str, int]) -> list[np.ndarray]:
    """Zeroed memory for what a body returns."""
    return [aligned(0 if isinstance(v.type, STATES) else
                    sizes[str(v.type.shape[0])] * layout(v).ld * v.type.dtype.itemsize) for v in made.outputs]


def read(value: Value, memory: np.ndarray) -> np.ndarray:
    """A result from memory, floats as float32."""
    assert isinstance(value.type, TensorType)
    ld = layout(value).ld or 1
    data = memory.view(STORED[value.type.dtype])
    data = data.reshape(len(data) // ld, ld)
    size = elements(value.type)
    assert not data[:, size:].any(), "written past the end of a row"
    rows = data[:, :size].astype(np.float32 if value.type.dtype.is_float else np.int32)
    return rows.reshape(len(rows), *[int(str(d)) for d in value.type.shape[1:]])


def parts(x: Any) -> list[np.ndarray]:
    """The arrays of a value, state or not."""
    if isinstance(x, KVArrays):
        return [x.k, x.v]
    return [x.data] if isinstance(x, RecurrentArrays) else [x]


def before(plan: Plan, node: Node, result: Value, operands: Sequence[Any]) -> Any:
    """What the operand of a kernel was that a result has the place of; None for results that are not state."""
    if not isinstance(result.type, STATES):
        return None
    return next(x for v, x in zip(node.operands, operands) if v is not None and plan.places[v] == plan.places[result])


def compare(got: Any, want: Any, before: Any, relative: float, name: str) -> None:
    """Errors are relative to the largest magnitude. Of state `before` the step, what must stay has the same bits."""
    for g, w, b in zip(parts(got), parts(want), parts(before) if before is not None else [None, None]):
        assert g.shape == w.shape, f"{name}: {g.shape} is not {w.shape}"
        if b is not None:
            kept = (w == b) | (np.isnan(w) & np.isnan(b))
            assert np.array_equal(g[kept], b[kept], equal_nan=True), f"{name}: state changed that must stay"
            g, w = g[~kept], w[~kept]
        error = np.abs(g - w).max(initial=0)
        assert error <= relative * max(1e-3, np.abs(w).max(initial=0)), f"{name}: error {error}"
