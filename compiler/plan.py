"""Memory and step planning: where every value of a kernel-level graph lives, and the calls of one step.

Activations are rows of `ld` elements in the workspace, shared between values that are never alive together.
Weights are the constant operands of kernels, in the order of first use. State is an offset within a block of its table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from inferloom.compiler.state import StatePlan, need, plan_state, widest, window_of
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import STATES, StateType, TensorType, bound

ALIGN = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """`space` is workspace, weights, state or input; `offset` in bytes, within a block for state.

    `ld` is the distance between rows in elements, 0 for what has no rows. Inputs are found by `name`.
    """

    space: str
    offset: int = 0
    ld: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Placements of all values, sizes in bytes, weights in file order."""

    places: dict[Value, Placement]
    workspace: int
    weights: tuple[Value, ...]
    weight_bytes: int
    states: tuple[Value, ...]
    state: StatePlan
    kernels: tuple[Node, ...]

    @property
    def bytes_per_block(self) -> int:
        return self.state.block


def align(size: int, to: int = ALIGN) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


def row_elements(type: TensorType) -> int:
    """Elements of one row: the product of the dims behind the leading symbolic one."""
    return prod(int(str(d)) for d in type.shape[1:])


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of activations lie: starts `align` bytes apart at least, never a multiple of `avoid` (0: any)."""

    align: int
    avoid: int

    def leading(self, type: TensorType) -> int:
        """Distance between rows, in elements."""
        size = align(row_elements(type) * type.dtype.itemsize, self.align)
        if self.avoid and size % self.avoid == 0:
            size += self.align
        return size // type.dtype.itemsize


def tensor_bytes(type: TensorType) -> int:
    """Bytes of a weight in the artifact, padded to whole cache lines."""
    return align(type.max_size * type.dtype.itemsize)


def plan_memory(graph: Graph, rows: Rows) -> Plan:
    """Place every value of a kernel-level graph."""
    kernels = tuple(n for n in graph.nodes if n.op == "kernel")
    known = graph.constants()
    places: dict[Value, Placement] = {}
    weights, weight_bytes = _place_weights(kernels, known, places)
    states = tuple(v for v in graph.inputs if isinstance(v.type, STATES))
    state = _place_states(states, kernels, places)
    for value in graph.inputs:
        if isinstance(value.type, TensorType):
            places[value] = Placement("input", name=value.name)
    workspace = _place_activations(graph, kernels, places, rows)
    return Plan(places, workspace, weights, weight_bytes, states, state, kernels)


def _place_weights(kernels: Iterable[Node], known: set[Value], places: dict[Value, Placement]) -> tuple[tuple[Value, ...], int]:
    offset, order = 0, []
    for node in kernels:
        for value in node.operands:
            if value is None or value not in known or value in places or not isinstance(value.type, TensorType):
                continue
            places[value] = Placement("weights", offset)
            offset += tensor_bytes(value.type)
            order.append(value)
    return tuple(order), offset


def _place_states(states: tuple[Value, ...], kernels: Iterable[Node], places: dict[Value, Placement]) -> StatePlan:
    """Place states where page-state has dealt out their tables, and what is written over them at the same place."""
    first: dict[Value, Value] = {v: v for v in states}
    windows: dict[Value, int] = {}
    by_block: set[Value] = set()
    for node in kernels:
        body = node.attrs["body"]
        if not isinstance(body, Graph):
            raise TypeError(body)
        outer = dict(zip(body.inputs, node.operands)) | dict(zip(body.outputs, node.results))
        for inner in body.nodes:
            for result in inner.results:
                if isinstance(result.type, STATES):
                    first[_required(outer[result])] = first[_required(outer[_required(inner.operands[0])])]
            if inner.op == "block_means":
                by_block.add(first[_required(outer[_required(inner.operands[0])])])
            if inner.op == "paged_attention":
                held, tables = _required(inner.operands[1]), _required(inner.operands[4])
                if not isinstance(held.type, StateType) or not isinstance(tables.type, TensorType):
                    raise TypeError(inner)
                longest = held.type.block_tokens * bound(tables.type.shape[1])
                state, window = first[_required(outer[held])], window_of(inner.attrs["first"], longest)
                windows[state] = widest(window, windows.get(state, window))
    placed = plan_state([need(v.type, windows.get(v, 0), v in by_block) for v in states])  # type: ignore[arg-type]
    for value, before in first.items():
        places[value] = Placement("state", placed.places[states.index(before)].offset)
    return placed


def _place_activations(graph: Graph, kernels: tuple[Node, ...], places: dict[Value, Placement],
                       rows: Rows) -> int:
    """First fit over lifetimes: a value's bytes are free again after its last reader."""
    last: dict[Value, int] = {v: len(kernels) for v in graph.outputs}
    for index, node in enumerate(kernels):
        for value in node.operands:
            if value is not None:
                last[value] = max(last.get(value, 0), index)
    alive: list[tuple[int, int, int]] = []  # (offset, end, last reader)
    top = 0
    for index, node in enumerate(kernels):
        alive = [a for a in alive if a[2] >= index]
        for value in node.results:
            if isinstance(value.type, STATES):
                continue
            if value.type.is_static:
                raise UnsupportedError(f"kernel at {node.loc} computes a value without rows: {value!r}")
            ld = rows.leading(value.type)
            size = align(bound(value.type.shape[0]) * ld * value.type.dtype.itemsize, rows.align)
            offset = 0
            for begin, end, _ in sorted(alive):
                if begin - offset >= size:
                    break
                offset = max(offset, end)
            alive.append((offset, offset + size, last.get(value, index)))
            top = max(top, offset + size)
            places[value] = Placement("workspace", offset, ld)
    return top


def _required(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value


