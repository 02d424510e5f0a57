"""Means of blocks of keys, and how well queries meet them: a program is one key head of a sequence, or of a token."""

from __future__ import annotations

from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.ops.sparse import NEVER, OWN
from inferloom.ir.types import RecurrentType, StateType, TensorType, bound
from inferloom.targets.base import KernelSource
from inferloom.targets.triton.source import KernelText, Writer, next_power_of_2
from inferloom.targets.triton.values import parameter_type, wide_parameters

TOKENS, SEQS = 0, 1
#: Blocks whose means a program reads together.
TOGETHER = 32


def lower(source: KernelSource, number: int) -> KernelText:
    """The text of a "blocks" kernel."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    (node,) = body.nodes
    operands = [_value(v) for v in node.operands]
    at = {v: f"p{body.inputs.index(v)}" for v in operands}
    stores = [v for v in body.outputs if isinstance(v.type, TensorType)]
    w = Writer()
    w.line("pid = tl.program_id(0)")
    emit = _means if node.op == "block_means" else _scores
    dim, heads = emit(w, source, node, [at[v] for v in operands], operands, f"p{len(body.inputs)}")
    values = [*body.inputs, *stores]
    parameters = [*((f"p{i}", parameter_type(v)) for i, v in enumerate(values)), ("dims", "*i32")]
    return KernelText(source.symbol, "blocks", number, tuple(w.lines), tuple(parameters), (*range(len(values)), "dims"),
                      (dim, 1, heads), {"num_warps": 4, "num_stages": 1}, wide=wide_parameters(values, source.layouts))


def _means(w: Writer, source: KernelSource, node: Node, names: list[str], operands: list[Value], out: str) -> tuple[int, int]:
    (means, keys, starts, lens, tables, own), (held, state) = names, (v.type for v in operands[:2])
    if not isinstance(held, RecurrentType) or not isinstance(state, StateType):
        raise TypeError(node)
    size, heads, dk, columns = state.block_tokens, state.heads, state.k_dim, _columns(operands)
    apart, stride = _strides(source, node, 0)[0], _strides(source, node, 1)[1] // state.dtype.itemsize
    rows, deep = next_power_of_2(size), next_power_of_2(dk)
    w.line(f"seq = pid // {heads}")
    w.line(f"head = pid % {heads}")
    with w.block(f"if seq < tl.load(dims + {SEQS}):"):
        w.line(f"t = tl.arange(0, {rows})")
        w.line(f"i = tl.arange(0, {deep})")
        w.line(f"length = tl.load({lens} + seq)")
        w.line(f"done = length - tl.load({starts} + seq + 1) + tl.load({starts} + seq)")
        with w.block(f"for b in range(done // {size}, length // {size}):"):
            w.line(f"page = tl.load({tables} + seq * {columns} + b).to(tl.int64) * {stride} + head * {size * dk}")
            mask = f", mask=(t < {size})[:, None] & (i < {dk})[None, :], other=0" if (rows, deep) != (size, dk) else ""
            w.line(f"k = tl.load({keys} + page + t[:, None] * {dk} + i[None, :]{mask}).to(tl.float32)")
            w.line(f"target = tl.load({own} + seq * {columns} + b).to(tl.int64) * {apart} + head * {dk}")
            w.line(f"tl.store({means} + target + i, tl.sum(k, 0) * {1 / size!r}{f', mask=i < {dk}' if deep != dk else ''})")
    return SEQS, heads


def _scores(w: Writer, source: KernelSource, node: Node, names: list[str], operands: list[Value], out: str) -> tuple[int, int]:
    (q, means, starts, lens, own), (queries, held, begins) = names, (v.type for v in operands[:3])
    if not isinstance(held, RecurrentType) or not isinstance(queries, TensorType) or not isinstance(begins, TensorType):
        raise TypeError(node)
    (heads, dk), columns, block = held.shape, _columns(operands), int(str(node.attrs["block"]))
    ldq = source.layouts[int(q[1:])].ld
    ldo, apart, seqs = source.layouts[int(out[1:])].ld, _strides(source, node, 1)[0], bound(begins.shape[0]) - 1
    group, deep, most = int(str(queries.shape[1])) // heads, next_power_of_2(dk), next_power_of_2(seqs)
    w.line(f"token = pid // {heads}")
    w.line(f"head = pid % {heads}")
    with w.block(f"if token < tl.load(dims + {TOKENS}):"):
        w.line(f"s = tl.arange(0, {most})")
        w.line(f"ends = tl.load({starts} + 1 + s, mask=s < tl.load(dims + {SEQS}), other=2147483647)")
        w.line("seq = tl.sum((ends <= token).to(tl.int32), 0)")
        w.line(f"block = (tl.load({lens} + seq) - tl.load({starts} + seq + 1) + token) // {block}")
        w.line(f"i = tl.arange(0, {deep})")
        column = f", mask=i < {dk}, other=0" if deep != dk else ""
        for g in range(group):
            load = f"tl.load({q} + token * {ldq} + (head * {group} + {g}) * {dk} + i{column}).to(tl.float32)"
            w.line(f"x = {'x + ' if g else ''}{load}")
        with w.block(f"for first in range(0, {columns}, {TOGETHER}):"):
            w.line(f"b = first + tl.arange(0, {TOGETHER})")
            w.line(f"page = tl.load({own} + seq * {columns} + b, mask=b < block, other=0).to(tl.int64) * {apart} + head * {dk}")
            mask = "(b < block)[:, None]" + (f" & (i < {dk})[None, :]" if deep != dk else "")
            w.line(f"mean = tl.load({means} + page[:, None] + i[None, :], mask={mask}, other=0)")
            w.line(f"y = tl.where(b < block, tl.sum(mean * x[None, :], 1), tl.where(b == block, {OWN!r}, {NEVER!r}))")
            w.line(f"tl.store({out} + token * {ldo} + head * {columns} + b, y, mask=b < {columns})")
    return TOKENS, heads


def _columns(operands: list[Value]) -> int:
    tables = operands[-1].type
    return int(str(tables.shape[1])) if isinstance(tables, TensorType) else 0


def _strides(source: KernelSource, node: Node, operand: int) -> tuple[int, int]:
    """Distance between the blocks of a state operand, in floats and in bytes."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    size = source.layouts[body.inputs.index(_value(node.operands[operand]))].block_stride
    return size // 4, size


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
