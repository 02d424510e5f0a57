"""Trace each distinct layer a few times and repeat it, so that tracing does not grow with depth.

Layers with equal fingerprints (classes, shapes, scalar attributes, buffers) compute the same thing with other
weights. While tracing, all but the first, second and last of each kind are skipped: they return their input. The
traced ones of a kind must then be equal node by node, or the whole model is traced instead.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inferloom.compiler.frontends.aten import Imported, tidy
from inferloom.ir.graph import Builder, Graph, Node, Value
from inferloom.ir.types import TensorType

#: Attributes that tell a layer its place; all others must be equal for layers to count as one.
_PLACE = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "training", "config", "_is_full_backward_hook"})


class NotRepeated(Exception):
    """The layers cannot be repeated; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerList:
    """The list of decoder layers of a model: where it hangs, and for each layer the first one that is like it."""

    path: str
    modules: nn.ModuleList
    kinds: tuple[int, ...]

    def traced(self) -> list[int]:
        """The layers to trace: first, second and last of each kind."""
        chosen: set[int] = set()
        for kind in set(self.kinds):
            members = [i for i, k in enumerate(self.kinds) if k == kind]
            chosen.update((members[0], members[min(1, len(members) - 1)], members[-1]))
        return sorted(chosen)


def find_layers(model: nn.Module) -> LayerList | None:
    """The longest outermost list of modules, or None when there is none with two or more."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    outer = [(n, m) for n, m in lists if not any(n.startswith(o + ".") for o, _ in lists)]
    if not outer:
        return None
    path, modules = max(outer, key=lambda item: len(item[1]))
    prints = [fingerprint(m) for m in modules]
    return LayerList(path, modules, tuple(prints.index(p) for p in prints))


def fingerprint(module: nn.Module) -> str:
    """A hash of all that decides what a module computes, but for its weights and its place."""
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        digest.update(f"{path} {type(part).__module__}.{type(part).__qualname__}\n".encode())
        for name, value in sorted(vars(part).items()):
            if name not in _PLACE and not name.startswith(("_parameters", "_buffers", "_modules")):
                digest.update(f"  {name}={_describe(value)}\n".encode())
        for name, parameter in part._parameters.items():
            digest.update(f"  {name}:{None if parameter is None else tuple(parameter.shape)}\n".encode())
        for name, buffer in part._buffers.items():
            digest.update(f"  {name}:{_describe(buffer)}\n".encode())
    return digest.hexdigest()


def _describe(value: Any) -> str:
    if isinstance(value, (int, float, str, bool, type(None), enum.Enum, torch.dtype)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__}({', '.join(_describe(v) for v in value)})"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_describe(v)}" for k, v in value.items())
    return getattr(value, "__qualname__", type(value).__qualname__)


class _Skipped(nn.Module):
    """Stands for a layer that is not traced: returns its input in the form that traced layers return."""

    def __init__(self, layer: nn.Module, form: list[tuple[type, int] | None]) -> None:
        super().__init__()
        self._layer = [layer]
        self._form = form

    def __getattr__(self, name: str) -> Any:
        if name in ("_layer", "_form"):
            raise AttributeError(name)
        return getattr(self._layer[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        form = self._form[0]
        return hidden if form is None else form[0]((hidden, *(None for _ in range(form[1] - 1))))


@contextlib.contextmanager
def skipping(layers: LayerList) -> Iterator[None]:
    """Replace all layers but the traced ones by modules that do nothing; restored on exit."""
    form: list[tuple[type, int] | None] = [None]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        form[0] = next(((kind, len(output)) for kind in (tuple, list) if isinstance(output, kind)), None)

    keep = set(layers.traced())
    originals = list(layers.modules)
    hooks = [originals[i].register_forward_hook(note) for i in keep]
    try:
        for i, layer in enumerate(originals):
            if i not in keep:
                layers.modules[i] = _Skipped(layer, form)
        yield
    finally:
        for i, layer in enumerate(originals):
            layers.modules[i] = layer
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """The nodes of one traced layer, the value it takes over from what is before, and the one it hands on."""

    index: int
    nodes: tuple[Node, ...]
    out: Value


def repeat(imported: Imported, layers: LayerList, sources: dict[str, str]) -> Graph:
    """The graph of the whole model from one traced under `skipping`. Raises NotRepeated when it cannot be told."""
    graph = imported.graph
    regions = _regions(imported, layers)
    entry = _entries(graph, regions, layers, sources)
    inside = {n for r in regions for n in r.nodes}
    end = graph.nodes.index(regions[-1].nodes[-1])
    head = [n for n in graph.nodes[:end] if n not in inside]
    tail = graph.nodes[end + 1:]
    between = _dependents(graph, *(r.out for r in regions))
    for node in head:
        if node in between:
            raise NotRepeated(f"{node.op} at {node.loc} stands between layers")
    builder = Builder(graph.name, list(graph.inputs))
    copier = _Copier(builder, {v: v for v in graph.inputs}, {p.value: p.source for p in graph.params}, {}, [0])
    for node in head:
        copier.copy(node, lambda s: s)
    by_index = {r.index: r for r in regions}
    current: Value | None = None
    for i, kind in enumerate(layers.kinds):
        region = by_index[kind]
        if current is not None:
            copier.made[entry[kind]] = current
        for node in region.nodes:
            copier.copy(node, _renamer(layers.path, kind, i, sources))
        current = copier.made[region.out]
    if current is None:
        raise NotRepeated("there is no layer")
    copier.made[regions[-1].out] = current
    for node in tail:
        copier.copy(node, lambda s: s)
    return tidy(builder.finish(copier.value(v, lambda s: s) for v in graph.outputs))


Rename = Callable[[str], str]


@dataclass(slots=True, eq=False)
class _Copier:
    """Copies nodes into a builder; params are made on first use, stateful ops numbered anew."""

    builder: Builder
    made: dict[Value, Value]
    params: dict[Value, str]
    by_source: dict[str, Value]
    slot: list[int]

    def value(self, value: Value, rename: Rename) -> Value:
        if value in self.params:
            source = rename(self.params[value])
            if source not in self.by_source:
                if not isinstance(value.type, TensorType):
                    raise NotRepeated(f"{source} is not a tensor")
                self.by_source[source] = self.builder.param(source, value.type)
            return self.by_source[source]
        return self.made[value]

    def copy(self, node: Node, rename: Rename) -> None:
        attrs = dict(node.attrs)
        if "slot" in attrs:
            attrs["slot"], self.slot[0] = self.slot[0], self.slot[0] + 1
        operands = [None if v is None else self.value(v, rename) for v in node.operands]
        copied = self.builder.emit_node(node.op, operands, attrs, node.loc, [v.name for v in node.results])
        self.made.update(zip(node.results, copied.results))


def _renamer(path: str, old: int, new: int, sources: dict[str, str]) -> Rename:
    before, after = f"{path}.{old}.", f"{path}.{new}."
    return lambda s: sources[after + s.removeprefix(before)] if s.startswith(before) else s


def _regions(imported: Imported, layers: LayerList) -> list[_Region]:
    """The traced layers in order, each with the one value that is read outside of it."""
    groups: dict[int, list[Node]] = {}
    for node in imported.graph.nodes:
        path = imported.paths.get(node, "")
        if path.startswith(layers.path + ".") and node.op != "constant":
            groups.setdefault(int(path.removeprefix(layers.path + ".").split(".")[0]), []).append(node)
    if sorted(groups) != layers.traced() or list(groups) != sorted(groups):
        raise NotRepeated(f"traced layers {layers.traced()} but nodes came from {list(groups)}")
    users = imported.graph.users()
    regions = []
    for index, nodes in groups.items():
        mine = set(nodes)
        outs = [v for n in nodes for v in n.results
                if any(u not in mine for u in users.get(v, ())) or v in imported.graph.outputs]
        if len(outs) != 1:
            raise NotRepeated(f"{layers.path}.{index} hands on {len(outs)} values")
        regions.append(_Region(index, tuple(nodes), outs[0]))
    return regions


def _entries(graph: Graph, regions: Sequence[_Region], layers: LayerList, sources: dict[str, str]) -> dict[int, Value]:
    """For each kind, the value that its first layer takes over; checks that all traced ones of a kind are equal."""
    params = {p.value: p.source for p in graph.params}
    before = {r.index: p.out for p, r in zip(regions, regions[1:])}
    by_index = {r.index: r for r in regions}
    entry: dict[int, Value] = {k: before[k] for k in by_index if k in before}
    for region in regions:
        kind = layers.kinds[region.index]
        if kind == region.index:
            continue
        taken = _compare(by_index[kind], region, params, _renamer(layers.path, kind, region.index, sources))
        for first, other in taken.items():
            if other is not before[region.index] or entry.setdefault(kind, first) is not first:
                raise NotRepeated(f"layers {kind} and {region.index} read different values from outside")
    return entry


def _compare(a: _Region, b: _Region, params: dict[Value, str], rename: Rename) -> dict[Value, Value]:
    """Outside values of a and b that differ, a's to b's; raises NotRepeated unless they are otherwise equal."""
    where = f"layers {a.index} and {b.index} look alike but trace differently"
    if len(a.nodes) != len(b.nodes):
        raise NotRepeated(f"{where}: {len(a.nodes)} and {len(b.nodes)} nodes")
    same: dict[Value, Value] = {}
    taken: dict[Value, Value] = {}
    for x, y in zip(a.nodes, b.nodes):
        plain = [{k: v for k, v in n.attrs.items() if k != "slot"} for n in (x, y)]
        if x.op != y.op or plain[0] != plain[1] or len(x.operands) != len(y.operands):
            raise NotRepeated(f"{where}: {x.op} {plain[0]} at {x.loc}, {y.op} {plain[1]} at {y.loc}")
        for u, v in zip(x.operands, y.operands):
            if u is None or v is None:
                equal = u is v
            elif u in params:
                equal = v in params and rename(params[u]) == params[v]
            elif u in same:
                equal = same[u] is v
            else:
                equal = u is v or taken.setdefault(u, v) is v
            if not equal:
                raise NotRepeated(f"{where}: operands of {x.op} at {x.loc}")
        same.update(zip(x.results, y.results))
    if same[a.out] is not b.out:
        raise NotRepeated(f"{where}: their results")
    return taken


def _dependents(graph: Graph, *values: Value) -> set[Node]:
    reached = set(values)
    found = set()
    for node in graph.nodes:
        if any(v in reached for v in node.operands if v is not None):
            found.add(node)
            reached.update(node.results)
    return found
