"""Kernel selection: which distinct kernels a planned graph needs, and the calls of one step.

Two kernel nodes with the same body and the same layouts are one kernel, whatever layer they come from, so that
compile time and code size grow with distinct layers and not with depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from inferloom.compiler.plan import Placement, Plan
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.text import fingerprint
from inferloom.targets.base import KernelSource, Layout


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One stage of the step: an index into the distinct kernels, and where its operands and results are."""

    kernel: int
    places: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Distinct kernels, the model source lines that each serves, and the calls in order."""

    sources: tuple[KernelSource, ...]
    locations: tuple[tuple[str, ...], ...]
    calls: tuple[KernelCall, ...]


def select_kernels(plan: Plan) -> Selection:
    """Number the distinct kernels in order of first use."""
    index: dict[tuple[str, tuple[Layout, ...]], int] = {}
    sources: list[KernelSource] = []
    locations: list[dict[str, None]] = []
    calls = []
    for node in plan.kernels:
        body = node.attrs["body"]
        if not isinstance(body, Graph):
            raise UnsupportedError(f"kernel at {node.loc} has no body")
        values = [*(v for v in node.operands if v is not None), *node.results]
        places = tuple(plan.places[v] for v in values)
        layouts = tuple(_layout(v, p, plan) for v, p in zip(values, places, strict=True))
        key = (fingerprint(body), layouts)
        if key not in index:
            index[key] = len(sources)
            sources.append(KernelSource(_symbol(len(sources), node, body), node, layouts))
            locations.append({})
        number = index[key]
        locations[number].update(dict.fromkeys(n.loc for n in body.nodes if n.loc))
        calls.append(KernelCall(number, places))
    return Selection(tuple(sources), tuple(tuple(loc) for loc in locations), tuple(calls))


def _layout(value: Value, place: Placement, plan: Plan) -> Layout:
    return Layout(space=place.space, ld=place.ld,
                  block_stride=plan.bytes_per_block if place.space == "state" else 0)


def _symbol(number: int, node: Node, body: Graph) -> str:
    """A readable C symbol: the kind and the ops that matter, e.g. `k3_matmul_packed_linear_add`."""
    names = dict.fromkeys(n.op for n in body.nodes if n.op not in ("constant", "reshape", "slice", "cast", "concat"))
    return "_".join([f"k{number}", str(node.attrs["kind"]), *list(names)[:4]])
