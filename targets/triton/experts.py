"""Linear layers by expert. Weights of experts that nobody chose are not read.

Of few tokens, each program computes some columns for one choice of one token. Of many, a first kernel lists the choices
expert by expert, and programs then multiply tiles of rows that chose the same expert, on the matrix unit: as many
programs as fill the chip, which deal the tiles out among themselves, for only the device knows how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Value
from inferloom.ir.types import DType, TensorType, bound
from inferloom.targets.base import KernelSource, Scratch, expert_counts, expert_linear_of
from inferloom.targets.chips import GpuChip
from inferloom.targets.triton.attention import padded
from inferloom.targets.triton.configs import ExpertConfig
from inferloom.targets.triton.source import KernelText, Writer, next_power_of_2
from inferloom.targets.triton.values import TL_TYPES, dims_of, parameter_type, row_dim, wide_parameters

COLUMNS, DEPTH = 64, 64
#: Tokens of a step that go one by one.
FEW = 8
#: Choices that listing looks at together.
TOGETHER = 1024


def lower(source: KernelSource, number: int, config: ExpertConfig, chip: GpuChip, few: int) -> list[KernelText]:
    """The kernels of an "experts" source; up to `few` tokens go one by one."""
    grouped = _Grouped(source, number, config, chip, few + 1 if few else 0)
    return [*([one_by_one(source, number, few)] if few else []), grouped.listing(), grouped.products()]


def scratch_bytes(source: KernelSource) -> int:
    """Bytes of the list of choices, and of where each expert's begin."""
    made = _sizes(source)
    return padded(made.pairs * 4) + (made.experts + 1) * 4


def dtype_of(source: KernelSource) -> DType:
    """What rows and weights are made of."""
    return _value(expert_linear_of(source)[1].operands[0]).type.dtype  # type: ignore[union-attr]


