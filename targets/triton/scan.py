"""Recurrent layers: a program is one sequence's part of the state, which it holds in registers over all of its tokens.

A part is some columns of one head's state, or some channels. Tokens are worked on one after the other, or, where many
are at hand, in chunks: a chunk of linear attention is four products of matrices (and a triangular system for the delta
rule), one of the elementwise recurrences a scan. What is left of a step after its last whole chunk goes one after the
other. The two forms differ in their rounding, so kernels whose bits must not depend on how a sequence is cut into
steps have the first alone. A convolution is the same in both.
"""

from __future__ import annotations

from collections.abc import Callable

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType, TensorType
from inferloom.targets.base import KernelSource
from inferloom.targets.recurrence import Recurrence
from inferloom.targets.triton.source import KernelText, Writer, next_power_of_2
from inferloom.targets.triton.values import TL_TYPES, dims_of, parameter_type, wide_parameters

#: Channels of a program, and elements of the state that it holds in registers.
CHANNELS, HELD = 128, 4096
#: Channels of a program that holds the states of all tokens of a chunk.
CHUNK_CHANNELS = 32
#: Tokens that a convolution works on together.
TILE = 32
SEQS = 1


def chunks(source: KernelSource) -> tuple[int, ...]:
    """Sizes of chunks to choose from, the best first; 0 is token after token, which there always is."""
    recurrence = Recurrence(source)
    if recurrence.op == "linear_attention":
        decay = recurrence.node.operands[7]
        return (64, 32, 16, 0) if decay is not None and len(dims_of(decay)) == 1 else (16, 0)
    return {"linear_recurrence": (64, 0), "selective_scan": (16, 8, 0), "wkv": (32, 16, 0)}.get(recurrence.op, (0,))


def lower(source: KernelSource, number: int, chunk: int, driver: str) -> KernelText:
    """The text of a "scan" kernel for GPUs of a driver, with chunks of so many tokens (0: none)."""
    scan = _Scan(source, chunk, driver)
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
                      (SEQS, 1, scan.parts), {"num_warps": 8 if chunk > 32 else 4, "num_stages": 1},
                      wide=wide_parameters(values, source.layouts))


