"""What a kernel's values are at an index: text of the expressions that compute them.

Nothing is stored between the ops of a kernel. A value is a function of an index; asking for a result at the index
of its tile asks for its operands at theirs, down to loads. Equal expressions are written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod

from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import STATES, DType, TensorType, bound
from inferloom.targets.base import Layout
from inferloom.targets.triton.source import Index, Writer, next_power_of_2

TYPES = {DType.F32: "fp32", DType.F16: "fp16", DType.BF16: "bf16", DType.I32: "i32"}
TL_TYPES = {DType.F32: "tl.float32", DType.F16: "tl.float16", DType.BF16: "tl.bfloat16", DType.I32: "tl.int32"}
#: Largest row that a reduction holds in registers.
MAX_ROW = 65_536
#: The most elements that a reduction takes one after the other, where tiles are of several reductions.
UNROLLED = 64
REDUCTIONS = ("rms_norm", "layer_norm", "sum", "mean", "max", "topk")

#: Functions that generated files begin with, beyond what Triton has.
PRELUDE = '''
@triton.jit
def compose(a, x, b, y):
    # (b, y) after (a, x), each the map h -> factor * h + summand.
    return a * b, b * x + y


@triton.jit
def pool(a, b, c, d, x, y, z, w):
    # Sums (x, y, exp(z) times), over tokens that make older ones weigh exp(w) times, after (a, b, c, d).
    high = tl.maximum(c + w, z)
    old = tl.exp(c + w - high)
    new = tl.exp(z - high)
    return old * a + new * x, old * b + new * y, high, d + w


@triton.jit
def tanh(x):
    # Through exp of a negative number, which cannot overflow.
    t = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def turned(x):
    # Quarter turns in x, and the angle that is left, in float64: angles of late positions are large.
    wide = x.to(tl.float64)
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)
    return quarters.to(tl.int32), (wide - quarters * 1.5707963267948966).to(tl.float32)


@triton.jit
def sin_or_cos(quarters, r):
    # Minimax polynomials on [-pi/4, pi/4] (Cephes sinf and cosf).
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    y = tl.where(quarters % 2 == 0, s, c)
    return tl.where((quarters % 4) // 2 == 0, y, -y)


@triton.jit
def sin(x):
    quarters, r = turned(x)
    return sin_or_cos(quarters & 3, r)


@triton.jit
def cos(x):
    quarters, r = turned(x)
    return sin_or_cos((quarters + 1) & 3, r)
'''
_UNARY = {
    "neg": "-{0}", "abs": "tl.abs({0})", "exp": "tl.exp({0})", "log": "tl.log({0})", "floor": "tl.floor({0})",
    "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "tanh": "tanh({0})", "sin": "sin({0})", "cos": "cos({0})",
    "erf": "tl.erf({0})", "relu": "tl.maximum({0}, 0.0)", "sigmoid": "sigmoid({0})", "silu": "{0} * sigmoid({0})",
}
_BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "lt": "{0} < {1}",
    "le": "{0} <= {1}", "eq": "{0} == {1}", "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})",
}
_GELU = {
    "none": "{0} * 0.5 * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "tanh": "{0} * 0.5 * (1.0 + tanh(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})))",
}


def dims_of(value: Value) -> tuple[int, ...]:
    """A value's shape without its leading symbolic dim."""
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    return tuple(int(str(d)) for d in (shape[1:] if has_rows(value) else shape))


def has_rows(value: Value) -> bool:
    """Whether the leading dim is symbolic."""
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    return bool(shape) and not isinstance(shape[0], int)


