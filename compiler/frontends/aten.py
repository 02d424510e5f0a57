"""Imports a `torch.export` program into a model-level graph, token-major (see `layout`).

The program takes token ids and positions [1, tokens] and the wanted rows i64[rows] and returns logits
[1, rows, vocab]. What depends on no input and no parameter is computed here and becomes a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch

from inferloom.compiler.frontends.layout import Layouts, Merged, Traced, natural_axes
from inferloom.compiler.frontends.source import location
from inferloom.ir.errors import UnsupportedError, VerifyError
from inferloom.ir.graph import Builder, Graph, Node, Value
from inferloom.ir.types import DType, Shape, Sym, TensorType

DTYPES = {torch.float32: DType.F32, torch.int64: DType.I32, torch.int32: DType.I32, torch.bool: DType.BOOL,
          torch.float16: DType.F32, torch.bfloat16: DType.F32, torch.float64: DType.F32}


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A tensor known at compile time, not yet in the graph; `name` is the buffer's or the node's."""

    tensor: torch.Tensor
    name: str


class Special:
    """A tensor that is no value of its own, for the few operators that know it (aten_parts.py)."""


class _Poison:
    """The result of an operator that could not be imported; what reads it is skipped."""


POISON = _Poison()


@dataclass(slots=True)
class Importer:
    """The state of one import; lowerings get it with the node they lower."""

    builder: Builder
    layouts: Layouts
    symbols: dict[sympy.Symbol, Sym]
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    env: dict[torch.fx.Node, Any] = field(default_factory=dict)
    node: torch.fx.Node | None = None
    slots: int = 0
    paths: dict[Node, str] = field(default_factory=dict)
    _lifted: dict[tuple[bytes, str], Value] = field(default_factory=dict)

    @property
    def loc(self) -> str:
        return self.layouts.loc

    def emit(self, op: str, *operands: Value | None, **attrs: Any) -> Value:
        return self.builder.emit(op, *operands, loc=self.loc, **attrs)

    def shape(self, tensor: Any) -> Shape:
        """The traced shape of a fake tensor, symbols named; tokens x n in one axis are two here."""
        return tuple(part for d in tensor.shape for part in self._dims(d))

    def _dims(self, dim: Any) -> tuple[Any, ...]:
        if not isinstance(dim, int) and len(expr := dim.node.expr.as_ordered_factors()) == 2:
            count, symbol = expr
            if count.is_Integer and symbol in self.symbols:
                return self.symbols[symbol], Merged(count)
        return (self._dim(dim),)

    def _dim(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return dim
        expr = dim.node.expr
        if isinstance(expr, sympy.Symbol) and expr in self.symbols:
            return self.symbols[expr]
        if expr.is_Integer:
            return int(expr)
        raise UnsupportedError(f"a dim of {expr}; only tokens and rows may be symbolic")

    def result(self, index: int | None = None) -> Any:
        """The fake tensor that the trace recorded for the current node."""
        if self.node is None:
            raise UnsupportedError("no node is being imported")
        val = self.node.meta["val"]
        return val if index is None else val[index]

    @property
    def result_shape(self) -> Shape:
        return self.shape(self.result())

    def traced(self, x: Any) -> Traced:
        """`x` as a graph value: traced already, or known and lifted into a buffer now."""
        if isinstance(x, Traced):
            return x
        if isinstance(x, Known):
            return self._lift(x)
        raise UnsupportedError(f"expected a tensor, got {x!r}")

    def _lift(self, x: Known) -> Traced:
        tensor = x.tensor.detach()
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(f"constant {x.name} of dtype {tensor.dtype}")
        dtype = DTYPES[tensor.dtype]
        shape = tuple(int(d) for d in tensor.shape)
        axes = natural_axes(shape)
        if not axes:
            return Traced(self.number(tensor.item(), dtype), shape, ())
        data = np.ascontiguousarray(tensor.reshape([d for d in shape if d != 1]).numpy()).astype(dtype.numpy)
        made = TensorType(dtype, tuple(data.shape))
        key = (data.tobytes(), str(made))
        if key not in self._lifted:  # equal buffers of several layers become one
            source = f"buffer:{x.name}"
            while source in self.buffers:
                source += "'"
            self.buffers[source] = data
            self._lifted[key] = self.builder.param(source, made)
        return Traced(self._lifted[key], shape, axes)

    def number(self, value: float, dtype: DType = DType.F32) -> Value:
        """A scalar constant of any element type."""
        return self.builder.scalar(value, dtype)

    def operands(self, *args: Any) -> tuple[list[Value], tuple[int, ...]]:
        """Operands of an elementwise op (tensors or numbers) made to broadcast, and the result's axes."""
        shape = self.result_shape
        if 0 in shape:
            raise UnsupportedError("arithmetic on an empty tensor")
        tensors = {i: self.traced(a) for i, a in enumerate(args) if isinstance(a, (Traced, Known))}
        floats = [t for t in tensors.values() if t.type.dtype.is_float]
        dtype = floats[0].type.dtype if floats or not tensors else next(iter(tensors.values())).type.dtype
        if not floats and any(isinstance(a, float) for a in args):
            dtype = DType.F32
        tensors = {i: self.cast(t, dtype) for i, t in tensors.items()}
        values, axes = self.layouts.broadcast(list(tensors.values()), shape)
        made = dict(zip(tensors, values))
        return [made[i] if i in made else self.number(a, dtype) for i, a in enumerate(args)], axes

    def cast(self, x: Traced, dtype: DType) -> Traced:
        if x.type.dtype is dtype:
            return x
        return Traced(self.emit("cast", x.value, dtype=dtype), x.shape, x.axes)

    def elementwise(self, op: str, *args: Any, **attrs: Any) -> Traced:
        """Emit a pointwise op on broadcast operands; the result has the traced shape of the current node."""
        values, axes = self.operands(*args)
        return Traced(self.emit(op, *values, **attrs), self.result_shape, axes)


Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register `f(importer, *args, **kwargs)` for ATen operators, named as `aten.mul.Tensor`."""

    def register(f: Lowering) -> Lowering:
        LOWERINGS.update({name: f for name in names})
        return f

    return register


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """A graph, the values of its buffers by source, and the module path that each node came from."""

    graph: Graph
    buffers: dict[str, np.ndarray]
    paths: dict[Node, str]


def import_program(program: Any, *, name: str, tokens: Sym, rows: Sym, sources: Mapping[str, str],
                   prefix: str = "") -> Imported:
    """Import an exported program whose inputs are (ids [1, tokens] or [tokens], positions alike, rows [rows]).

    `sources` maps each parameter's name to its source (tied parameters share one); `prefix` is what the tracing
    wrapper put before module paths. UnsupportedError lists every operator that could not be imported.
    """
    from inferloom.compiler.frontends import aten_experts, aten_moves, aten_ops, aten_parts  # noqa: F401  (fill LOWERINGS)

    builder = Builder(name)
    im = Importer(builder, Layouts(builder), {})
    signature = program.graph_signature
    kinds = {s.arg.name: s for s in signature.input_specs}
    if any(s.kind.name != "USER_OUTPUT" for s in signature.output_specs):
        raise UnsupportedError(f"{name}: the traced program changes its buffers or inputs in place")
    inputs = iter([("tokens", tokens), ("positions", tokens), ("logit_rows", rows)])
    params: dict[str, Traced] = {}
    problems: list[str] = []
    live = _live(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in live:
            continue
        im.node = node
        im.layouts.loc = location(node.meta.get("stack_trace") or "")
        before = len(builder.nodes)
        if node.op == "placeholder":
            im.env[node] = _placeholder(im, node, kinds[node.name], program, inputs, params, sources, prefix)
        elif node.op == "call_function":
            im.env[node] = _call(im, node, problems, prefix)
        elif node.op == "output":
            if problems:
                raise UnsupportedError(f"{name} uses operators that inferloom does not know:\n  "
                                       + "\n  ".join(dict.fromkeys(problems)))
            logits = im.traced(im.env[node.args[0][0]])
            logits = im.layouts.ordered(im.layouts.with_axes(logits, [len(logits.shape) - 1]))
            made = logits.value
            if logits.type.shape[0] == tokens:  # the model has no way to ask for some rows only
                made = builder.emit("gather_rows", made, builder.inputs[-1])
            graph = tidy(builder.finish([made]))
        path = module_path(node, prefix)
        im.paths.update({n: path for n in builder.nodes[before:]})
    im.buffers = {p.source: im.buffers[p.source] for p in graph.params if p.source in im.buffers}
    return Imported(graph, im.buffers, im.paths)


def _live(graph: Any) -> set[Any]:
    """Nodes that the outputs depend on: masks and tables that a hook has made useless are left out."""
    live: set[Any] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update(node.all_input_nodes)
    return live


def _placeholder(im: Importer, node: Any, spec: Any, program: Any, inputs: Any, params: dict[str, Traced],
                 sources: Mapping[str, str], prefix: str) -> Any:
    kind = spec.kind.name
    if kind == "USER_INPUT":
        name, sym = next(inputs)
        val = node.meta["val"]
        for dim in val.shape:
            if not isinstance(dim, int):
                im.symbols[dim.node.expr] = sym
        shape = im.shape(val)
        return Traced(im.builder.input(name, TensorType(DType.I32, (sym,))), shape, natural_axes(shape))
    target = spec.target.removeprefix(prefix)
    if kind == "PARAMETER":
        source = sources[target]
        val = node.meta["val"]
        shape = im.shape(val)
        if node.users and source not in params:
            value = im.builder.param(source, TensorType(DType.F32, shape))
            params[source] = Traced(value, shape, tuple(range(len(shape))))
        return params.get(source)
    if kind in ("BUFFER", "CONSTANT_TENSOR"):
        stored = program.constants if spec.target in program.constants else program.state_dict
        return Known(stored[spec.target], target)
    raise UnsupportedError(f"the traced program has an input of kind {kind}")


def _call(im: Importer, node: Any, problems: list[str], prefix: str) -> Any:
    args = torch.fx.node.map_arg(node.args, lambda n: im.env[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: im.env[n])
    flat = _flatten((args, kwargs))
    if any(a is POISON for a in flat):
        return POISON
    target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
    tensors = [a for a in flat if isinstance(a, (Traced, Known, Special))]
    try:
        if target == "getitem":
            return args[0][args[1]]
        if target == "aten._assert_tensor_metadata.default":
            return None
        if not tensors or all(isinstance(a, Known) for a in tensors):
            if not any(isinstance(a, torch.SymInt) or a is _SYMBOLIC for a in flat):
                return _evaluate(node, args, kwargs)
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return _SYMBOLIC
        if target not in LOWERINGS:
            raise UnsupportedError("unknown operator")
        return LOWERINGS[target](im, *args, **kwargs)
    except (UnsupportedError, VerifyError) as error:
        why = "" if str(error) == "unknown operator" else f": {error}"
        problems.append(f"{target} in {module_path(node, prefix) or 'the model'} ({im.loc or 'no source'}){why}")
        return POISON


_SYMBOLIC = _Poison()


def _flatten(x: Any) -> list[Any]:
    if isinstance(x, Mapping):
        return [y for v in x.values() for y in _flatten(v)]
    if isinstance(x, (tuple, list)):
        return [y for v in x for y in _flatten(v)]
    return [x]


def _evaluate(node: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on known tensors; views keep the buffer's name."""
    known = [a for a in _flatten((args, kwargs)) if isinstance(a, Known)]

    def plain(x: Any) -> Any:
        if isinstance(x, Known):
            return x.tensor
        if isinstance(x, (tuple, list)):
            return type(x)(plain(y) for y in x)
        return x

    with torch.no_grad():
        made = node.target(*plain(args), **{k: plain(v) for k, v in kwargs.items()})

    def wrap(value: Any, name: str) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        same = len(known) == 1 and value.numel() == known[0].tensor.numel() and torch.equal(
            value.reshape(-1), known[0].tensor.reshape(-1).to(value.dtype))
        return Known(value, known[0].name if same else name)

    if isinstance(made, (tuple, list)):
        return tuple(wrap(v, f"{node.name}_{i}") for i, v in enumerate(made))
    return wrap(made, node.name)


def tidy(graph: Graph) -> Graph:
    """Constants first, since they belong to no layer; params in order of use; what nothing reads is dropped."""
    live = set(graph.outputs)
    for node in reversed(graph.nodes):
        if any(v in live for v in node.results):
            live.update(v for v in node.operands if v is not None)
    nodes = [n for n in graph.nodes if any(v in live for v in n.results)]
    nodes.sort(key=lambda n: n.op != "constant")
    used = dict.fromkeys(v for n in nodes for v in n.operands)
    params = {p.value: p for p in graph.params}
    return Graph(graph.name, graph.inputs, tuple(params[v] for v in used if v in params), tuple(nodes), graph.outputs)


def module_path(node: Any, prefix: str = "") -> str:
    """The dotted path of the module that a traced node ran in, e.g. `model.layers.0.mlp`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1].removeprefix(prefix) if paths else ""