def one_by_one(source: KernelSource, number: int, most: int) -> KernelText:
    """A program for some columns of a choice of a token."""
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
                      (row_dim(body.outputs), 1, choices * blocks), {"num_warps": 4, "num_stages": 3}, 0, most,
                      wide=wide_parameters(values, source.layouts), notes=expert_counts(source))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Choices of all tokens at most, experts, and choices of a token."""

    pairs: int
    experts: int
    choices: int


def _sizes(source: KernelSource) -> _Sizes:
    choice = _value(expert_linear_of(source)[1].operands[2])
    made = expert_counts(source)
    return _Sizes(bound(choice.type.shape[0]) * made["choices"], made["experts"], made["choices"])  # type: ignore[union-attr]


class _Grouped:
    """Tiles of rows that chose the same expert."""

    def __init__(self, source: KernelSource, number: int, config: ExpertConfig, chip: GpuChip, least: int) -> None:
        self.source, self.number, self.config, self.least = source, number, config, least
        self.body, self.node = expert_linear_of(source)
        self.sizes, self.programs = _sizes(source), 2 * chip.units
        self.values = [*self.body.inputs, *self.body.outputs]
        self.dim = row_dim(self.body.outputs)
        self.precision = "tf32x3" if chip.driver == "cuda" else "ieee"
        self.scratch = (Scratch(0), Scratch(padded(self.sizes.pairs * 4)))

    def _at(self, operand: int) -> int:
        return self.body.inputs.index(_value(self.node.operands[operand]))

    def listing(self) -> KernelText:
        """One program an expert: its choices, in the order of tokens, behind those of the experts before it."""
        w, experts, choices = Writer(), self.sizes.experts, self.sizes.choices
        place = self._at(2)
        w.line("expert = tl.program_id(0)")
        w.line(f"pairs = tl.load(dims + {self.dim}) * {choices}")
        w.line(f"i = tl.arange(0, {TOGETHER})")
        w.line("begin = 0")

        def ids() -> None:
            w.line("pair = at + i")
            w.line(f"ids = tl.load(p{place} + pair // {choices} * {self.source.layouts[place].ld} + pair % {choices}, "
                   f"mask=pair < pairs, other={experts})")

        with w.block(f"for at in range(0, pairs, {TOGETHER}):"):
            ids()
            w.line("begin += tl.sum((ids < expert).to(tl.int32), 0)")
        w.line("tl.store(starts + expert, begin)")
        with w.block(f"for at in range(0, pairs, {TOGETHER}):"):
            ids()
            w.line("mine = (ids == expert).to(tl.int32)")
            w.line("tl.store(order + begin + tl.cumsum(mine, 0) - 1, pair, mask=mine > 0)")
            w.line("begin += tl.sum(mine, 0)")
        with w.block(f"if expert == {experts - 1}:"):
            w.line(f"tl.store(starts + {experts}, begin)")
        return self._text("_list", w, [place], (self.dim, 2**30, experts), {"num_warps": 4, "num_stages": 1})

    def products(self) -> KernelText:
        w, c, sizes, node = Writer(), self.config, self.sizes, self.node
        x, packed = self._at(0), self._at(1)
        bias = self._at(3) if len(node.operands) > 3 and node.operands[3] is not None else None
        n, k = int(str(node.attrs["n"])), int(str(node.attrs["k"]))
        ldw = dims_of(_value(node.operands[1]))[2]
        inner = k if dims_of(_value(node.operands[0]))[0] != 1 else 0
        ldx, ldo = self.source.layouts[x].ld, self.source.layouts[len(self.body.inputs)].ld
        columns, experts = -(-n // c.n), next_power_of_2(sizes.experts)
        w.line("pid = tl.program_id(0)")
        w.line(f"es = tl.arange(0, {experts})")
        inside = f", mask=es < {sizes.experts}, other=0" if experts != sizes.experts else ""
        w.line(f"firsts = tl.load(starts + es{inside})")
        w.line(f"counts = tl.load(starts + 1 + es{inside}) - firsts")
        w.line(f"tiles = tl.cdiv(counts, {c.m})")
        w.line("ends = tl.cumsum(tiles, 0)")
        w.line(f"work = tl.sum(tiles, 0) * {columns}")
        w.line(f"i = tl.arange(0, {c.m})")
        w.line(f"ks = tl.arange(0, {c.k})")
        with w.block(f"for at in range(pid, work, {self.programs}):"):
            w.line(f"tile = at // {columns}")
            w.line("expert = tl.sum((ends <= tile).to(tl.int32), 0)")
            w.line("mine = es == expert")
            w.line(f"row = (tile - tl.sum(tl.where(mine, ends - tiles, 0), 0)) * {c.m} + i")
            w.line("valid = row < tl.sum(tl.where(mine, counts, 0), 0)")
            w.line("pair = tl.load(order + tl.sum(tl.where(mine, firsts, 0), 0) + row, mask=valid, other=0)")
            w.line(f"token = pair // {sizes.choices}")
            w.line(f"choice = pair % {sizes.choices}")
            w.line(f"cols = at % {columns} * {c.n} + tl.arange(0, {c.n})")
            spread = f" + choice * {inner}" if inner else ""
            w.line(f"x = p{x} + (token * {ldx}{spread})[:, None] + ks[None, :]")
            column = "cols" if n % c.n == 0 else f"tl.minimum(cols, {n - 1})"
            w.line(f"y = p{packed} + (expert.to(tl.int64) * {n} + {column})[None, :] * {ldw} + ks[:, None]")
            w.line(f"acc = tl.zeros([{c.m}, {c.n}], tl.float32)")
            with w.block(f"for k in range(0, {-(-k // c.k) * c.k}, {c.k}):"):
                masks = ["", ""]
                if k % c.k:
                    w.line(f"here = k + ks < {k}")
                    masks = [", mask=here[None, :], other=0", ", mask=here[:, None], other=0"]
                exact = f', input_precision="{self.precision}"' if _value(node.operands[0]).type.dtype is DType.F32 else ""
                w.line(f"acc = tl.dot(tl.load(x + k{masks[0]}), tl.load(y + k{masks[1]}), acc{exact})")
            if bias is not None:
                w.line(f"acc += tl.load(p{bias} + expert * {n} + {column})[None, :]")
            dtype = self.body.outputs[0].type.dtype  # type: ignore[union-attr]
            narrow = f".to({TL_TYPES[dtype]})" if dtype is not DType.F32 else ""
            inside = "valid[:, None]" + (f" & (cols < {n})[None, :]" if n % c.n else "")
            w.line(f"tl.store(p{len(self.body.inputs)} + (token * {ldo} + choice * {n})[:, None] + cols[None, :], acc{narrow}, "
                   f"mask={inside})")
        used = [i for i in range(len(self.values)) if i != self._at(2)]
        return self._text("_group", w, used, (self.dim, 2**30, self.programs), {"num_warps": c.warps, "num_stages": c.stages},
                          matrix=True)

    def _text(self, suffix: str, w: Writer, used: list[int], grid: tuple[int, int, int], options: dict[str, int],
              matrix: bool = False) -> KernelText:
        parameters = [*((f"p{i}", parameter_type(self.values[i])) for i in used), ("dims", "*i32"), ("order", "*i32"),
                      ("starts", "*i32")]
        return KernelText(self.source.symbol + suffix, "experts", self.number, tuple(w.lines), tuple(parameters),
                          (*used, "dims", *self.scratch), grid, options, self.least,
                          wide=wide_parameters(self.values, self.source.layouts), notes=expert_counts(self.source),
                          expects_matrix=matrix)


def _value(value: Value | None) -> Value:
    if value is None or not isinstance(value.type, TensorType):
        raise TypeError(value)
    return value