class _Scan(Recurrence):
    def __init__(self, source: KernelSource, chunk: int, driver: str) -> None:
        super().__init__(source)
        self.w, self.chunk = Writer(), chunk
        self.driver = driver
        self.shapes = [dims_of(v) if v is not None else () for v in self.node.operands]
        bodies: dict[str, Callable[[], None]] = {
            "linear_attention": self._linear_attention, "causal_conv1d": self._conv, "selective_scan": self._selective,
            "linear_recurrence": self._linear, "wkv": self._wkv}
        if self.op not in bodies:
            raise UnsupportedError(f"{self.node.loc}: the GPU target cannot lower {self.op} yet")
        self.body = bodies[self.op]
        if self.op == "linear_attention":
            (_, dk), (heads, dv) = self.shapes[4], self.shapes[6]
            least = 16 if self.chunk else 1  # what the matrix unit takes
            self.rows = max(least, next_power_of_2(dk))
            self.columns = max(least, min(next_power_of_2(dv), HELD // self.rows))
            self.blocks = -(-dv // self.columns)
            self.parts = heads * self.blocks
        else:
            (channels,) = self.shapes[4]
            most = CHUNK_CHANNELS if self.chunk and self.op == "selective_scan" else CHANNELS
            self.columns = min(most, next_power_of_2(channels))
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
        rows = self.rows
        w.line(f"head = part // {self.blocks}" if self.blocks > 1 else "head = part")
        w.line(f"i = tl.arange(0, {rows})")
        w.line(f"j = tl.arange(0, {self.columns})" + (f" + part % {self.blocks} * {self.columns}" if self.blocks > 1 else ""))
        deep, broad = f"i < {dk}" if rows != dk else "", f"j < {dv}" if dv % self.columns else ""
        mask = _both(deep, broad)
        w.line(f"inner = head * {dk * dv} + i[:, None] * {dv} + j[None, :]")
        w.line(f"group = {'head' if groups == heads else f'head * {groups} // {heads}'}")
        self.begin("state", "inner", mask)
        chunk = self._attention_chunk_by_row if len(self.shapes[7]) == 2 else self._attention_chunk
        start = self._whole(lambda: chunk(deep, broad)) if self.chunk else "begin"
        with w.block(f"for t in range({start}, end):"):
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

    def _whole(self, body: Callable[[], None]) -> str:
        """A loop over whole chunks, of which `t` are the tokens; the name of the first token after them."""
        w = self.w
        w.line(f"nth = tl.arange(0, {self.chunk})")
        w.line(f"rest = begin + (end - begin) // {self.chunk} * {self.chunk}")
        with w.block(f"for at in range(begin, rest, {self.chunk}):"):
            w.line("t = at + nth")
            body()
        return "rest"

    def rows_of(self, operand: int, columns: str, mask: str = "") -> str:
        """Elements of an operand's rows of the tokens t of a chunk, as they are stored."""
        address = f"{self.name(operand)} + t[:, None] * {self.layouts[self.place(operand)].ld} + ({columns})[None, :]"
        return f"tl.load({address}{f', mask=({mask})[None, :], other=0' if mask else ''})"

    def put_rows(self, columns: str, value: str, mask: str) -> None:
        at = f"p{self.result} + t[:, None] * {self.layouts[self.result].ld} + ({columns})[None, :]"
        self.w.line(f"tl.store({at}, {value}{f', mask=({mask})[None, :]' if mask else ''})")

    def _dot(self, a: str, b: str, plus: str = "") -> str:
        """A product in the dtype of the model, float32 ones as three of shorter numbers on NVIDIA's matrix unit."""
        value = self.inputs[self.place(4)]
        dtype = value.type.dtype if isinstance(value.type, TensorType) else DType.F32
        more = f", {plus}" if plus else ""
        if dtype is DType.F32:
            return f'tl.dot({a}, {b}{more}, input_precision="{"tf32x3" if self.driver == "cuda" else "ieee"}")'
        return f"tl.dot(({a}).to({TL_TYPES[dtype]}), ({b}).to({TL_TYPES[dtype]}){more})"

    def _attention_chunk(self, deep: str, broad: str) -> None:
        """Of a chunk, with S the state before it and G the sums of decays: `p[t, s]` = exp(G[t] - G[s]) for s <= t;
        o = exp(G) q S + (q k^T * p) u; S = exp(G[-1]) S + k^T (exp(G[-1] - G) u). With the delta rule, u solves
        u[t] + beta[t] sum(p[t, s] k[t] k[s] u[s], s < t) = beta[t] (v[t] - exp(G[t]) k[t] S), row after row.
        """
        w, (_, dk), (_, dv) = self.w, self.shapes[4], self.shapes[6]
        for name, operand in (("q", 4), ("k", 5)):
            w.line(f"{name} = {self.rows_of(operand, f'group * {dk} + i', deep)}")
        w.line(f"u = {self.rows_of(6, f'head * {dv} + j', broad)}.to(tl.float32)")
        w.line(f"g = tl.cumsum({self.row(7, 'head')}, 0)")
        w.line("e = tl.exp(g)")
        w.line("p = tl.exp(tl.where(nth[:, None] >= nth[None, :], g[:, None] - g[None, :], -1e30))")
        if self.given(8):
            w.line(f"beta = {self.row(8, 'head')}")
        if self.node.attrs["delta"]:
            w.line(f"u = beta[:, None] * (u - e[:, None] * {self._dot('k', 'state')})")
            w.line(f"a = tl.where(nth[:, None] > nth[None, :], {self._dot('k', 'k.T')} * p, 0) * beta[:, None]")
            with w.block(f"for r in range(1, {self.chunk}):"):
                w.line("mine = (nth == r)[:, None]")
                w.line("before_r = tl.sum(tl.where(mine, a, 0), 0)")
                w.line("u -= tl.where(mine, tl.sum(before_r[:, None] * u, 0)[None, :], 0)")
        elif self.given(8):
            w.line("u *= beta[:, None]")
        w.line(f"o = e[:, None] * {self._dot('q', 'state')}")
        w.line(f"p *= {self._dot('q', 'k.T')}")
        w.line(f"o = {self._dot('p', 'u', 'o')}")
        self.put_rows(f"head * {dv} + j", "o", broad)
        w.line(f"last = tl.sum(tl.where(nth == {self.chunk - 1}, g, 0), 0)")
        w.line("u *= tl.exp(last - g)[:, None]")
        w.line(f"state = {self._dot('k.T', 'u', 'state * tl.exp(last)')}")

    def _attention_chunk_by_row(self, deep: str, broad: str) -> None:
        """The same where each row of S decays by itself: `p[t, s]` is then a sum over rows i of q[t] k[s] exp(G[t] - G[s]).

        exp(G[t]) and exp(-G[s]) apart would overflow, so each t has its own pass over the chunk.
        """
        w, (_, dk), (_, dv) = self.w, self.shapes[4], self.shapes[6]
        for name, operand in (("q", 4), ("k", 5)):
            w.line(f"{name} = {self.rows_of(operand, f'group * {dk} + i', deep)}.to(tl.float32)")
        w.line(f"u = {self.rows_of(6, f'head * {dv} + j', broad)}.to(tl.float32)")
        w.line(f"g = tl.cumsum({self.rows_of(7, f'head * {dk} + i', deep)}.to(tl.float32), 0)")
        w.line("e = tl.exp(g)")
        if self.given(8):
            w.line(f"beta = {self.row(8, 'head')}")
        if self.node.attrs["delta"]:
            w.line(f"u = beta[:, None] * (u - {self._dot('k * e', 'state')})")
        elif self.given(8):
            w.line("u *= beta[:, None]")
        w.line(f"p = tl.zeros([{self.chunk}, {self.chunk}], tl.float32)")
        with w.block(f"for r in range({self.chunk}):"):
            w.line("mine = (nth == r)[:, None]")
            w.line("met = k * tl.exp(tl.minimum(tl.sum(tl.where(mine, g, 0), 0)[None, :] - g, 0))")
            w.line("seen = tl.sum(met * tl.sum(tl.where(mine, q, 0), 0)[None, :], 1)")
            w.line("p = tl.where(mine, tl.where(nth <= r, seen, 0)[None, :], p)")
            if self.node.attrs["delta"]:
                w.line("held = tl.sum(met * tl.sum(tl.where(mine, k * beta[:, None], 0), 0)[None, :], 1)")
                w.line("u -= tl.where(mine, tl.sum(tl.where(nth < r, held, 0)[:, None] * u, 0)[None, :], 0)")
        w.line(f"o = {self._dot('p', 'u', self._dot('q * e', 'state'))}")
        self.put_rows(f"head * {dv} + j", "o", broad)
        w.line(f"last = tl.sum(tl.where((nth == {self.chunk - 1})[:, None], g, 0), 0)")
        w.line("k *= tl.exp(last[None, :] - g)")
        w.line(f"state = {self._dot('k.T', 'u', 'state * tl.exp(last)[:, None]')}")

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
        # Tokens before the step's first are those of the state: x0 is width - 1 before it.
        w.line(f"nth = tl.arange(0, {TILE})")
        with w.block(f"for at in range(begin, end, {TILE}):"):
            for i in range(width):
                back = width - 1 - i
                w.line(f"t = at + nth{f' - {back}' if back else ''}")
                seen = f"((t >= begin) & (t < end))[:, None]{f' & ({mask})[None, :]' if mask else ''}"
                address = f"{self.name(4)} + t[:, None] * {self.layouts[self.place(4)].ld} + j[None, :]"
                w.line(f"x = tl.load({address}, mask={seen}, other=0).to(tl.float32)")
                for old in range(i, width - 1):
                    w.line(f"x = tl.where((t == begin - {width - 1 - old})[:, None], x{old}[None, :], x)")
                w.line(f"y = {'y + ' if i else ''}x * w{i}[None, :]")
            at = f"p{self.result} + t[:, None] * {self.layouts[self.result].ld} + j[None, :]"
            given = f"(t < end)[:, None]{f' & ({mask})[None, :]' if mask else ''}"
            w.line(f"tl.store({at}, y{' + bias[None, :]' if self.given(6) else ''}, mask={given})")
        for i in range(width - 1):
            w.line(f"t = end - {width - 1 - i}")
            w.line(f"x = {self.row(4, 'j', f'(t >= begin) & ({mask})' if mask else 't >= begin')}")
            for old in range(i, width - 1):
                w.line(f"x = tl.where(t == begin - {width - 1 - old}, x{old}, x)")
            self.leave("x", f"{i * channels} + j", mask)

    def _selective(self) -> None:
        w, (n, channels) = self.w, self.shapes[6]
        mask, rows = self._channels(), next_power_of_2(n)
        w.line(f"i = tl.arange(0, {rows})")
        deep = f"i < {n}" if rows != n else ""
        both = _both(deep, mask)
        w.line(f"inner = i[:, None] * {channels} + j[None, :]")
        w.line(f"a = {self.fixed(6, 'inner', both)}")
        self.begin("state", "inner", both)
        start = self._whole(lambda: self._selective_chunk(deep, mask)) if self.chunk else "begin"
        with w.block(f"for t in range({start}, end):"):
            for name, operand in (("x", 4), ("dt", 5)):
                w.line(f"{name} = {self.row(operand, 'j', mask)}")
            for name, operand in (("b", 7), ("c", 8)):
                w.line(f"{name} = {self.row(operand, 'i', deep)}")
            w.line("state = tl.exp(dt[None, :] * a) * state + (dt * x)[None, :] * b[:, None]")
            self.put("j", "tl.sum(state * c[:, None], 0)", mask)
        self.leave("state", "inner", both)

    def _selective_chunk(self, deep: str, mask: str) -> None:
        """The states after each token of a chunk [tokens, n, channels] as a scan of (factor, summand)."""
        w = self.w
        for name, operand in (("x", 4), ("dt", 5)):
            w.line(f"{name} = {self.rows_of(operand, 'j', mask)}.to(tl.float32)")
        for name, operand in (("b", 7), ("read", 8)):
            w.line(f"{name} = {self.rows_of(operand, 'i', deep)}.to(tl.float32)")
        w.line("keep = tl.exp(dt[:, None, :] * a[None, :, :])")
        w.line("add = (dt * x)[:, None, :] * b[:, :, None]")
        w.line("add = tl.where(nth[:, None, None] == 0, keep * state[None, :, :] + add, add)")
        w.line("_, held = tl.associative_scan((keep, add), 0, compose)")
        self.put_rows("j", "tl.sum(held * read[:, :, None], 1)", mask)
        w.line(f"state = tl.sum(tl.where(nth[:, None, None] == {self.chunk - 1}, held, 0), 0)")

    def _linear_chunk(self, mask: str) -> None:
        w = self.w
        w.line(f"keep = {self.rows_of(5, 'j', mask)}.to(tl.float32)")
        w.line(f"add = {self.rows_of(4, 'j', mask)}.to(tl.float32)")
        w.line("add = tl.where(nth[:, None] == 0, keep * state[None, :] + add, add)")
        w.line("_, held = tl.associative_scan((keep, add), 0, compose)")
        self.put_rows("j", "held", mask)
        w.line(f"state = tl.sum(tl.where(nth[:, None] == {self.chunk - 1}, held, 0), 0)")

    def _wkv_chunk(self, mask: str) -> None:
        """Sums before each token of a chunk as a scan: the first is the state's, the others those of the token before."""
        w = self.w
        for name, operand in (("k", 4), ("v", 5)):
            rows = self.rows_of(operand, "j", mask)
            w.line(f"{name} = {rows}.to(tl.float32)")
            w.line(f"{name}0 = {rows.replace('t[:, None]', 'tl.maximum(t - 1, begin)[:, None]')}.to(tl.float32)")
        w.line("first = (nth == 0)[:, None]")
        w.line("sums = tl.where(first, total[None, :], v0)")
        w.line("ones = tl.where(first, weight[None, :], 1.0)")
        w.line("tops = tl.where(first, top[None, :], k0)")
        w.line("sums, ones, tops, _ = tl.associative_scan((sums, ones, tops, tl.where(first, 0.0, decay[None, :])), 0, pool)")
        w.line("high = tl.maximum(tops, k + bonus[None, :])")
        w.line("old = tl.exp(tops - high)")
        w.line("new = tl.exp(k + bonus[None, :] - high)")
        self.put_rows("j", "(old * sums + new * v) / (old * ones + new)", mask)
        w.line("sums, ones, tops, _ = pool(sums, ones, tops, tops * 0, v, v * 0 + 1, k, tops * 0 + decay[None, :])")
        w.line(f"final = (nth == {self.chunk - 1})[:, None]")
        for name, rows in (("total", "sums"), ("weight", "ones"), ("top", "tops")):
            w.line(f"{name} = tl.sum(tl.where(final, {rows}, 0), 0)")

    def _wkv(self) -> None:
        w, (channels,), mask = self.w, self.shapes[6], self._channels()
        names = ("total", "weight", "top")
        for i, name in enumerate(names):
            self.begin(name, f"{i * channels} + j", mask and f"({mask})")
        w.line("top = tl.where(weight > 0, top, -1e38)")
        w.line(f"decay = {self.fixed(6, 'j', mask)}")
        w.line(f"bonus = {self.fixed(7, 'j', mask)}")
        start = self._whole(lambda: self._wkv_chunk(mask)) if self.chunk else "begin"
        with w.block(f"for t in range({start}, end):"):
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
        start = self._whole(lambda: self._linear_chunk(mask)) if self.chunk else "begin"
        with self.w.block(f"for t in range({start}, end):"):
            self.w.line(f"state = {self.row(5, 'j', mask)} * state + {self.row(4, 'j', mask)}")
            self.put("j", "state", mask)
        self.leave("state", "j", mask)


def _both(rows: str, columns: str) -> str:
    """The mask of a tile from those of its rows and of its columns."""
    return " & ".join(m for m in (f"({rows})[:, None]" if rows else "", f"({columns})[None, :]" if columns else "") if m)
