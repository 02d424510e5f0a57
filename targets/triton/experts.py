"""Linear layers by expert: each program computes some columns for one choice of one token, from that expert's weights.

Weights of experts that nobody chose are not read. A step with many tokens reads an expert's weights again for each of
its tokens (from the cache, if they fit it), and does not use the matrix unit.
"""

from __future__ import annotations

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Value
from inferloom.ir.types import TensorType
from inferloom.targets.base import KernelSource, expert_counts, expert_linear_of
from inferloom.targets.triton.source import KernelText, Writer, next_power_of_2
from inferloom.targets.triton.values import TL_TYPES, dims_of, parameter_type, row_dim, wide_parameters

COLUMNS, DEPTH = 64, 64


def lower(source: KernelSource, number: int) -> KernelText:
    """The text of an "experts" kernel."""
    body, node = expert_linear_of(source)
    x, packed, choice, *bias = node.operands
    n, k = int(str(node.attrs["n"])), int(str(node.attrs["k"]))
    _, ldw, tile, pair = dims_of(_value(packed))[1:]
    if (tile, pair) != (1, 1):
        raise UnsupportedError(f"{node.loc}: the GPU target wants rows of weights, not tiles of {tile}x{pair}")
    (output,) = body.outputs
    (choices,) = dims_of(_value(choice))
    inner = k if dims_of(_value(x))[0] != 1 else 0
    at = {v: i for i, v in enumerate(body.inputs)}
    ldx, ldc, ldo = (source.layouts[i].ld for i in (at[_value(x)], at[_value(choice)], len(body.inputs)))
    columns, depth = min(COLUMNS, next_power_of_2(n)), min(DEPTH, next_power_of_2(k))
    blocks = -(-n // columns)
    w = Writer()
    w.line("pid = tl.program_id(0)")
    w.line(f"token = pid // {choices * blocks}")
    with w.block(f"if token < tl.load(dims + {row_dim(body.outputs)}):"):
        w.line(f"choice = pid // {blocks} % {choices}")
        w.line(f"cols = pid % {blocks} * {columns} + tl.arange(0, {columns})")
        w.line(f"ks = tl.arange(0, {depth})")
        w.line(f"expert = tl.load(p{at[_value(choice)]} + token * {ldc} + choice).to(tl.int64)")
        w.line(f"x = p{at[_value(x)]} + token * {ldx}" + (f" + choice * {inner}" if inner else ""))
        w.line(f"y = p{at[_value(packed)]} + (expert * {n} + cols)[:, None] * {ldw} + ks[None, :]")
        w.line(f"acc = tl.zeros([{columns}, {depth}], tl.float32)")
        column = f"(cols < {n})[:, None]" if n % columns else ""
        with w.block(f"for k in range(0, {-(-k // depth) * depth}, {depth}):"):
            ragged = f"k + ks < {k}" if k % depth else ""
            masks = " & ".join(m for m in (column, f"({ragged})[None, :]" if ragged else "") if m)
            w.line(f"a = tl.load(x + k + ks{f', mask={ragged}, other=0' if ragged else ''}).to(tl.float32)")
            w.line(f"b = tl.load(y + k{f', mask={masks}, other=0' if masks else ''}).to(tl.float32)")
            w.line("acc += a[None, :] * b")
        w.line("out = tl.sum(acc, 1)")
        mask = f", mask=cols < {n}" if n % columns else ""
        if bias and bias[0] is not None:
            w.line(f"out += tl.load(p{at[bias[0]]} + expert * {n} + cols{f'{mask}, other=0' if mask else ''})")
        dtype = output.type.dtype
        narrow = f".to({TL_TYPES[dtype]})" if dtype in TL_TYPES and TL_TYPES[dtype] != "tl.float32" else ""
        w.line(f"tl.store(p{len(body.inputs)} + token * {ldo} + choice * {n} + cols, out{narrow}{mask})")
    values = [*body.inputs, output]
    parameters = [*((f"p{i}", parameter_type(v)) for i, v in enumerate(values)), ("dims", "*i32")]
    return KernelText(source.symbol, "experts", number, tuple(w.lines), tuple(parameters), (*range(len(values)), "dims"),
                      (row_dim(body.outputs), 1, choices * blocks), {"num_warps": 4, "num_stages": 3},
                      wide=wide_parameters(values, source.layouts), notes=expert_counts(source))


def _value(value: Value | None) -> Value:
    if value is None or not isinstance(value.type, TensorType):
        raise TypeError(value)
    return value
