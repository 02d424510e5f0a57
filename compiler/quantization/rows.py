"""Weights made of rows of other weights, as merge-linear makes them: what they are made of, and how they are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace

import numpy as np

from inferloom.compiler.quantization.scheme import Scheme
from inferloom.compiler.quantization.tensor import QuantizedTensor, concat, quantize
from inferloom.ir.graph import Node, Value

#: Gives the weight of a source as the checkpoint stores it, None where that is not quantised.
StoredReader = Callable[[str], QuantizedTensor | None]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights that a checkpoint holds quantised: the scheme of each, by source, and how to read one.

    `read` is called for one source after another, while the artifact is written. `names` says what the checkpoint calls
    the form of each, `rounded` which of them `read` rounds anew, since no scheme has the checkpoint's own integers.
    """

    schemes: Mapping[str, Scheme]
    read: Callable[[str], QuantizedTensor]
    names: Mapping[str, str] = field(default_factory=dict)
    rounded: Set[str] = frozenset()

    def get(self, source: str) -> QuantizedTensor | None:
        return self.read(source) if source in self.schemes else None


def moves_rows(node: Node) -> bool:
    """Whether the node puts rows of its operands into another order, and leaves each as it is."""
    return node.op in ("interleave", "cast") or node.op in ("concat", "slice") and node.attrs["axis"] == 0


def row_sources(value: Value, producers: Mapping[Value, Node], sources: Mapping[Value, str]) -> tuple[str, ...] | None:
    """The sources whose rows `value` is made of; None when anything else happens to them."""
    if value in sources:
        return (sources[value],)
    node = producers.get(value)
    if node is None or not moves_rows(node):
        return None
    found: dict[str, None] = {}
    for operand in node.operands:
        names = None if operand is None else row_sources(operand, producers, sources)
        if names is None:
            return None
        found.update(dict.fromkeys(names))
    return tuple(found)


class RowQuantizer:
    """Quantises weights row by row, each source for itself, so that what is stored quantised is not rounded again.

    `evaluate` gives the array of a constant value.
    """

    def __init__(self, producers: Mapping[Value, Node], sources: Mapping[Value, str],
                 evaluate: Callable[[Value], np.ndarray], stored: StoredReader | None = None) -> None:
        self._producers, self._sources, self._evaluate, self._stored = producers, sources, evaluate, stored

    def get(self, value: Value, scheme: Scheme) -> QuantizedTensor:
        """`value` [n, k] in `scheme`, whose activations do not matter."""
        node = self._producers.get(value)
        if value in self._sources:
            found = self._stored(self._sources[value]) if self._stored is not None else None
            if found is not None:
                return replace(found, scheme=scheme) if _alike(found.scheme, scheme) else quantize(found.dequantize(), scheme)
        elif node is not None and moves_rows(node):
            parts = [self.get(v, scheme) for v in node.operands if v is not None]
            return _moved(node, parts)
        return quantize(self._evaluate(value), scheme)


def _alike(a: Scheme, b: Scheme) -> bool:
    return (a.format, a.group, a.symmetric) == (b.format, b.group, b.symmetric)


def _moved(node: Node, parts: list[QuantizedTensor]) -> QuantizedTensor:
    if node.op == "cast":
        return parts[0]
    both = parts[0] if len(parts) == 1 else concat(parts)
    if node.op == "concat":
        return both
    if node.op == "slice":
        return both.rows(slice(int(str(node.attrs["start"])), int(str(node.attrs["stop"])), int(str(node.attrs["step"]))))
    group = int(str(node.attrs["group"]))
    return both.rows(np.arange(both.shape[0]).reshape(2, -1, group).transpose(1, 0, 2).reshape(-1))
