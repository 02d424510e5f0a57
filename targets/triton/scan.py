"""Recurrent layers: a program is one sequence's part of the state, which it holds in registers token after token.

A part is some columns of one head's state, or some channels. Tokens are worked on one after the other, so that a
sequence's bits do not depend on how it was cut into steps, nor on others.
"""

from __future__ import annotations

from collections.abc import Callable

from inferloom.ir.errors import UnsupportedError
from inferloom.targets.base import KernelSource
from inferloom.targets.recurrence import Recurrence
from inferloom.targets.triton.source import KernelText, Writer, next_power_of_2
from inferloom.targets.triton.values import dims_of, parameter_type, wide_parameters

#: Channels of a program, and elements of the state that it holds in registers.
CHANNELS, HELD = 128, 4096
SEQS = 1


def lower(source: KernelSource, number: int) -> KernelText:
    """The text of a "scan" kernel."""
    scan = _Scan(source)
    w = scan.w
    w.line("pid = tl.program_id(0)")
    w.line(f"seq = pid // {scan.parts}")
    with w.block(f"if seq < tl.load(dims + {SEQS}):"):
        w.line(f"part = pid % {scan.parts}")
        w.line(f"begin = tl.load({scan.name(1)} + seq)")
        w.line(f"end = tl.load({scan.name(1)} + seq + 1)")
        w.line(f"past = tl.load({scan.name(2)} + seq) - (end - begin)")
        for i, name in enumerate(("before", "after")):
            w.line(f"{name} = {scan.name(0)} + tl.load({scan.name(3)} + seq * 2 + {i}).to(tl.int64) * {scan.stride}")
        scan.body()
    values = [*scan.inputs, scan.out]
    parameters = [*((f"p{i}", parameter_type(v)) for i, v in enumerate(values)), ("dims", "*i32")]
    return KernelText(source.symbol, "scan", number, tuple(w.lines), tuple(parameters), (*range(len(values)), "dims"),
                      (SEQS, 1, scan.parts), {"num_warps": 4, "num_stages": 1},
                      wide=wide_parameters(values, source.layouts))


