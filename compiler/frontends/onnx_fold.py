"""Evaluating what an ONNX graph computes from shapes, positions and constants alone, for chosen lengths.

Shape arithmetic, masks and rotary tables do not depend on what the tokens are. `Structure` evaluates them with NumPy
for a `Sample`: one sequence whose first `past` tokens are cached and of which `tokens` more are run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inferloom.compiler.frontends.onnx_file import ELEMENTS, OnnxGraph, OnnxInput, Op
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import Shape, Sym

#: No evaluated array has more elements.
MOST = 1 << 26


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


Fold = Callable[..., Any]
FOLDS: dict[str, Fold] = {}


def folds(*names: str) -> Callable[[Fold], Fold]:
    """Register `f(structure, op, *arrays)`; an absent operand is None."""

    def register(f: Fold) -> Fold:
        FOLDS.update({name: f for name in names})
        return f

    return register


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
        given = next(i for i in self.graph.inputs if i.name == name)
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
                    made = FOLDS[op.key](self, op, *arrays)
            except UnsupportedError as error:
                raise UnsupportedError(f"{op}: {error}") from None
            except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
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


def limit(shape: Sequence[int]) -> None:
    """UnsupportedError when an array is too large to be evaluated while compiling."""
    if math.prod(int(d) for d in shape) > MOST:
        raise UnsupportedError(f"an array of shape {list(shape)} would have to be evaluated; at most {MOST} elements are")


def axes_of(structure: Structure, op: Op, arrays: Sequence[np.ndarray | None]) -> tuple[int, ...] | None:
    """`axes` as an attribute (old opsets) or as the second input; None when not given."""
    if "axes" in op.attrs:
        return tuple(op.attrs["axes"])
    given = arrays[0] if arrays else None
    return None if given is None else tuple(int(a) for a in given.reshape(-1))


def target_shape(shape: Sequence[int], wanted: Sequence[int], allow_zero: bool) -> list[int]:
    """The shape that a Reshape asks for: 0 keeps a dim (unless `allow_zero`), -1 stands for what is left."""
    return [int(shape[i]) if d == 0 and not allow_zero else int(d) for i, d in enumerate(wanted)]


def _pointwise(name: str, f: Callable[..., Any], keep: bool = True) -> None:
    @folds(name)
    def fold(structure: Structure, op: Op, *arrays: np.ndarray) -> Any:
        limit(np.broadcast_shapes(*(a.shape for a in arrays)))
        made = arrays[0]
        if len(arrays) == 1 and name not in ("Max", "Min", "Sum"):
            made = f(made)
        for other in arrays[1:]:
            made = f(made, other)
        return made.astype(arrays[0].dtype) if keep else made


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind in "iu":  # towards zero
        return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(x.dtype)
    return x / y


for _name, _f in {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Pow": np.power, "Max": np.maximum,
                  "Min": np.minimum, "Neg": np.negative, "Abs": np.abs, "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log,
                  "Sin": np.sin, "Cos": np.cos, "Tanh": np.tanh, "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint,
                  "Sign": np.sign, "Reciprocal": np.reciprocal, "Not": np.logical_not, "BitwiseAnd": np.bitwise_and,
                  "BitwiseOr": np.bitwise_or, "BitwiseNot": np.bitwise_not, "Sum": np.add}.items():
    _pointwise(_name, _f)
for _name, _f in {"Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
                  "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
                  "IsNaN": np.isnan, "IsInf": np.isinf}.items():
    _pointwise(_name, _f, keep=False)


@folds("Mod")
def _mod(structure: Structure, op: Op, x: np.ndarray, y: np.ndarray) -> Any:
    return (np.fmod if op.attrs.get("fmod") else np.mod)(x, y).astype(x.dtype)


@folds("Clip")
def _clip(structure: Structure, op: Op, x: np.ndarray, low: Any = None, high: Any = None) -> Any:
    return x if low is None and high is None else np.clip(x, low, high).astype(x.dtype)


@folds("Where")
def _where(structure: Structure, op: Op, condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> Any:
    limit(np.broadcast_shapes(condition.shape, x.shape, y.shape))
    return np.where(condition, x, y)


@folds("Cast")
def _cast(structure: Structure, op: Op, x: np.ndarray) -> Any:
    return x.astype(ELEMENTS[op.attrs["to"]])


@folds("CastLike")
def _cast_like(structure: Structure, op: Op, x: np.ndarray, like: np.ndarray) -> Any:
    return x.astype(like.dtype)


@folds("Identity", "Dropout")
def _same(structure: Structure, op: Op, x: np.ndarray, *rest: Any) -> Any:
    return x


@folds("Range")
def _range(structure: Structure, op: Op, start: np.ndarray, stop: np.ndarray, step: np.ndarray) -> Any:
    limit([max(0, math.ceil((stop.item() - start.item()) / step.item()))])
    return np.arange(start.item(), stop.item(), step.item(), start.dtype)


@folds("ConstantOfShape")
def _filled(structure: Structure, op: Op, shape: np.ndarray) -> Any:
    from onnx.numpy_helper import to_array

    limit(shape)
    value = to_array(op.attrs["value"]) if "value" in op.attrs else np.zeros(1, np.float32)
    return np.full(tuple(int(d) for d in shape), value.reshape(-1)[0], value.dtype)


@folds("Gather")
def _gather(structure: Structure, op: Op, x: np.ndarray, places: np.ndarray) -> Any:
    return np.take(x, places.astype(np.int64), op.attrs.get("axis", 0))


@folds("GatherND")
def _gather_nd(structure: Structure, op: Op, x: np.ndarray, places: np.ndarray) -> Any:
    if op.attrs.get("batch_dims", 0):
        raise ValueError("batch_dims other than 0")
    return x[tuple(places[..., i] for i in range(places.shape[-1]))]


@folds("GatherElements")
def _gather_elements(structure: Structure, op: Op, x: np.ndarray, places: np.ndarray) -> Any:
    return np.take_along_axis(x, places.astype(np.int64), op.attrs.get("axis", 0))


@folds("ScatterND")
def _scatter_nd(structure: Structure, op: Op, x: np.ndarray, places: np.ndarray, updates: np.ndarray) -> Any:
    if op.attrs.get("reduction", "none") != "none":
        raise ValueError("a reduction")
    made = x.copy()
    made[tuple(places[..., i] for i in range(places.shape[-1]))] = updates
    return made


@folds("Concat")
def _concat(structure: Structure, op: Op, *parts: np.ndarray) -> Any:
    return np.concatenate(parts, op.attrs["axis"])


@folds("Split")
def _split(structure: Structure, op: Op, x: np.ndarray, sizes: np.ndarray | None = None) -> Any:
    axis = op.attrs.get("axis", 0)
    return np.split(x, np.cumsum(split_sizes(op, x.shape[axis], sizes))[:-1], axis)


def split_sizes(op: Op, size: int, sizes: np.ndarray | None) -> list[int]:
    """The parts of a Split: given, as an attribute, or equal ones."""
    given = op.attrs.get("split") if sizes is None else sizes
    if given is not None:
        return [int(n) for n in given]
    step = -(-size // len(op.outputs))
    return [min(step, size - i * step) for i in range(len(op.outputs))]


@folds("Slice")
def _slice(structure: Structure, op: Op, x: np.ndarray, starts: np.ndarray, ends: np.ndarray, axes: Any = None,
           steps: Any = None) -> Any:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        cut[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(cut)]


@folds("Squeeze")
def _squeeze(structure: Structure, op: Op, x: np.ndarray, *rest: Any) -> Any:
    return np.squeeze(x, axes_of(structure, op, rest))


@folds("Unsqueeze")
def _unsqueeze(structure: Structure, op: Op, x: np.ndarray, *rest: Any) -> Any:
    return np.expand_dims(x, axes_of(structure, op, rest) or ())


@folds("Reshape")
def _reshape(structure: Structure, op: Op, x: np.ndarray, shape: np.ndarray) -> Any:
    return x.reshape(target_shape(x.shape, shape.tolist(), bool(op.attrs.get("allowzero", 0))))


@folds("Flatten")
def _flatten(structure: Structure, op: Op, x: np.ndarray) -> Any:
    axis = op.attrs.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@folds("Transpose")
def _transpose(structure: Structure, op: Op, x: np.ndarray) -> Any:
    return np.transpose(x, op.attrs.get("perm"))


@folds("Expand")
def _expand(structure: Structure, op: Op, x: np.ndarray, shape: np.ndarray) -> Any:
    full = np.broadcast_shapes(x.shape, tuple(int(d) for d in shape))
    limit(full)
    return np.broadcast_to(x, full)


@folds("Tile")
def _tile(structure: Structure, op: Op, x: np.ndarray, repeats: np.ndarray) -> Any:
    limit([a * int(b) for a, b in zip(x.shape, repeats)])
    return np.tile(x, tuple(int(r) for r in repeats))


@folds("Trilu")
def _trilu(structure: Structure, op: Op, x: np.ndarray, k: np.ndarray | None = None) -> Any:
    return (np.triu if op.attrs.get("upper", 1) else np.tril)(x, 0 if k is None else int(k))


@folds("CumSum")
def _cumsum(structure: Structure, op: Op, x: np.ndarray, axis: np.ndarray) -> Any:
    if op.attrs.get("exclusive") or op.attrs.get("reverse"):
        raise ValueError("exclusive or reverse")
    return np.cumsum(x, int(axis.item()), dtype=x.dtype)


@folds("MatMul")
def _matmul(structure: Structure, op: Op, x: np.ndarray, y: np.ndarray) -> Any:
    limit((*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), *x.shape[-2:-1], *y.shape[-1:]))
    return np.matmul(x, y)


def _reduction(name: str, f: Callable[..., Any]) -> None:
    @folds(name)
    def fold(structure: Structure, op: Op, x: np.ndarray, *rest: Any) -> Any:
        axes = axes_of(structure, op, rest)
        if not axes and op.attrs.get("noop_with_empty_axes"):
            return x
        return f(x, axis=axes or None, keepdims=bool(op.attrs.get("keepdims", 1))).astype(x.dtype)


for _name, _f in {"ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean,
                  "ReduceProd": np.prod}.items():
    _reduction(_name, _f)

