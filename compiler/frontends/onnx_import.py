"""Imports an ONNX graph into a model-level graph, token-major (see `layout`).

The graph runs one sequence [1, tokens]; what depends on the tokens becomes nodes, what does not (shapes, masks, rotary
tables) is evaluated or, where a node reads it, imported on demand (see `onnx_fold`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inferloom.compiler.frontends.aten import tidy
from inferloom.compiler.frontends.layout import Layouts, Traced, natural_axes
from inferloom.compiler.frontends.onnx_file import OnnxGraph, Op, Tensor, live_ops
from inferloom.compiler.frontends.onnx_fold import Sample, Structure
from inferloom.compiler.frontends.onnx_masks import Mask, Rule, prove
from inferloom.ir.errors import UnsupportedError, VerifyError
from inferloom.ir.graph import Builder, Graph, Value
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
        for output, made in zip(op.outputs, self.lower(op)):
            self.env[output] = made
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
            self.buffers[source] = data
            self._lifted[key] = self.builder.param(source, made)
        return Traced(self._lifted[key], shape, axes)

    def scalar(self, value: float, dtype: DType = DType.F32) -> Value:
        return self.builder.scalar(value) if dtype is DType.F32 else self.builder.emit("constant", value=value, dtype=dtype)

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
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
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


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """A graph, where its parameters come from, and what limits it."""

    graph: Graph
    sources: dict[str, Callable[[], np.ndarray] | np.ndarray]
    vocab_size: int
    #: Most tokens of a sequence, by the tables that positions index.
    most_positions: int | None


def import_graph(graph: OnnxGraph, structure: Structure, output: str, name: str, max_len: int) -> Imported:
    """Import all that `output` (logits [1, tokens, vocab]) depends on. UnsupportedError lists all that cannot be."""
    from inferloom.compiler.frontends import onnx_layers, onnx_ops  # noqa: F401  (fill LOWERINGS)

    builder = Builder(name)
    im = Importer(graph, structure, builder, OnnxLayouts(builder), max_len)
    for label, sym in (("tokens", TOKENS), ("positions", TOKENS), ("logit_rows", ROWS)):
        builder.input(label, TensorType(DType.I32, (sym,)))
    shape = structure.shapes[structure.roles.tokens]
    im.env[structure.roles.tokens] = Traced(builder.inputs[0], shape, natural_axes(shape))
    im.env |= {cache: Cache(cache) for cache in structure.roles.caches}
    problems: dict[str, None] = {}
    for op in live_ops(graph, output):
        if any(hasattr(a, "node") for a in op.attrs.values()):
            raise UnsupportedError(f"{op} has branches or loops, which are not supported; export the decoder without them (of a "
                                   "merged decoder, take the one with past_key_values)")
        if op.key in ("Shape", "Size") or not structure.content.intersection(op.inputs):
            continue
        if any(im.env.get(i) is POISON for i in op.inputs):
            made: tuple[Any, ...] = (POISON,) * len(op.outputs)
        else:
            try:
                made = im.lower(op)
            except (UnsupportedError, VerifyError) as error:
                problems[f"{op}: {error}"] = None
                made = (POISON,) * len(op.outputs)
        for result, value in zip(op.outputs, made):
            im.env[result] = value
            if hasattr(value, "shape"):
                structure.shapes[result] = value.shape
    if problems:
        listed = list(problems)
        more = f"\n  ... and {len(listed) - 20} more" if len(listed) > 20 else ""
        raise UnsupportedError(f"{name} cannot be imported (docs/onnx.md says what can):\n  " + "\n  ".join(listed[:20]) + more)
    return _finish(im, output)


def _finish(im: Importer, output: str) -> Imported:
    logits = im.need(output)
    if len([d for d in logits.shape if d != 1]) != 2 or logits.shape[-1] == TOKENS or TOKENS not in logits.shape:
        raise UnsupportedError(f"output {output!r} must be logits [batch, tokens, vocabulary] of all tokens; it is "
                               f"{show(logits.shape)}")
    value = im.layouts.arrange(logits, (logits.shape.index(TOKENS), len(logits.shape) - 1))
    vocab = int(str(logits.shape[-1]))
    for table, rows in im.token_rows.items():
        if rows < vocab:
            raise UnsupportedError(f"the embedding table {table!r} has {rows} rows, fewer than the {vocab} logits")
    graph = tidy(_only_rows(im.builder, value))
    sources: dict[str, Any] = {p.source: im.sources.get(p.source, im.buffers.get(p.source)) for p in graph.params}
    return Imported(graph, sources, vocab, min(im.position_rows.values(), default=None))


_BY_ROW = frozenset({"linear", "add", "sub", "mul", "div", "tanh", "cast", "rms_norm", "layer_norm", "reshape"})


def _only_rows(builder: Builder, logits: Value) -> Graph:
    """The graph with the rows of its logits picked as early as possible, before the output projection."""
    made_by = {v: n for n in builder.nodes for v in n.results}
    chain, at = [], logits
    while at in made_by and made_by[at].op in _BY_ROW:
        varying = [v for v in made_by[at].operands if v is not None and TOKENS in getattr(v.type, "shape", ())]
        if len(varying) != 1 or getattr(varying[0].type, "shape", ())[0] is not TOKENS:
            break
        chain.append((made_by[at], varying[0]))
        at = varying[0]
    picked = builder.emit("gather_rows", at, builder.inputs[2])
    for node, source in reversed(chain):
        attrs = {k: tuple(ROWS if d is TOKENS else d for d in v) if k == "shape" else v  # type: ignore[union-attr]
                 for k, v in node.attrs.items()}
        operands = [picked if v is source else v for v in node.operands]
        picked = builder.emit(node.op, *operands, loc=node.loc, **attrs)
    return builder.finish([picked])


def samples(has_caches: bool, max_len: int) -> tuple[Sample, ...]:
    """Lengths at which shapes and tables are compared: short ones, and one as long as can be evaluated."""
    if has_caches:
        return Sample(0, 7), Sample(5, 3), Sample(13, 2), Sample(0, 11), Sample(max(max_len - 3, 17), 3)
    return Sample(0, 7), Sample(0, 11), Sample(0, min(max(max_len, 17), 4099))