class _Scan(Recurrence):
    def __init__(self, source: KernelSource) -> None:
        super().__init__(source)
        self.w = Writer()
        self.shapes = [dims_of(v) if v is not None else () for v in self.node.operands]
        bodies: dict[str, Callable[[], None]] = {
            "linear_attention": self._linear_attention, "causal_conv1d": self._conv, "selective_scan": self._selective,
            "linear_recurrence": self._linear, "wkv": self._wkv}
        if self.op not in bodies:
            raise UnsupportedError(f"{self.node.loc}: the GPU target cannot lower {self.op} yet")
        self.body = bodies[self.op]
        if self.op == "linear_attention":
            (_, dk), (heads, dv) = self.shapes[4], self.shapes[6]
            self.columns = min(next_power_of_2(dv), max(1, HELD // next_power_of_2(dk)))
            self.blocks = -(-dv // self.columns)
            self.parts = heads * self.blocks
        else:
            (channels,) = self.shapes[4]
            self.columns = min(CHANNELS, next_power_of_2(channels))
            self.parts = -(-channels // self.columns)

    # -- operands

    def name(self, operand: int) -> str:
        return f"p{self.place(operand)}"

    def row(self, operand: int, column: str, mask: str = "") -> str:
        """Elements of an operand's row of token t, as float32."""
        address = f"{self.name(operand)} + t * {self.layouts[self.place(operand)].ld} + {column}"
        return f"tl.load({address}{f', mask={mask}, other=0' if mask else ''}).to(tl.float32)"

    def fixed(self, operand: int, index: str, mask: str = "") -> str:
        return f"tl.load({self.name(operand)} + {index}{f', mask={mask}, other=0' if mask else ''}).to(tl.float32)"

    def put(self, column: str, value: str, mask: str) -> None:
        at = f"p{self.result} + t * {self.layouts[self.result].ld} + {column}"
        self.w.line(f"tl.store({at}, {value}{f', mask={mask}' if mask else ''})")

    def begin(self, name: str, index: str, mask: str) -> None:
        """A part of the state, zeros where the sequence begins."""
        started = f"(past > 0) & {mask}" if mask else "past > 0"
        self.w.line(f"{name} = tl.load(before + {index}, mask={started}, other=0)")

    def leave(self, name: str, index: str, mask: str) -> None:
        self.w.line(f"tl.store(after + {index}, {name}{f', mask={mask}' if mask else ''})")

    # -- the recurrences

    def _linear_attention(self) -> None:
        w, (groups, dk), (heads, dv) = self.w, self.shapes[4], self.shapes[6]
        rows = next_power_of_2(dk)
        w.line(f"head = part // {self.blocks}" if self.blocks > 1 else "head = part")
        w.line(f"i = tl.arange(0, {rows})")
        w.line(f"j = tl.arange(0, {self.columns})" + (f" + part % {self.blocks} * {self.columns}" if self.blocks > 1 else ""))
        deep, broad = f"i < {dk}" if rows != dk else "", f"j < {dv}" if dv % self.columns else ""
        mask = _both(deep, broad)
        w.line(f"inner = head * {dk * dv} + i[:, None] * {dv} + j[None, :]")
        w.line(f"group = {'head' if groups == heads else f'head * {groups} // {heads}'}")
        self.begin("state", "inner", mask)
        with w.block("for t in range(begin, end):"):
            for name, operand in (("q", 4), ("k", 5)):
                w.line(f"{name} = {self.row(operand, f'group * {dk} + i', deep)}")
            w.line(f"u = {self.row(6, f'head * {dv} + j', broad)}")
            if len(self.shapes[7]) == 2:
                w.line(f"state *= tl.exp({self.row(7, f'head * {dk} + i', deep)})[:, None]")
            else:
                w.line(f"state *= tl.exp({self.row(7, 'head')})")
            if self.node.attrs["delta"]:
                w.line("u -= tl.sum(k[:, None] * state, 0)")
            if self.given(8):
                w.line(f"u *= {self.row(8, 'head')}")
            w.line("state += k[:, None] * u[None, :]")
            self.put(f"head * {dv} + j", "tl.sum(q[:, None] * state, 0)", broad)
        self.leave("state", "inner", mask)

    def _channels(self) -> str:
        """Name this program's channels `j`; what masks those past the end."""
        (channels,) = self.shapes[4]
        self.w.line(f"j = part * {self.columns} + tl.arange(0, {self.columns})")
        return f"j < {channels}" if channels % self.columns else ""

    def _conv(self) -> None:
        w, (width, channels) = self.w, self.shapes[5]
        mask = self._channels()
        for i in range(width):
            w.line(f"w{i} = {self.fixed(5, f'{i * channels} + j', mask)}")
        if self.given(6):
            w.line(f"bias = {self.fixed(6, 'j', mask)}")
        for i in range(width - 1):
            self.begin(f"x{i}", f"{i * channels} + j", mask and f"({mask})")
        with w.block("for t in range(begin, end):"):
            w.line(f"x = {self.row(4, 'j', mask)}")
            terms = [*(f"x{i} * w{i}" for i in range(width - 1)), f"x * w{width - 1}", *(["bias"] if self.given(6) else [])]
            self.put("j", " + ".join(terms), mask)
            for i in range(width - 1):
                w.line(f"x{i} = {f'x{i + 1}' if i < width - 2 else 'x'}")
        for i in range(width - 1):
            self.leave(f"x{i}", f"{i * channels} + j", mask)

    def _selective(self) -> None:
        w, (n, channels) = self.w, self.shapes[6]
        mask, rows = self._channels(), next_power_of_2(n)
        w.line(f"i = tl.arange(0, {rows})")
        deep = f"i < {n}" if rows != n else ""
        both = _both(deep, mask)
        w.line(f"inner = i[:, None] * {channels} + j[None, :]")
        w.line(f"a = {self.fixed(6, 'inner', both)}")
        self.begin("state", "inner", both)
        with w.block("for t in range(begin, end):"):
            for name, operand in (("x", 4), ("dt", 5)):
                w.line(f"{name} = {self.row(operand, 'j', mask)}")
            for name, operand in (("b", 7), ("c", 8)):
                w.line(f"{name} = {self.row(operand, 'i', deep)}")
            w.line("state = tl.exp(dt[None, :] * a) * state + (dt * x)[None, :] * b[:, None]")
            self.put("j", "tl.sum(state * c[:, None], 0)", mask)
        self.leave("state", "inner", both)

    def _wkv(self) -> None:
        w, (channels,), mask = self.w, self.shapes[6], self._channels()
        names = ("total", "weight", "top")
        for i, name in enumerate(names):
            self.begin(name, f"{i * channels} + j", mask and f"({mask})")
        w.line("top = tl.where(weight > 0, top, -1e38)")
        w.line(f"decay = {self.fixed(6, 'j', mask)}")
        w.line(f"bonus = {self.fixed(7, 'j', mask)}")
        with w.block("for t in range(begin, end):"):
            for name, operand in (("k", 4), ("v", 5)):
                w.line(f"{name} = {self.row(operand, 'j', mask)}")
            w.line("high = tl.maximum(top, k + bonus)")
            w.line("old = tl.exp(top - high)")
            w.line("new = tl.exp(k + bonus - high)")
            self.put("j", "(old * total + new * v) / (old * weight + new)", mask)
            w.line("high = tl.maximum(top + decay, k)")
            w.line("old = tl.exp(top + decay - high)")
            w.line("new = tl.exp(k - high)")
            w.line("total = old * total + new * v")
            w.line("weight = old * weight + new")
            w.line("top = high")
        for i, name in enumerate(names):
            self.leave(name, f"{i * channels} + j", mask)

    def _linear(self) -> None:
        mask = self._channels()
        self.begin("state", "j", mask and f"({mask})")
        with self.w.block("for t in range(begin, end):"):
            self.w.line(f"state = {self.row(5, 'j', mask)} * state + {self.row(4, 'j', mask)}")
            self.put("j", "state", mask)
        self.leave("state", "j", mask)


def _both(rows: str, columns: str) -> str:
    """The mask of a tile from those of its rows and of its columns."""
    return " & ".join(m for m in (f"({rows})[:, None]" if rows else "", f"({columns})[None, :]" if columns else "") if m)