class Values:
    """The values of one kernel body, to be asked for at an index.

    `override` answers for some values (a matmul's accumulators) instead of the rules here. An index of a value with
    rows begins with the row.
    """

    def __init__(self, body: Graph, layouts: Sequence[Layout], writer: Writer,
                 override: Mapping[Value, Callable[[Sequence[Index]], str]] | None = None) -> None:
        self.body, self.layouts, self.w = body, layouts, writer
        self.override = override or {}
        self.inputs = {v: i for i, v in enumerate(body.inputs)}
        self.made_by = body.producers()

    def at(self, value: Value | None, index: Sequence[Index]) -> str:
        """The name of `value` at `index`; floats are float32."""
        if value is None:
            raise TypeError("operand is required")
        if value in self.override:
            return self.override[value](index)
        if value in self.inputs:
            return self.load(value, index)
        node = self.made_by[value]
        if node.op == "topk":
            return self._topk(node, list(index), value)
        handler = getattr(self, f"_{node.op}", None)
        if handler is not None:
            made: str = handler(node, list(index))
            return made
        if ops.get(node.op).pointwise:
            return self._pointwise(node, index)
        raise UnsupportedError(f"{node.loc}: the GPU target cannot lower {node.op} here yet")

    # -- memory

    def offset(self, value: Value, index: Sequence[Index], ld: int) -> Index:
        """Where an element lies in memory, in elements."""
        shape = dims_of(value)
        if not has_rows(value):
            return self.w.flatten(index, shape)
        return index[0] * (ld or prod(shape)) + self.w.flatten(index[1:], shape)

    def load(self, value: Value, index: Sequence[Index]) -> str:
        """An operand's element(s) from memory, floats as float32."""
        number = self.inputs[value]
        offset, mask = self.w.address(self.offset(value, index, self.layouts[number].ld)), self.w.mask(index)
        masked = f", mask={mask}, other=0" if mask else ""
        text = f"tl.load(p{number} + {offset}{masked})"
        dtype = value.type.dtype
        return self.w.name(text + (".to(tl.float32)" if dtype in (DType.F16, DType.BF16) else ""))

    def store(self, value: Value, number: int, index: Sequence[Index], result: str) -> None:
        """Write `result` to where results number `number` has `value` at `index`."""
        offset, mask = self.w.address(self.offset(value, index, self.layouts[number].ld)), self.w.mask(index)
        narrow = f".to({TL_TYPES[value.type.dtype]})" if value.type.dtype in (DType.F16, DType.BF16) else ""
        self.w.line(f"tl.store(p{number} + {offset}, {result}{narrow}{f', mask={mask}' if mask else ''})")

    # -- pointwise

    def _pointwise(self, node: Node, index: Sequence[Index]) -> str:
        operands = [self.at(v, self._broadcast(v, index)) for v in node.operands if v is not None]
        if node.op in _UNARY:
            return self.w.name(_UNARY[node.op].format(*operands))
        if node.op in _BINARY:
            return self.w.name(_BINARY[node.op].format(*operands))
        if node.op == "gelu":
            return self.w.name(_GELU[str(node.attrs["approximate"])].format(*operands))
        if node.op == "where":
            return self.w.name(f"tl.where({', '.join(operands)})")
        raise UnsupportedError(f"{node.loc}: the GPU target cannot lower {node.op} yet")

    def _broadcast(self, value: Value, index: Sequence[Index]) -> list[Index]:
        shape = value.type.shape if isinstance(value.type, TensorType) else ()
        tail = index[len(index) - len(shape):]
        return [Index() if d == 1 else i for d, i in zip(shape, tail, strict=True)]

    def _constant(self, node: Node, index: Sequence[Index]) -> str:
        value = float(str(node.attrs["value"]))
        return str(int(value)) if node.attrs["dtype"] is DType.I32 else repr_float(value)

    def _cast(self, node: Node, index: Sequence[Index]) -> str:
        (operand,) = node.operands
        x, wanted = self.at(operand, index), node.attrs["dtype"]
        have = operand.type.dtype if operand is not None else None
        if wanted is have or (wanted is DType.F32 and have in (DType.F16, DType.BF16)):
            return x
        if wanted in (DType.F16, DType.BF16):
            return self.w.name(f"{x}.to({TL_TYPES[wanted]}).to(tl.float32)")  # type: ignore[index]
        if wanted is DType.F32:
            return self.w.name(f"{x}.to(tl.float32)")
        if wanted is DType.BOOL:
            return self.w.name(f"{x} != 0")
        raise UnsupportedError(f"{node.loc}: the GPU target cannot cast {have} to {wanted}")

    # -- data movement

    def _reshape(self, node: Node, index: list[Index]) -> str:
        (operand,) = node.operands
        if operand is None:
            raise TypeError(node)
        rows = index[:1] if has_rows(operand) else []
        flat = self.w.flatten(index[len(rows):], dims_of(node.result))
        return self.at(operand, [*rows, *self.w.unflatten(flat, dims_of(operand))])

    def _slice(self, node: Node, index: list[Index]) -> str:
        axis = int(str(node.attrs["axis"]))
        moved = index[axis] * int(str(node.attrs["step"])) + Index(const=int(str(node.attrs["start"])))
        return self.at(node.operands[0], [*index[:axis], moved, *index[axis + 1:]])

    def _permute(self, node: Node, index: list[Index]) -> str:
        axes = _axes(node)
        return self.at(node.operands[0], [index[axes.index(a)] for a in range(len(axes))])

    def _expand(self, node: Node, index: list[Index]) -> str:
        (operand,) = node.operands
        return self.at(operand, self._broadcast(operand, index))  # type: ignore[arg-type]

    def _concat(self, node: Node, index: list[Index]) -> str:
        """Each part at its own columns, all but the right one masked out."""
        axis, start, made = int(str(node.attrs["axis"])), 0, ""
        here, outer = str(index[axis]), self.w.mask([index[axis]])
        for operand in node.operands:
            if operand is None or not isinstance(operand.type, TensorType):
                raise TypeError(node)
            size = int(str(operand.type.shape[axis]))
            inside = f"({here} >= {start}) & ({here} < {start + size})" + (f" & ({outer})" if outer else "")
            seen = self.w.name(inside, "m")
            column = self.w.name(f"{here} - {start}", "c")
            moved = self.w.variable(column, size, seen, self.w.is_tile(index[axis]))
            part = self.at(operand, [*index[:axis], moved, *index[axis + 1:]])
            made = self.w.name(f"tl.where({seen}, {part}, {made})") if made else part
            start += size
        return made

    # -- reductions and norms

    def _row(self, node: Node, x: Value, index: Sequence[Index], axes: int) -> tuple[list[Index], str, int]:
        """x over its last `axes` axes at the outer `index`: the index, its mask, and how many elements it has."""
        shape = dims_of(x)
        inner = shape[len(shape) - axes:]
        count = prod(inner)
        if count > MAX_ROW:
            raise UnsupportedError(f"{node.loc}: {node.op} over {count} elements; at most {MAX_ROW} fit a GPU kernel")
        tile = arange(self.w, count)
        return [*index, *self.w.unflatten(tile, inner)], self.w.mask([tile]), count

    def _unrolled(self, node: Node, x: Value, outer: Sequence[Index], axes: int) -> list[str]:
        """The elements of x over its last axes, one by one, at a tile of outer indices."""
        inner = dims_of(x)[len(dims_of(x)) - axes:]
        if prod(inner) > UNROLLED or self.override:
            raise UnsupportedError(f"{node.loc}: {node.op} over {prod(inner)} elements, within a tile of several such parts")
        return [self.at(x, [*outer, *self.w.unflatten(Index(const=i), inner)]) for i in range(prod(inner))]

    def _fold(self, node: Node, x: Value, outer: Sequence[Index], axes: int, term: str = "{0}", how: str = "sum",
              other: str = "0.0") -> tuple[str, int]:
        """`term` of x summed (or how) over its last `axes` axes, `other` in places that are masked out."""
        if prod(dims_of(x)[len(dims_of(x)) - axes:]) == 1:
            return self.w.name(term.format(self.at(x, [*outer, *[Index()] * axes])), "s"), 1
        if any(self.w.is_tile(i) for i in outer):
            parts = [term.format(part) for part in self._unrolled(node, x, outer, axes)]
            return self.w.name(_chained(parts, how), "s"), len(parts)
        index, mask, count = self._row(node, x, outer, axes)
        text = term.format(self.at(x, index))
        loaded_as_zero = x in self.inputs and other == "0.0" and "-" not in term
        if mask and not loaded_as_zero:
            text = f"tl.where({mask}, {text}, {other})"
        return self.w.name(f"tl.{how}({text}, 0)", "s"), count

    def _reduced(self, node: Node, index: Sequence[Index], how: str, other: str) -> tuple[str, int]:
        (x,) = node.operands
        axes = sorted(_axes(node))
        if x is None or not isinstance(x.type, TensorType):
            raise TypeError(node)
        if first_of_row(node):
            parts = [self.at(x, [index[0], Index(const=i), *index[1:]]) for i in range(dims_of(x)[0])]
            return self.w.name(_chained(parts, how), "s"), len(parts)
        if axes != list(range(x.type.rank - len(axes), x.type.rank)):
            raise UnsupportedError(f"{node.loc}: the GPU target reduces trailing axes only, not {axes}")
        return self._fold(node, x, index[:axes[0]], len(axes), "{0}", how, other)

    def _sum(self, node: Node, index: list[Index]) -> str:
        return self._reduced(node, index, "sum", "0.0")[0]

    def _mean(self, node: Node, index: list[Index]) -> str:
        total, count = self._reduced(node, index, "sum", "0.0")
        return self.w.name(f"{total} * {repr_float(1 / count)}")

    def _max(self, node: Node, index: list[Index]) -> str:
        return self._reduced(node, index, "max", "float('-inf')")[0]

    def _scaled(self, node: Node, index: Sequence[Index], normal: str) -> str:
        """`normal` times the node's weight, plus its bias."""
        for operand, sign in zip(node.operands[1:], "*+"):
            if operand is not None:
                normal = f"({normal}) {sign} {self.at(operand, self._broadcast(operand, index))}"
        return self.w.name(normal)

    def _rms_norm(self, node: Node, index: list[Index]) -> str:
        x = _required(node.operands[0])
        total, count = self._fold(node, x, index[:-1], 1, "{0} * {0}")
        scale = self.w.name(f"tl.rsqrt({total} * {repr_float(1 / count)} + {repr_float(float(str(node.attrs['eps'])))})")
        return self._scaled(node, index, f"{self.at(x, index)} * {scale}")

    def _layer_norm(self, node: Node, index: list[Index]) -> str:
        x = _required(node.operands[0])
        total, count = self._fold(node, x, index[:-1], 1)
        mean = self.w.name(f"{total} * {repr_float(1 / count)}")
        squares, _ = self._fold(node, x, index[:-1], 1, f"({{0}} - {mean}) * ({{0}} - {mean})")
        scale = self.w.name(f"tl.rsqrt({squares} * {repr_float(1 / count)} + {repr_float(float(str(node.attrs['eps'])))})")
        return self._scaled(node, index, f"({self.at(x, index)} - {mean}) * {scale}")

    def _topk(self, node: Node, index: list[Index], result: Value) -> str:
        """The largest, then the largest of the rest, ...: all of them as scalars, put in their places."""
        if dims_of(_required(node.operands[0]))[-1] == 1:
            return "0" if result is node.results[1] else self.at(node.operands[0], index)
        if any(self.w.is_tile(i) for i in index[:-1]):
            return self._topk_unrolled(node, index, result)
        tile, mask, _ = self._row(node, _required(node.operands[0]), index[:-1], 1)
        x, columns = self.at(node.operands[0], tile), str(tile[-1])
        left = self.w.name(f"tl.where({mask}, {x}, float('-inf'))") if mask else x
        places, made = result is node.results[1], ""
        for i in range(int(str(node.attrs["k"]))):
            top = self.w.name(f"tl.max({left}, 0)", "s")
            first = self.w.name(f"tl.min(tl.where({left} == {top}, {columns}, {2**30}), 0)", "s")
            chosen = first if places else top
            made = self.w.name(f"tl.where({index[-1]} == {i}, {chosen}, {made})") if made else chosen
            left = self.w.name(f"tl.where({columns} == {first}, float('-inf'), {left})")
        return made

    def _topk_unrolled(self, node: Node, index: list[Index], result: Value) -> str:
        """The same for a tile of rows, each of which lies in several values."""
        left = self._unrolled(node, _required(node.operands[0]), index[:-1], 1)
        places, made = result is node.results[1], ""
        for i in range(int(str(node.attrs["k"]))):
            top, first = left[0], "0"
            for column, x in enumerate(left[1:], 1):
                first = self.w.name(f"tl.where({x} > {top}, {column}, {first})", "s")
                top = self.w.name(f"tl.maximum({top}, {x})", "s")
            chosen = first if places else top
            made = self.w.name(f"tl.where({index[-1]} == {i}, {chosen}, {made})") if made else chosen
            left = [self.w.name(f"tl.where({first} == {column}, float('-inf'), {x})") for column, x in enumerate(left)]
        return made

    def _take(self, node: Node, index: list[Index]) -> str:
        x, places = (_required(v) for v in node.operands)
        index = self._broadcast(places, index)
        name = self.at(places, index)
        moved = self.w.variable(name, dims_of(x)[-1], self.w.mask(index), any(self.w.is_tile(i) for i in index))
        return self.at(x, [*index[:-1], moved])

    # -- rotary embedding and reading by index

    def _rotary(self, node: Node, index: list[Index]) -> str:
        x, cos, sin = (_required(v) for v in node.operands)
        row, head, d = index
        half, dim = dims_of(cos)[-1], dims_of(x)[-1]
        w, at = self.w, str(d)
        mask, tile = w.mask([d]), w.is_tile(d)

        def column(text: str, extent: int) -> Index:
            return w.variable(w.name(text, "c"), extent, mask, tile)

        if bool(node.attrs["interleaved"]):
            first, pair = f"({at}) % 2 == 0", column(f"({at}) // 2", max(half, -(-dim // 2)))
            partner = column(f"tl.where({first}, {at} + 1, {at} - 1)", dim)
        else:
            first, pair = f"({at}) < {half}", column(f"tl.where(({at}) < {half}, {at}, {at} - {half})", max(half, dim - half))
            partner = column(f"tl.where({first}, {at} + {half}, {at} - {half})", dim)
        passed = 2 * half < dim
        if passed:  # the tables are read for the turned part only, and there is no partner beyond it
            inside = w.name(f"(({at}) < {2 * half})" + (f" & ({mask})" if mask else ""), "m")
            for name in (str(pair), str(partner)):
                w.variable(name, w.variables[name].extent, inside, tile)
        a, b = self.at(x, index), self.at(x, [row, head, partner])
        c, s = self.at(cos, [row, pair]), self.at(sin, [row, pair])
        turned = w.name(f"{a} * {c} + tl.where({first}, -{b}, {b}) * {s}")
        return w.name(f"tl.where(({at}) < {2 * half}, {turned}, {a})") if passed else turned

    def _picked(self, rows: Value, row: Index, extent: int) -> Index:
        """The row that `rows` names at `row`."""
        name = self.at(rows, [row])
        return self.w.variable(name, extent, self.w.mask([row]), self.w.is_tile(row))

    def _embedding(self, node: Node, index: list[Index]) -> str:
        ids, table = (_required(v) for v in node.operands)
        return self.at(table, [self._picked(ids, index[0], dims_of(table)[0]), *index[1:]])

    def _packed_embedding(self, node: Node, index: list[Index]) -> str:
        ids, packed = (_required(v) for v in node.operands)
        _, _, tile, pair = dims_of(packed)
        (t, c), (k, p) = (self.w.split(i, by) for i, by in (
            (self._picked(ids, index[0], int(str(node.attrs["n"]))), tile), (index[1], pair)))
        return self.at(packed, [t, k, c, p])

    def _gather_rows(self, node: Node, index: list[Index]) -> str:
        x, rows = (_required(v) for v in node.operands)
        bound = x.type.shape[0] if isinstance(x.type, TensorType) else 0
        return self.at(x, [self._picked(rows, index[0], getattr(bound, "bound", 2**20)), *index[1:]])


def first_of_row(node: Node) -> bool:
    """Whether a reduction is over the first axis of the row, with others behind it."""
    x = node.operands[0]
    shape = x.type.shape if x is not None and isinstance(x.type, TensorType) else ()
    return node.attrs.get("axes") == (1,) and len(shape) > 2 and not isinstance(shape[0], int) and not node.attrs["keepdims"]


def _chained(parts: Sequence[str], how: str) -> str:
    """Their sum, or their maximum, from the first to the last."""
    return functools.reduce((lambda a, b: f"{a} + {b}") if how == "sum" else (lambda a, b: f"tl.maximum({a}, {b})"), parts)


def arange(w: Writer, count: int) -> Index:
    """All of `count` columns as a tile."""
    size = next_power_of_2(count)
    name = w.name(f"tl.arange(0, {size})", "i")
    return w.variable(name, count, f"{name} < {count}" if size != count else "", True)


def repr_float(x: float) -> str:
    """A Python literal of a float."""
    return f"float('{x}')" if x != x or x in (float("inf"), float("-inf")) else repr(x)


def cone(body: Graph, value: Value) -> list[Node]:
    """The nodes that `value` is computed from, itself first."""
    made_by, seen, todo = body.producers(), dict[Node, None](), [value]
    while todo:
        node = made_by.get(todo.pop())
        if node is not None and node not in seen:
            seen[node] = None
            todo += [v for v in node.operands if v is not None]
    return list(seen)


def parameter_type(value: Value) -> str:
    """Triton's type of a pointer to a value."""
    dtype = value.type.dtype if isinstance(value.type, (TensorType, *STATES)) else None
    if dtype not in TYPES:
        raise UnsupportedError(f"a GPU kernel cannot read {value!r}")
    return "*" + TYPES[dtype]


def wide_parameters(values: Sequence[Value], layouts: Sequence[Layout]) -> frozenset[str]:
    """Parameters whose bytes may be too many for 32-bit offsets."""
    found = set()
    for i, (value, layout) in enumerate(zip(values, layouts)):
        if isinstance(value.type, STATES):
            found.add(f"p{i}")
        elif isinstance(value.type, TensorType):
            rows = bound(value.type.shape[0]) if has_rows(value) else 1
            size = max(rows * layout.ld, value.type.max_size) * value.type.dtype.itemsize
            if size >= 2**31:
                found.add(f"p{i}")
    return frozenset(found)


def row_dim(values: Sequence[Value]) -> int:
    """Which run-time count the rows of these values are: tokens (0) or logit rows (2)."""
    for value in values:
        if has_rows(value) and isinstance(value.type, TensorType):
            return {"tokens": 0, "rows": 2}[str(value.type.shape[0])]
    raise UnsupportedError("a kernel needs a value with rows")


def _axes(node: Node) -> list[int]:
    axes = node.attrs["axes"]
    if not isinstance(axes, tuple):
        raise TypeError(axes)
    return [int(str(a)) for a in axes]


def _required(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
