"""Row kernels: everything that stays within one token's row.

One program computes a piece of one row of some of the results. Results that need a reduction get their piece by
that reduction's shape: a whole row for a norm over it, one head for a norm over heads; all others are cut into
pieces of `PIECE` columns. Results with equal pieces share a program, and what they load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.types import DType, StateType
from inferloom.targets.base import KernelSource
from inferloom.targets.triton.source import Index, KernelText, Writer
from inferloom.targets.triton.values import (
    REDUCTIONS,
    TL_TYPES,
    UNROLLED,
    Values,
    arange,
    cone,
    dims_of,
    first_of_row,
    parameter_type,
    row_dim,
    wide_parameters,
)

PIECE = 1024


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a result's row is cut: `outer` programs of `inner` elements each, together `total`."""

    outer: int
    inner: int
    total: int


@dataclass(slots=True)
class _Branch:
    """Programs that do the same for different pieces."""

    shape: _Shape
    stores: list[Callable[[list[Index], Index], None]] = field(default_factory=list)


def lower(source: KernelSource, number: int, max_rows: int) -> KernelText:
    """The text of a "row" kernel. `max_rows`: the most rows that a step can have."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    return _RowKernel(body, source, number, max_rows).text()


class _RowKernel:
    def __init__(self, body: Graph, source: KernelSource, number: int, max_rows: int) -> None:
        self.body, self.source, self.number = body, source, number
        self.w = Writer()
        self.values = Values(body, source.layouts, self.w)
        self.dim = row_dim([*body.outputs, *body.inputs])
        self.max_rows = max_rows
        stored = [(i, v) for i, v in enumerate(body.outputs) if not isinstance(v.type, StateType)]
        self.results = [(len(body.inputs) + i, v) for i, v in stored]
        parameters = [(f"p{i}", parameter_type(v)) for i, v in enumerate(body.inputs)]
        parameters += [(f"p{i}", parameter_type(v)) for i, v in self.results]
        self.parameters = (*parameters, ("dims", "*i32"))
        self.args = (*range(len(body.inputs)), *(i for i, _ in self.results), "dims")
        self.branches: list[_Branch] = []

    def text(self) -> KernelText:
        for number, value in self.results:
            self._plan_result(number, value)
        for node in self.body.nodes:
            if node.op == "kv_write":
                self._plan_kv_write(node)
        programs = sum(b.shape.outer for b in self.branches)
        w = self.w
        w.line("pid = tl.program_id(0)")
        w.line(f"row = pid // {programs}" if programs > 1 else "row = pid")
        row = w.variable("row", self.max_rows)
        with w.block(f"if row < tl.load(dims + {self.dim}):"):
            if programs > 1:
                w.line(f"part = pid % {programs}")
            begin = 0
            for branch in self.branches:
                self._emit(branch, row, begin, programs)
                begin += branch.shape.outer
        widest = max(b.shape.inner for b in self.branches)
        warps = 1 if widest <= 256 else 4 if widest <= 2048 else 8 if widest <= 8192 else 16
        wide = wide_parameters([*self.body.inputs, *self.body.outputs], self.source.layouts)
        wide &= {name for name, _ in self.parameters}
        return KernelText(self.source.symbol, "row", self.number, tuple(w.lines), self.parameters, self.args,
                          (self.dim, 1, programs), {"num_warps": warps, "num_stages": 1}, wide=wide)

    def _emit(self, branch: _Branch, row: Index, begin: int, programs: int) -> None:
        w, shape = self.w, branch.shape
        if programs == shape.outer:
            head = ""
        else:
            head = f"if part >= {begin} and part < {begin + shape.outer}:" if begin else f"if part < {shape.outer}:"
        if not head:
            self._body(branch, row, begin, programs)
        else:
            with w.block(head):
                self._body(branch, row, begin, programs)

    def _body(self, branch: _Branch, row: Index, begin: int, programs: int) -> None:
        w, shape = self.w, branch.shape
        outer = Index()
        if shape.outer > 1:
            name = w.name(f"part - {begin}", "o") if begin else "part"
            outer = w.variable(name, shape.outer)
        flat = outer if shape.inner == 1 else outer * shape.inner + arange(w, shape.inner)
        if shape.outer * shape.inner > shape.total:  # the last piece sticks out
            name = w.name(str(flat), "i")
            flat = w.variable(name, shape.total, f"{name} < {shape.total}", True)
        for store in branch.stores:
            store([row], flat)

    # -- what is stored

    def _plan_result(self, number: int, value: Value) -> None:
        shape = dims_of(value)

        def store(row: list[Index], flat: Index) -> None:
            index = [*row, *self.w.unflatten(flat, shape)]
            self.values.store(value, number, index, self.values.at(value, index))

        self._add(self._cut(value, prod(shape)), store)

    def _plan_kv_write(self, node: Node) -> None:
        state, k, v, slots = node.operands
        if state is None or k is None or not isinstance(state.type, StateType):
            raise TypeError(node)
        number, type = self.values.inputs[state], state.type
        stride = self.source.layouts[number].block_stride // type.dtype.itemsize
        narrow = f".to({TL_TYPES[type.dtype]})" if type.dtype is not DType.F32 else ""

        def put(value: Value, dim: int, start: int) -> Callable[[list[Index], Index], None]:
            def store(row: list[Index], flat: Index) -> None:
                w = self.w
                head, d = w.unflatten(flat, (type.heads, dim))
                slot = self.values.at(slots, row)
                block = w.name(f"({slot} // {type.block_tokens}).to(tl.int64) * {stride}", "b")
                place = w.name(f"{slot} % {type.block_tokens} * {dim}", "b")
                at = head * (type.block_tokens * dim) + d + Index(const=start)
                mask = w.mask([flat])
                x = self.values.at(value, [*row, head, d])
                w.line(f"tl.store(p{number} + {block} + ({place} + {at}), {x}{narrow}{f', mask={mask}' if mask else ''})")

            return store

        parts = [(k, type.k_dim, 0)]
        if v is not None:
            parts.append((v, type.v_dim, type.heads * type.block_tokens * type.k_dim))
        for value, dim, start in parts:
            self._add(self._cut(value, type.heads * dim), put(value, dim, start))

    def _add(self, shape: _Shape, store: Callable[[list[Index], Index], None]) -> None:
        """Into the programs that work on equal pieces; a pointwise result goes along where its whole row is at hand."""
        for branch in self.branches:
            if branch.shape == shape:
                branch.stores.append(store)
                return
        self.branches.append(_Branch(shape, [store]))

    def _reductions(self, value: Value) -> list[tuple[int, int]]:
        """(how many, of how many elements) of all reductions that a value needs."""
        return [size for node in cone(self.body, value) if (size := _reduces(node)) is not None]

    def _nested(self, value: Value) -> bool:
        """Whether a reduction of a whole row is over results of reductions of its parts."""
        return any(size[0] == 1 and node.operands[0] is not None
                   and any(count > 1 for count, _ in self._reductions(node.operands[0]))
                   for node in cone(self.body, value) if (size := _reduces(node)) is not None)

    def _cut(self, value: Value, total: int) -> _Shape:
        shapes = self._reductions(value)
        heads = {s for s in shapes if s[0] > 1}
        if (len(heads) > 1 or self._nested(value)) and all(inner <= UNROLLED for _, inner in heads):
            return _Shape(1, total, total)
        if len(heads) > 1:
            raise UnsupportedError(f"{self.source.node.loc}: reductions of different shapes in one kernel: {shapes}")
        if heads:
            ((outer, inner),) = heads
            if total % outer:
                raise UnsupportedError(f"{self.source.node.loc}: a row of {total} does not divide into {outer} reductions")
            return _Shape(outer, total // outer, total)
        sizes = {inner for _, inner in shapes}
        if len(sizes) == 1 and total % min(sizes) == 0:  # such as one norm for each head, put together again
            return _Shape(total // min(sizes), min(sizes), total)
        if shapes or any(total == b.shape.total and b.shape.outer == 1 for b in self.branches):
            return _Shape(1, total, total)
        inner = min(PIECE, total)
        return _Shape(-(-total // inner), inner, total)


def _reduces(node: Node) -> tuple[int, int] | None:
    """(how many, of how many elements) of a node that reduces trailing axes."""
    if node.op not in REDUCTIONS or node.operands[0] is None or first_of_row(node):
        return None
    shape, axes = dims_of(node.operands[0]), node.attrs.get("axes")
    if isinstance(axes, tuple) and max(int(str(a)) for a in axes) < len(shape):  # refused where it is lowered
        return None
    inner = prod(shape[len(shape) - (len(axes) if isinstance(axes, tuple) else 1):])
    return prod(shape) // inner, inner
