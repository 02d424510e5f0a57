"""What an ONNX graph computes from shapes, positions and constants alone, evaluated for chosen lengths.

Shape arithmetic, masks and rotary tables do not depend on what the tokens are. `Structure` evaluates them with NumPy
for a `Sample`: one sequence whose first `past` tokens are cached and of which `tokens` more are run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inferloom.compiler.frontends.onnx.file import ELEMENTS, MALFORMED, OnnxGraph, OnnxInput, Op
from inferloom.compiler.frontends.onnx.fold import FOLDS, limit
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import Shape, Sym


@dataclass(frozen=True, slots=True, order=True)
class Sample:
    """Lengths to evaluate at: tokens that are cached, and tokens of this step."""

    past: int
    tokens: int

    @property
    def keys(self) -> int:
        return self.past + self.tokens

    @property
    def positions(self) -> np.ndarray:
        return np.arange(self.past, self.keys)


@dataclass(frozen=True, slots=True)
class Roles:
    """What each input of the graph is; None for what the graph lacks."""

    tokens: str
    mask: str | None
    positions: str | None
    caches: tuple[str, ...]
    #: seqlens_k and total_sequence_length, as onnxruntime's GroupQueryAttention takes them.
    last: str | None = None
    total: str | None = None


@dataclass(slots=True)
class Structure:
    """Evaluates the values of a graph that do not depend on what the tokens are (`content` does)."""

    graph: OnnxGraph
    roles: Roles
    samples: tuple[Sample, ...]
    tokens: Sym
    keys: Sym
    past: Sym
    #: Shapes of content values, filled in by the importer in graph order.
    shapes: dict[str, Shape] = field(default_factory=dict)
    content: frozenset[str] = frozenset()
    dynamic: frozenset[str] = frozenset()
    producers: dict[str, Op] = field(default_factory=dict)
    _memo: dict[Sample, dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        content = {self.roles.tokens, *self.roles.caches}
        dynamic = {i.name for i in self.graph.inputs}
        for op in self.graph.ops:
            self.producers.update({o: op for o in op.outputs if o})
            if op.key not in ("Shape", "Size") and content.intersection(op.inputs):
                content.update(filter(None, op.outputs))
            if dynamic.intersection(op.inputs):
                dynamic.update(filter(None, op.outputs))
        self.content, self.dynamic = frozenset(content), frozenset(dynamic)

    def concrete(self, shape: Shape, sample: Sample) -> tuple[int, ...]:
        """A shape of the import at the lengths of a sample."""
        sizes = {self.tokens: sample.tokens, self.keys: sample.keys, self.past: sample.past}
        return tuple(d if isinstance(d, int) else sizes[d] for d in shape)  # type: ignore[index]

    def ancestors(self, name: str) -> list[str]:
        """Every value that a structural one is computed from, itself included; content is not entered."""
        seen, todo = {name: None}, [name]
        while todo:
            op = self.producers.get(todo.pop())
            for source in () if op is None else filter(None, op.inputs):
                if source not in seen:
                    seen[source] = None
                    if source not in self.content:
                        todo.append(source)
        return list(seen)

    def at(self, name: str, sample: Sample, keep: bool = True) -> np.ndarray:
        """The value at a sample. UnsupportedError names the operator that cannot be evaluated."""
        if name in self.content:
            raise UnsupportedError(f"{name!r} depends on what the tokens are")
        memo = self._memo.setdefault(sample, {}) if keep else dict(self._memo.get(sample, {}))
        todo = [name]
        while todo:
            at = todo[-1]
            op = self.producers.get(at)
            missing = [] if op is None or at in memo or op.key in ("Shape", "Size") else [
                i for i in op.inputs if i and i not in memo]
            if missing:
                todo += missing
                continue
            todo.pop()
            if at not in memo:
                memo.update(self._leaf(at, sample) if op is None else self._run(op, sample, memo))
        return memo[name]

    def everywhere(self, name: str) -> list[np.ndarray]:
        """The value at each of the usual samples."""
        return [self.at(name, s) for s in self.samples]

    def _leaf(self, name: str, sample: Sample) -> dict[str, np.ndarray]:
        if name in self.graph.tensors:
            tensor = self.graph.tensors[name]
            limit(tensor.shape)
            return {name: np.asarray(tensor.read())}
        given = next((i for i in self.graph.inputs if i.name == name), None)
        if given is None:
            raise UnsupportedError(f"{name!r} is missing")
        return {name: self._given(given, sample)}

    def _given(self, given: OnnxInput, sample: Sample) -> np.ndarray:
        dtype = ELEMENTS[given.data_type]
        name, rank = given.name, len(given.shape)
        if name == self.roles.positions:
            return sample.positions.reshape((1,) * (rank - 1) + (-1,)).astype(dtype)
        if name == self.roles.mask:
            return np.ones((1, sample.keys), dtype)
        if name == self.roles.last:
            return np.full((1,) * rank, sample.keys - 1, dtype)
        if name == self.roles.total:
            return np.full((1,) * rank, sample.keys, dtype)
        raise UnsupportedError(f"input {name!r} has no known meaning")

    def _run(self, op: Op, sample: Sample, memo: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if op.key in ("Shape", "Size"):
            shape = self._shape(op.inputs[0], sample)
            start, end = op.attrs.get("start", 0), op.attrs.get("end", len(shape))
            made: Any = np.asarray(shape[start:end], np.int64) if op.key == "Shape" else np.asarray(math.prod(shape))
        else:
            if op.key not in FOLDS:
                raise UnsupportedError(f"{op} computes a shape, a mask or a table, and cannot be evaluated")
            arrays = [memo[i] if i else None for i in op.inputs]
            try:
                with np.errstate(all="ignore"):
                    made = FOLDS[op.key](op, *arrays)
            except UnsupportedError as error:
                raise UnsupportedError(f"{op}: {error}") from None
            except MALFORMED as error:
                raise UnsupportedError(f"{op} cannot be evaluated: {error}") from error
        if not isinstance(made, (tuple, list)):
            made = (made,)
        for array in made:
            limit(np.shape(array))
        return {name: np.asarray(array) for name, array in zip(op.outputs, made) if name}

    def _shape(self, name: str, sample: Sample) -> tuple[int, ...]:
        if name in self.shapes:
            return self.concrete(self.shapes[name], sample)
        if name in self.content:
            raise UnsupportedError(f"the shape of {name!r} is not known")
        return self.at(name, sample).shape

    def dim(self, sizes: Sequence[int]) -> int | Sym:
        """The dim that has these sizes at the usual samples."""
        if len(set(sizes)) == 1:
            return int(sizes[0])
        for sym in (self.tokens, self.keys):
            if all(n == self.concrete((sym,), s)[0] for n, s in zip(sizes, self.samples)):
                return sym
        raise UnsupportedError(f"a dim of {list(map(int, sizes))} where there are {[s.tokens for s in self.samples]} tokens "
                               f"and {[s.past for s in self.samples]} cached ones; only the tokens may vary")
