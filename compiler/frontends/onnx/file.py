"""Reading an ONNX file: its graph, checked, and its tensors, read when they are wanted.

Nothing is executed. Tensors stored outside of the model's file must lie in its folder; they are mapped, never copied
as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from inferloom.compiler.frontends.source import location
from inferloom.ir.errors import UnsupportedError

OLDEST = 11
#: ONNX element types (TensorProto.DataType) that tensors may have.
ELEMENTS: dict[int, np.dtype] = {
    1: np.dtype("<f4"), 2: np.dtype("u1"), 3: np.dtype("i1"), 5: np.dtype("<i2"), 6: np.dtype("<i4"), 7: np.dtype("<i8"),
    9: np.dtype("bool"), 10: np.dtype("<f2"), 11: np.dtype("<f8"), 12: np.dtype("<u4"), 13: np.dtype("<u8"),
    16: np.dtype(ml_dtypes.bfloat16)}
#: What operators with wrong operands or attributes make the code raise that reads them.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
FLOATS = frozenset({1, 10, 11, 16})


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A constant of the file, not yet read."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    proto: Any
    folder: Path

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def is_float(self) -> bool:
        return self.proto.data_type in FLOATS

    def read(self) -> np.ndarray:
        """The tensor in its stored type (read-only); UnsupportedError when its bytes are not where the file says."""
        if self.proto.data_location == onnx.TensorProto.EXTERNAL:
            return self._mapped()
        try:
            return onnx.numpy_helper.to_array(self.proto).astype(self.dtype, copy=False).reshape(self.shape)
        except (ValueError, TypeError) as error:
            raise UnsupportedError(f"tensor {self.name!r} is damaged: {error}") from error

    def _mapped(self) -> np.ndarray:
        where = {entry.key: entry.value for entry in self.proto.external_data}
        path = inside(self.folder, where.get("location", ""), self.name)
        wanted = self.size * self.dtype.itemsize
        try:
            start, length = int(where.get("offset", 0)), int(where.get("length", wanted))
        except ValueError:
            raise UnsupportedError(f"tensor {self.name!r} has a damaged place in {path.name}: {where}") from None
        if length != wanted or start < 0 or start + wanted > path.stat().st_size:
            raise UnsupportedError(f"tensor {self.name!r} needs {wanted} bytes, and should lie at {start}.."
                                   f"{start + length} of {path}, which has {path.stat().st_size}; download or export it again")
        if not wanted:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(path, np.uint8, "r", start, (wanted,)).view(self.dtype).reshape(self.shape)


def files_of(path: Path) -> list[Path]:
    """The ONNX file and the files beside it that hold its tensors (which may be missing)."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UnsupportedError(f"{path} is not an ONNX model: {error}") from None
    names = {e.value: t.name for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return [path, *(inside(path.parent, name, tensor) for name, tensor in sorted(names.items()))]


def inside(folder: Path, name: str, tensor: str) -> Path:
    """The file `name` of a folder; UnsupportedError when it is missing or leads out of the folder."""
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or \
            not path.resolve().is_relative_to(folder.resolve()):
        raise UnsupportedError(f"tensor {tensor!r} is stored in {name!r}, outside of the model's folder {folder}; "
                               "external data must lie beside the model")
    if not path.is_file():
        raise UnsupportedError(f"tensor {tensor!r} is stored in {path}, which is not there")
    return path


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operator: its inputs and outputs by name ("" where absent) and its attributes as Python values."""

    type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    loc: str

    @property
    def key(self) -> str:
        """`Add`, or `com.microsoft.RotaryEmbedding`."""
        return f"{self.domain}.{self.type}" if self.domain else self.type

    def __str__(self) -> str:
        return f"{self.key} ({'node ' + repr(self.name) if self.name else 'the node that makes ' + repr(self.outputs[0])})"


@dataclass(frozen=True, slots=True, eq=False)
class OnnxInput:
    """A graph input: its element type and shape, None for a dim that is not fixed."""

    name: str
    data_type: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OnnxGraph:
    """A checked graph: operators in order, every input defined before it is used."""

    name: str
    opset: int
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    ops: tuple[Op, ...]


def read_graph(path: Path) -> OnnxGraph:
    """Read and check an ONNX file. UnsupportedError names what is damaged, missing or not supported."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UnsupportedError(f"{path} is not an ONNX model: {error}") from None
    if not model.opset_import or not model.graph.output:
        raise UnsupportedError(f"{path} is not an ONNX model: it has no opset or no output")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OLDEST)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise UnsupportedError(f"{path} uses opset {opset}; {OLDEST} to {newest} are known: export it again"
                               + (", or install a newer onnx package" if opset > newest else ""))
    if model.functions:
        model = _inlined(path, model)
    graph = model.graph
    folder = path.parent
    if graph.sparse_initializer:
        raise UnsupportedError(f"{path}: sparse tensors are not supported; export dense ones")
    tensors = {t.name: _tensor(t.name, t, folder) for t in graph.initializer}
    ops = []
    for node in graph.node:
        made = _op(node)
        if made.key == "Constant":
            tensors[made.outputs[0]] = _constant(made, folder)
        else:
            ops.append(made)
    inputs = tuple(_input(v) for v in graph.input if v.name not in tensors)
    _check_order(path, inputs, tensors, ops, [o.name for o in graph.output])
    return OnnxGraph(graph.name, opset, inputs, tuple(o.name for o in graph.output), tensors, tuple(ops))


