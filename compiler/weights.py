"""Evaluating the constant expressions of a graph, one weight at a time.

A weight of the artifact is an expression over checkpoint tensors (a concatenation, a transposition, `1 + w`).
Ops that only move data keep the tensor's stored element type, so that a bf16 checkpoint is never widened on its
way; arithmetic is done in float32 by the ops' NumPy references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from inferloom.compiler.quantization.rows import RowQuantizer, StoredReader
from inferloom.compiler.quantization.scheme import Scheme
from inferloom.ir import op as ops
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import DType, TensorType

_MOVES = frozenset({"reshape", "permute", "slice", "concat", "expand", "pack_linear", "interleave", "pack_quantized"})
_STORED: dict[DType, Any] = {DType.F32: np.float32, DType.BF16: ml_dtypes.bfloat16, DType.F16: np.float16,
                             DType.I32: np.int32, DType.I8: np.int8, DType.U8: np.uint8}


class ConstantFolder:
    """Evaluates constant values of `graph`; `read(source)` gives a checkpoint tensor in its stored type.

    `stored(source)` gives one that is stored quantised, None for others; only `quantize_weight` asks for it.
    """

    def __init__(self, graph: Graph, read: Callable[[str], np.ndarray], stored: StoredReader | None = None) -> None:
        self._read = read
        self._sources = {p.value: p.source for p in graph.params}
        self._producers: dict[Value, Node] = graph.producers()
        self._rows = RowQuantizer(self._producers, self._sources, self._get, stored)
        self._last: tuple[Node, tuple[np.ndarray, ...]] | None = None

    def evaluate(self, value: Value) -> np.ndarray:
        """The value in its own element type, C-contiguous. Intermediate arrays are dropped as soon as possible."""
        array = self._get(value)
        if not isinstance(value.type, TensorType):
            raise TypeError(value)
        return np.ascontiguousarray(array.astype(_STORED[value.type.dtype], copy=False))

    def _get(self, value: Value) -> np.ndarray:
        if value in self._sources:
            return self._read(self._sources[value])
        node = self._producers[value]
        if node.op == "quantize_weight":
            return self._quantized(node)[node.results.index(value)]
        arrays = [None if v is None else self._get(v) for v in node.operands]
        if node.op == "cast":
            (array,) = arrays
            dtype = node.attrs["dtype"]
            if array is None or not isinstance(dtype, DType):
                raise TypeError(node)
            return array.astype(_STORED[dtype], copy=False)
        if node.op in _MOVES:
            if len({a.dtype for a in arrays if a is not None}) > 1:
                arrays = [None if a is None else a.astype(np.float32) for a in arrays]
            arrays = [None if a is None else _movable(a) for a in arrays]
            (made,) = ops.run_reference(node.op, arrays, node.attrs)
            return made.view(ml_dtypes.bfloat16) if made.dtype == np.uint16 else made
        wide = [a if a is None or a.dtype.kind in "iub" else a.astype(np.float32) for a in arrays]
        return ops.run_reference(node.op, wide, node.attrs)[node.results.index(value)]

    def _quantized(self, node: Node) -> tuple[np.ndarray, ...]:
        """Values and scales of a weight. They are asked for one after the other: the last weight's are kept."""
        if self._last is None or self._last[0] is not node:
            attrs, (weight,) = node.attrs, node.operands
            scheme = Scheme(str(attrs["format"]), int(str(attrs["group"])), bool(attrs["symmetric"]), "none")  # type: ignore[arg-type]
            made = self._rows.get(weight, scheme)  # type: ignore[arg-type]
            arrays = (made.values, made.scales, made.offsets)
            self._last = node, tuple(a for a in arrays if a is not None)
        return self._last[1]


def _movable(array: np.ndarray) -> np.ndarray:
    """NumPy moves uint16 much faster than bfloat16."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def weight_buffers(graph: Graph, values: Iterable[Value], read: Callable[[str], np.ndarray],
                   padded: Callable[[TensorType], int],
                   stored: StoredReader | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of each weight in order, padded with zeros to `padded(type)`; see `ConstantFolder`."""
    folder = ConstantFolder(graph, read, stored)
    for value in values:
        array = folder.evaluate(value)
        data = memoryview(array.reshape(-1).view(np.uint8))
        if not isinstance(value.type, TensorType):
            raise TypeError(value)
        missing = padded(value.type) - data.nbytes
        yield bytes(data) + bytes(missing) if missing else data
