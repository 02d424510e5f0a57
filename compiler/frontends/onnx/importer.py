"""Imports an ONNX graph into a model-level graph, token-major (see `layout`).

The graph runs one sequence [1, tokens]; what depends on the tokens becomes nodes, what does not (shapes, masks, rotary
tables) is evaluated or, where a node reads it, imported on demand (see `onnx_fold`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inferloom.compiler.frontends.layout import Layouts, Traced, natural_axes
from inferloom.compiler.frontends.onnx.file import MALFORMED, OnnxGraph, Op, Tensor
from inferloom.compiler.frontends.onnx.masks import Mask, Rule, prove
from inferloom.compiler.frontends.onnx.structure import Structure
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType, Shape, Sym, TensorType

#: Constants computed from more elements than this stay expressions over stored tensors, evaluated when packing.
SMALL = 1 << 16
_DEEPEST = 200


@dataclass(frozen=True, slots=True)
class Cache:
    """A past_key_values input: it may only be joined with new keys or values, which the paged state replaces."""

    name: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Attention scores on their way: `scale * q @ k`, then tanh for a soft-cap, masks, and the softmax."""

    q: Traced
    k: Traced
    shape: Shape
    scale: float = 1.0
    cap: float = 0.0
    masks: tuple[Mask, ...] = ()
    softmax: bool = False


@dataclass(frozen=True, slots=True)
class NoNaN:
    """`IsNaN` of probabilities: false, since each token sees itself."""


class _Poison:
    """The result of an operator that could not be imported; what reads it is skipped."""


POISON = _Poison()


class OnnxLayouts(Layouts):
    """Layouts in which cached and new keys together count as the tokens that make them."""

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        return Layouts.reshape(self, value, plain(shape))


def plain(shape: Sequence[Any]) -> Shape:
    """A shape of the import as the IR has it: the keys of a step are stored by the runtime."""
    return tuple(TOKENS if d is KEYS else d for d in shape)


MOST = 65536
TOKENS, ROWS = Sym("tokens", MOST), Sym("rows", MOST)
KEYS, PAST = Sym("keys", MOST), Sym("past", MOST)