def _inlined(path: Path, model: Any) -> Any:
    """The model with the calls of its own functions written out."""
    calls = {(f.domain, f.name): {(n.domain, n.op_type) for n in f.node} for f in model.functions}
    while calls:
        leaves = {f for f, called in calls.items() if not called & set(calls)}
        if not leaves:
            raise UnsupportedError(f"{path}: its functions call each other in a cycle: {', '.join(n for _, n in sorted(calls))}")
        calls = {f: called for f, called in calls.items() if f not in leaves}
    return onnx.inliner.inline_local_functions(model)


def _tensor(name: str, proto: Any, folder: Path) -> Tensor:
    if proto.data_type not in ELEMENTS:
        kind = onnx.TensorProto.DataType.Name(proto.data_type) if proto.data_type in onnx.TensorProto.DataType.values() else "?"
        raise UnsupportedError(f"tensor {name!r} has the element type {kind}, which is not supported; "
                               "export in float32, float16 or bfloat16")
    if any(d < 0 for d in proto.dims):
        raise UnsupportedError(f"tensor {name!r} has the shape {list(proto.dims)}")
    return Tensor(name, ELEMENTS[proto.data_type], tuple(proto.dims), proto, folder)


def _constant(op: Op, folder: Path) -> Tensor:
    """The tensor of a `Constant` node."""
    name = op.outputs[0]
    for key, value in op.attrs.items():
        if key == "value" and isinstance(value, onnx.TensorProto) and value.data_location != onnx.TensorProto.EXTERNAL:
            return _tensor(name, value, folder)
        if key in ("value_float", "value_floats", "value_int", "value_ints"):
            dtype = np.float32 if "float" in key else np.int64
            return _tensor(name, onnx.numpy_helper.from_array(np.asarray(value, dtype), name), folder)
    raise UnsupportedError(f"{op} holds {', '.join(op.attrs) or 'nothing'}; only dense tensors and numbers are supported")


def _op(node: Any) -> Op:
    attrs = {}
    for attr in node.attribute:
        value = onnx.helper.get_attribute_value(attr)
        attrs[attr.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    domain = "" if node.domain == "ai.onnx" else node.domain
    trace = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.stack_trace"), "")
    if not any(node.output):
        raise UnsupportedError(f"node {node.name!r} ({node.op_type}) makes nothing: the graph is damaged")
    return Op(node.op_type, domain, node.name, tuple(node.input), tuple(node.output), attrs,
              location(trace) or node.name or node.output[0])


def _input(value: Any) -> OnnxInput:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise UnsupportedError(f"input {value.name!r} is not a tensor; only decoders with tensor inputs are supported")
    dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
    return OnnxInput(value.name, kind.elem_type, dims)


def _check_order(path: Path, inputs: tuple[OnnxInput, ...], tensors: Mapping[str, Tensor], ops: list[Op],
                 outputs: list[str]) -> None:
    known = {i.name for i in inputs} | set(tensors)
    later = {o for op in ops for o in op.outputs}
    for op in ops:
        for name in filter(None, op.inputs):
            if name not in known:
                raise UnsupportedError(f"{path}: {op} reads {name!r}, which " + (
                    "only a later node makes: the nodes are in a cycle or out of order" if name in later
                    else "is neither an input, a tensor nor made by a node"))
        for name in filter(None, op.outputs):
            if name in known:
                raise UnsupportedError(f"{path}: {op} makes {name!r}, which exists already")
            known.add(name)
    for name in outputs:
        if name not in known:
            raise UnsupportedError(f"{path}: nothing makes the output {name!r}")


def live_ops(graph: OnnxGraph, output: str) -> Iterator[Op]:
    """The operators that an output depends on, in order."""
    wanted = {output}
    kept = []
    for op in reversed(graph.ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            kept.append(op)
    yield from reversed(kept)