@dataclass(slots=True)
class Importer:
    """The state of one import; lowerings get it with the operator they lower."""

    graph: OnnxGraph
    structure: Structure
    builder: Builder
    layouts: OnnxLayouts
    max_len: int
    env: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    #: Rows of each table that is indexed by positions (minus the offset), and by tokens.
    position_rows: dict[str, int] = field(default_factory=dict)
    token_rows: dict[str, int] = field(default_factory=dict)
    slots: int = 0
    _lifted: dict[tuple[bytes, str], Value] = field(default_factory=dict)
    _rules: dict[tuple[Mask, ...], Rule] = field(default_factory=dict)
    _depth: int = 0

    @property
    def positions(self) -> Value:
        return self.builder.inputs[1]

    def emit(self, op: str, *operands: Value | None, **attrs: Any) -> Value:
        if "shape" in attrs:
            attrs["shape"] = plain(attrs["shape"])
        return self.builder.emit(op, *operands, loc=self.layouts.loc, **attrs)

    # What operators read.

    def given(self, op: Op, place: int) -> bool:
        """Whether an optional operand is there."""
        return place < len(op.inputs) and op.inputs[place] != ""

    def name(self, op: Op, place: int) -> str:
        if not self.given(op, place):
            raise UnsupportedError(f"operand {place} is missing")
        return op.inputs[place]

    def raw(self, op: Op, place: int) -> Any:
        """What the import knows of an operand: Traced, Scores, Cache; None when it is structural."""
        return self.env.get(self.name(op, place))

    def operand(self, op: Op, place: int) -> Traced:
        """An operand as a graph value."""
        return self.need(self.name(op, place))

    def optional(self, op: Op, place: int) -> Traced | None:
        return self.operand(op, place) if self.given(op, place) else None

    def array(self, op: Op, place: int) -> np.ndarray:
        """An operand that is the same for all lengths."""
        return self.constant(self.name(op, place))

    def constant(self, name: str) -> np.ndarray:
        arrays = [self.structure.at(name, self.structure.samples[0])] if name not in self.structure.dynamic else \
            self.structure.everywhere(name)
        if any(a.shape != arrays[0].shape or not np.array_equal(a, arrays[0], equal_nan=a.dtype.kind == "f") for a in arrays):
            raise UnsupportedError(f"{name!r} must not depend on the number of tokens")
        return arrays[0]

    def number(self, op: Op, place: int) -> float | None:
        """An operand that is one number known at compile time, else None."""
        name = self.name(op, place)
        if name in self.structure.content or (name in self.graph.tensors and self.graph.tensors[name].size != 1):
            return None
        try:
            array = self.constant(name)
        except UnsupportedError:
            return None
        return float(array.item()) if array.size == 1 else None

    def dims(self, op: Op, place: int) -> list[int | Sym]:
        """A shape operand, its dims named; -1 and 0 stay."""
        arrays = self.structure.everywhere(self.name(op, place))
        if any(a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
            raise UnsupportedError("the rank of the shape depends on the number of tokens")
        return [self.structure.dim([int(a[i]) for a in arrays]) for i in range(len(arrays[0]))]

    # Values that are known, or computed from positions.

    def need(self, name: str) -> Traced:
        """A value as a graph value; structural ones are made now: constants, positions, or their operators imported."""
        if name in self.env:
            found = self.env[name]
            if isinstance(found, Traced):
                return found
            if found is POISON:
                raise UnsupportedError("poison")
            what = {Cache: f"the cache {name!r}, other than to join it with new keys and values",
                    Scores: "attention scores", NoNaN: "IsNaN of scores"}.get(type(found), f"{name!r}")
            raise UnsupportedError(f"reads {what}")
        if name in self.structure.content:
            raise UnsupportedError(f"reads {name!r}, which was not imported")
        if self._depth > _DEEPEST:
            raise UnsupportedError(f"{name!r} is computed by more than {_DEEPEST} operators in a row")
        self._depth += 1
        try:
            self.env[name] = made = self._make(name)
        finally:
            self._depth -= 1
        return made

    def _make(self, name: str) -> Traced:
        tensor = self.graph.tensors.get(name)
        if tensor is not None:
            return self._param(tensor) if tensor.is_float and tensor.size > 1 else self.lift(tensor.read(), name)
        if name not in self.structure.dynamic:
            read = [self.graph.tensors[n] for n in self.structure.ancestors(name) if n in self.graph.tensors]
            transposed = self.structure.producers[name].key == "Transpose"  # a tied weight stays one parameter
            if sum(t.size for t in read) <= SMALL and not transposed:
                return self.lift(self.constant(name), name)
            return self._lower(name)
        try:
            arrays = self.structure.everywhere(name)
        except UnsupportedError:  # such as rows past the end of a table: its operators decide
            return self._lower(name)
        if all(a.shape == arrays[0].shape and np.array_equal(a, arrays[0]) for a in arrays):
            return self.lift(arrays[0], name)
        shape = tuple(self.structure.dim([a.shape[i] for a in arrays]) for i in range(arrays[0].ndim)) \
            if len({a.ndim for a in arrays}) == 1 else ()
        if [d for d in shape if d != 1] == [TOKENS] and all(
                np.array_equal(a.reshape(-1), s.positions) for a, s in zip(arrays, self.structure.samples)):
            made = Traced(self.positions, shape, natural_axes(shape))
            return self.cast(made, DType.F32) if arrays[0].dtype.kind == "f" else made
        return self._lower(name)

    def _lower(self, name: str) -> Traced:
        op = self.structure.producers.get(name)
        if op is None:
            raise UnsupportedError(f"input {name!r} has no known meaning")
        try:
            results = self.lower(op)
        except UnsupportedError as error:  # the innermost operator is the one at fault
            raise error if "(node" in str(error) else UnsupportedError(
                f"{name!r} varies with the number of tokens or their positions, and {op} is not imported: {error}") from None
        self.env.update(zip(op.outputs, results))
        return self.need(name)

    def _param(self, tensor: Tensor) -> Traced:
        shape = tensor.shape
        if 0 in shape:
            raise UnsupportedError(f"tensor {tensor.name!r} is empty")
        value = self.builder.param(tensor.name, TensorType(DType.F32, shape))
        self.sources[tensor.name] = tensor.read
        return Traced(value, shape, tuple(range(len(shape))))

    def lift(self, array: np.ndarray, name: str) -> Traced:
        """A known array as a buffer of the graph, or as a number."""
        dtype = {"f": DType.F32, "V": DType.F32, "i": DType.I32, "u": DType.I32, "b": DType.BOOL}[array.dtype.kind]
        if dtype is DType.I32 and array.size and np.abs(array.astype(np.int64)).max() >= 2**31:
            raise UnsupportedError(f"{name!r} holds integers that do not fit 32 bits")
        shape = tuple(int(d) for d in array.shape)
        axes = natural_axes(shape)
        if array.size == 1:
            return Traced(self.scalar(float(array.item()), dtype), shape, ())
        if 0 in shape:
            raise UnsupportedError(f"{name!r} is empty")
        data = np.ascontiguousarray(array.reshape([d for d in shape if d != 1])).astype(dtype.numpy)
        made = TensorType(dtype, tuple(data.shape))
        key = (data.tobytes(), str(made))
        if key not in self._lifted:
            source = f"buffer:{name}"
            while source in self.buffers or source in self.graph.tensors:
                source += "'"
            self.buffers[source] = data
            self._lifted[key] = self.builder.param(source, made)
        return Traced(self._lifted[key], shape, axes)

    def scalar(self, value: float, dtype: DType = DType.F32) -> Value:
        return self.builder.scalar(value, dtype)

    def cast(self, x: Traced, dtype: DType) -> Traced:
        return x if x.type.dtype is dtype else Traced(self.emit("cast", x.value, dtype=dtype), x.shape, x.axes)

    # What lowerings share.

    def elementwise(self, op: str, *parts: Traced, **attrs: Any) -> Traced:
        """A pointwise op on parts that broadcast together."""
        shape = broadcast(*(p.shape for p in parts))
        values, axes = self.layouts.broadcast(self.alike(parts), shape)
        return Traced(self.emit(op, *values, **attrs), shape, axes)

    def alike(self, parts: Sequence[Traced]) -> list[Traced]:
        """Parts with one element type: that of the floats among them, if any."""
        floats = [p for p in parts if p.type.dtype.is_float]
        dtype = (floats or list(parts))[0].type.dtype
        return [self.cast(p, dtype) for p in parts]

    def constant_like(self, value: float) -> Traced:
        return Traced(self.builder.scalar(value), (), ())

    def rule(self, masks: tuple[Mask, ...]) -> Rule:
        """What masks mean together, proved once for each combination."""
        if masks not in self._rules:
            self._rules[masks] = prove(self.structure, masks, self.max_len)
        return self._rules[masks]

    def attention(self, q: Value, k: Value, v: Value, scale: float, masks: tuple[Mask, ...], softcap: float = 0.0,
                  sinks: Value | None = None) -> Value:
        """The op on q [tokens, H, dk], k [tokens, Hkv, dk], v [tokens, Hkv, dv]."""
        if not (softcap >= 0 and np.isfinite([softcap, scale]).all()):
            raise UnsupportedError(f"attention with softcap={softcap}, scale={scale}")
        rule = self.rule(masks)
        slopes: Value | None = None
        if rule.slopes:
            heads = q.type.shape[1]  # type: ignore[union-attr]
            if len(rule.slopes) != heads:
                raise UnsupportedError(f"a bias for {len(rule.slopes)} heads on attention with {heads}")
            slopes = self.layouts.arrange(self.lift(np.asarray(rule.slopes, np.float32), "alibi"), (0,))
        made = self.emit("attention", q, k, v, sinks, slopes, scale=scale, slot=self.slots, window=rule.window,
                         chunk=rule.chunk, softcap=softcap)
        self.slots += 1
        return made

    def lower(self, op: Op) -> tuple[Any, ...]:
        """Import one operator; its results in order."""
        if op.key not in LOWERINGS:
            raise UnsupportedError("unknown operator")
        outer, self.layouts.loc = self.layouts.loc, op.loc
        try:
            made = LOWERINGS[op.key](self, op)
        except MALFORMED as error:
            raise UnsupportedError(f"{op} is malformed: {error!r}") from error
        finally:
            self.layouts.loc = outer
        return made if isinstance(made, tuple) else (made,)


Lowering = Callable[[Importer, Op], Any]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register `f(importer, op)` for operators: `Add`, `com.microsoft.RotaryEmbedding`."""

    def register(f: Lowering) -> Lowering:
        LOWERINGS.update({name: f for name in names})
        return f

    return register


def broadcast(*shapes: Shape) -> Shape:
    """NumPy's broadcasting of shapes with named dims."""
    rank = max(map(len, shapes))
    made: list[Any] = []
    for dims in zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes)):
        wide = {d for d in dims if d != 1}
        if len(wide) > 1:
            raise UnsupportedError(f"shapes {' and '.join(show(s) for s in shapes)} do not broadcast together")
        made.append(wide.pop() if wide else 1)
    return tuple(made)


def show(shape: Sequence[Any]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
