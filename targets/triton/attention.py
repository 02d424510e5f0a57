"""Paged attention: one family of kernels for prefill and decode.

A program works on a tile of query rows, tokens times query heads that share a key-value head (all of them, or a part
where they are too many for its registers), and walks the keys that they may see; blocks of state that no row sees are
never read. Few new tokens of a long sequence (decode) would leave the chip idle, so there the keys are split among
programs, whose results a second kernel joins. How many parts there are depends on the sequence's length alone, and is
found on the device. A variant's scalar expressions are written into the loop; what does not depend on the key is
computed before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from inferloom.ir import expr as scalar
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node, Value
from inferloom.ir.ops.attention import Q_POS
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.targets.base import KernelSource, Scratch
from inferloom.targets.triton.configs import AttentionConfig
from inferloom.targets.triton.source import KernelText, Writer, next_power_of_2
from inferloom.targets.triton.values import TL_TYPES, parameter_type, repr_float, wide_parameters

LOG2E = 1.4426950408889634
#: Stands for minus infinity, so that a row which has seen no key yet makes no NaN.
LOWEST = "-1e30"
#: Tiles of keys that a split has at least.
TILES_PER_SPLIT = 4
#: Query heads of one key-value head that a program works on, at most: their sums are held in registers.
MOST_HEADS, MOST_WIDE_HEADS, WIDE = 64, 16, 256
CAUSAL = scalar.parse("(le k_pos q_pos)")


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads that share a key-value head, key-value heads, and head sizes."""

    group: int
    kv: int
    k_dim: int
    v_dim: int

    @property
    def size(self) -> int:
        """Query heads of one program: the largest part of a group that can be."""
        most = MOST_WIDE_HEADS if self.v_dim > WIDE else MOST_HEADS
        return next(size for size in range(min(most, self.group), 0, -1) if self.group % size == 0)

    @property
    def units(self) -> int:
        """Parts that all query heads are in."""
        return self.kv * self.group // self.size


def heads_of(source: KernelSource) -> Heads:
    """The heads of an attention source."""
    node = _node(source)
    q, state = node.operands[:2]
    if q is None or state is None or not isinstance(q.type, TensorType) or not isinstance(state.type, StateType):
        raise TypeError(node)
    return Heads(int(str(q.type.shape[1])) // state.type.heads, state.type.heads, state.type.k_dim, state.type.v_dim)


def _node(source: KernelSource) -> Node:
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    (node,) = (n for n in body.nodes if n.op == "paged_attention")
    return node


class Attention:
    """The kernels of one "attention" source."""

    def __init__(self, source: KernelSource, number: int) -> None:
        body = source.node.attrs["body"]
        if not isinstance(body, Graph):
            raise TypeError(body)
        self.body, self.source, self.number, self.node = body, source, number, _node(source)
        q, state, starts, lens, tables, *extra = (_value(v) for v in self.node.operands)
        if not isinstance(state.type, StateType) or not isinstance(tables.type, TensorType):
            raise TypeError(state)
        (out,) = body.outputs
        self.state, self.heads, self.dtype = state.type, heads_of(source), state.type.dtype
        self.out_type = out.type.dtype
        self.inputs = [body.inputs.index(v) for v in (q, state, starts, lens, tables)]
        self.tables = [(f"t{i}", body.inputs.index(v), v) for i, v in enumerate(extra)]
        self.ldq, self.ldo = source.layouts[self.inputs[0]].ld, source.layouts[len(body.inputs)].ld
        self.columns = int(str(tables.type.shape[1]))
        self.stride = source.layouts[self.inputs[1]].block_stride // self.dtype.itemsize
        self.q_type = q.type.dtype
        # A tile of queries or keys is widened to a power of two that the matrix unit takes.
        # Of a key that is its value too, `dk` is what comes after the value.
        own = self.heads.k_dim - (self.heads.v_dim if self.state.latent else 0)
        self.dk, self.dv = (max(16, next_power_of_2(d)) for d in (own, self.heads.v_dim))
        self.parts_of_key = [("dk", self.dk, own, self.heads.v_dim if self.state.latent else 0)] if own else []
        if self.state.latent:
            self.parts_of_key.append(("dv", self.dv, self.heads.v_dim, 0))
        self.sink, self.chosen = (int(str(self.node.attrs[name])) for name in ("sink", "chosen"))
        #: Elements between rows of the table of chosen blocks, and blocks that a key head chooses.
        self.choices = (0, 0)
        if self.chosen >= 0:
            _, place, table = self.tables[self.chosen]
            self.choices = source.layouts[place].ld, int(str(table.type.shape[2]))  # type: ignore[union-attr]

    def fitting(self, found: list[AttentionConfig]) -> list[AttentionConfig]:
        """The same with tiles of keys that lie in one block, where blocks are chosen."""
        if self.chosen < 0:
            return found
        whole = self.state.block_tokens & -self.state.block_tokens
        return list(dict.fromkeys(replace(c, n=min(c.n, whole)) for c in found))

    # -- the three kernels

    def prefill(self, config: AttentionConfig, tokens: int) -> KernelText:
        """Tiles of `tokens` tokens from q_tiles."""
        w = Writer()
        rows = max(16, next_power_of_2(tokens * self.heads.size))
        self._begin(w, 3, 1)
        with w.block("if tile < count:"):
            self._queries(w, rows, "q_tiles")
            self._walk(w, rows, config.n, f"low // {config.n} * {config.n}", "high", split=False)
            self._finish(w)
        return self._text("", w, "q_tiles", (3, 1, self.heads.units), config, [], rows)

    def decode(self, config: AttentionConfig, tokens: int) -> KernelText:
        """Parts of sequences from d_tiles, each with at most `tokens` new tokens."""
        w = Writer()
        rows = max(16, next_power_of_2(tokens * self.heads.size))
        self._begin(w, 4, config.splits)
        with w.block("if tile < count:"):
            self._queries(w, rows, "d_tiles")
            self._parts(w, config)
            w.line(f"begin = (low // {config.n} + split * each) * {config.n}")
            w.line(f"end = tl.minimum(begin + each * {config.n}, high)")
            with w.block("if split < parts:"):
                self._walk(w, rows, config.n, "begin", "end", split=True)
                with w.block("if parts == 1:"):
                    self._finish(w)
                with w.block("else:"):
                    w.line(f"cell = ((tile * {self.heads.units} + unit) * {config.splits} + split) * {rows} + r")
                    w.line(f"tl.store(part + cell[:, None].to(tl.int64) * {self.heads.v_dim} + dv[None, :], acc, "
                           f"mask={self._masked('valid[:, None]')})")
                    w.line("tl.store(tops + cell, top, mask=valid)")
                    w.line("tl.store(sums + cell, total, mask=valid)")
        sizes = self.scratch_sizes(config, rows)
        return self._text("_split", w, "d_tiles", (4, 1, self.heads.units * config.splits), config,
                          _offsets(sizes), rows)

    def join(self, config: AttentionConfig, tokens: int) -> KernelText:
        """Joins the parts of each row of d_tiles; one program a row."""
        w = Writer()
        rows = max(16, next_power_of_2(tokens * self.heads.size))
        used = tokens * self.heads.size
        w.line("pid = tl.program_id(0)")
        w.line(f"one = pid % {used}")
        w.line(f"pid = pid // {used}")
        self._unit(w)
        w.line("count = tl.load(dims + 4)")
        with w.block("if tile < count:"):
            self._tile(w, "d_tiles")
            w.line(f"r = tl.arange(0, {rows})")  # the bounds of the keys are those of all rows
            self._rows(w)
            self._bounds(w)
            self._parts(w, config)
            with w.block(f"if (parts > 1) & (one < tokens * {self.heads.size}):"):
                w.line(f"s = tl.arange(0, {config.splits})")
                w.line(f"dv = tl.arange(0, {self.dv})")
                w.line(f"cell = ((tile * {self.heads.units} + unit) * {config.splits} + s) * {rows} + one")
                w.line(f"top = tl.load(tops + cell, mask=s < parts, other={LOWEST})")
                w.line("total = tl.load(sums + cell, mask=s < parts, other=0)")
                w.line("weight = tl.exp2(top - tl.max(top, 0))")
                column = f" & (dv < {self.heads.v_dim})[None, :]" if self.dv != self.heads.v_dim else ""
                w.line(f"o = tl.load(part + cell[:, None].to(tl.int64) * {self.heads.v_dim} + dv[None, :], "
                       f"mask=(s < parts)[:, None]{column}, other=0)")
                w.line("y = tl.sum(o * weight[:, None], 0) / tl.sum(total * weight, 0)")
                w.line(f"out = (first + one // {self.heads.size}) * {self.ldo} "
                       f"+ (unit * {self.heads.size} + one % {self.heads.size}) * {self.heads.v_dim}")
                w.line(f"tl.store(p{len(self.body.inputs)} + out + dv, "
                       f"y{self._narrow(self.out_type)}{f', mask=dv < {self.heads.v_dim}' if column else ''})")
        sizes = self.scratch_sizes(config, rows)
        return self._text("_join", w, "d_tiles", (4, 1, self.heads.units * used), AttentionConfig(1, 1, 4, 1),
                          _offsets(sizes), rows, matrix=False)

    def scratch_sizes(self, config: AttentionConfig, rows: int) -> tuple[int, int, int]:
        """Bytes of partial results, of their maxima and of their sums, for the most tiles that a step can have."""
        starts = self.body.inputs[self.inputs[3]].type
        seqs = getattr(starts.shape[0], "bound", 1) if isinstance(starts, TensorType) else 1
        cells = seqs * self.heads.units * config.splits * rows
        return cells * self.heads.v_dim * 4, cells * 4, cells * 4

    def _text(self, suffix: str, w: Writer, tiles: str, grid: tuple[int, int, int], config: AttentionConfig,
              scratch: list[Scratch], rows: int, matrix: bool = True) -> KernelText:
        values = [*self.body.inputs, *self.body.outputs]
        parameters = [(f"p{i}", parameter_type(v)) for i, v in enumerate(values)]
        args: list[object] = list(range(len(values)))
        if suffix == "_join":  # neither queries nor state
            keep = [i for i in range(len(values)) if i not in self.inputs[:2] and i != self.inputs[4]]
            parameters, args = [parameters[i] for i in keep], [args[i] for i in keep]
        parameters += [(tiles, "*i32"), ("dims", "*i32")]
        parameters += list(zip(("part", "tops", "sums"), ["*fp32"] * 3)) if scratch else []
        options = {"num_warps": config.warps, "num_stages": config.stages, **dict(config.extra)}
        notes = {"rows": f"{rows}: tokens x {self.heads.size} heads", "keys": config.n}
        return KernelText(self.source.symbol + suffix, "attention", self.number, tuple(w.lines), tuple(parameters),
                          (*args, tiles, "dims", *scratch), grid, options, wide=self._wide(scratch),
                          notes=notes, expects_matrix=matrix)

    def _wide(self, scratch: list[Scratch]) -> frozenset[str]:
        made = wide_parameters([*self.body.inputs, *self.body.outputs], self.source.layouts)
        return made | {"part"} if scratch and scratch[1].offset >= 2**31 else made

    # -- parts of their bodies

    def _begin(self, w: Writer, dim: int, splits: int) -> None:
        w.line("pid = tl.program_id(0)")
        if splits > 1:
            w.line(f"split = pid % {splits}")
            w.line(f"pid = pid // {splits}")
        self._unit(w)
        w.line(f"count = tl.load(dims + {dim})")

    def _unit(self, w: Writer) -> None:
        """The tile and the heads of program `pid`."""
        w.line(f"tile = pid // {self.heads.units}")
        w.line(f"unit = pid % {self.heads.units}")
        split = self.heads.units // self.heads.kv
        w.line(f"kv_head = unit // {split}" if split > 1 else "kv_head = unit")

    def _tile(self, w: Writer, tiles: str) -> None:
        w.line(f"seq = tl.load({tiles} + tile * 3)")
        w.line(f"first = tl.load({tiles} + tile * 3 + 1)")
        w.line(f"tokens = tl.load({tiles} + tile * 3 + 2)")
        # A sequence's tokens are the last of its kv_lens.
        w.line(f"position = tl.load(p{self.inputs[3]} + seq) - tl.load(p{self.inputs[2]} + seq + 1) + first")

    def _rows(self, w: Writer) -> None:
        """Token, position and head of each row; rows beyond the tile's tokens repeat its last token."""
        size = self.heads.size
        w.line(f"mine = tl.minimum(r{f' // {size}' if size > 1 else ''}, tokens - 1)")
        w.line("q_pos = position + mine")
        if any("token" in self._attr(name).variables() for name in ("score", "visible", "first", "last")):
            w.line("token = first + mine")
        w.line(f"head = unit * {size} + r % {size}" if size > 1 else "head = unit + r * 0")

    def _queries(self, w: Writer, rows: int, tiles: str) -> None:
        self._tile(w, tiles)
        w.line(f"r = tl.arange(0, {rows})")
        self._rows(w)
        w.line(f"valid = r < tokens * {self.heads.size}")
        w.line(f"dk = tl.arange(0, {self.dk})")
        w.line(f"dv = tl.arange(0, {self.dv})")
        for i, (column, size, used, start) in enumerate(self.parts_of_key):
            mask = f", mask=({column} < {used})[None, :], other=0" if size != used else ""
            w.line(f"q{i or ''} = tl.load(p{self.inputs[0]} + ((first + mine) * {self.ldq} "
                   f"+ head * {self.heads.k_dim})[:, None] + {column}[None, :]{f' + {start}' if start else ''}{mask})")
        self._bounds(w)

    def _bounds(self, w: Writer) -> None:
        """The first and one past the last key that any row sees."""
        first = self._attr("first")
        if isinstance(first, scalar.Const):
            w.line(f"low = {max(int(first.value), 0)}")
        else:
            w.line(f"low = tl.maximum(tl.min({self._expr(w, first, {'q_pos': 'q_pos', 'token': 'token'}, ())}, 0), 0)")
        last = self._attr("last")
        if last == Q_POS:
            w.line("high = position + tokens")
        else:
            w.line(f"high = tl.max({self._expr(w, last, {'q_pos': 'q_pos', 'token': 'token'}, ())}, 0) + 1")
            w.line(f"high = tl.minimum(high, tl.load(p{self.inputs[3]} + seq))")

    def _parts(self, w: Writer, config: AttentionConfig) -> None:
        """How many parts the keys are in, and the tiles of each."""
        w.line(f"tiles = tl.cdiv(high, {config.n}) - low // {config.n}")
        w.line(f"each = tl.maximum(tl.cdiv(tiles, {config.splits}), {TILES_PER_SPLIT})")
        w.line("parts = tl.cdiv(tiles, each)")

    def _walk(self, w: Writer, rows: int, n: int, begin: str, end: str, split: bool) -> None:
        """The online softmax over keys `begin` to `end`."""
        w.line(f"ks = tl.arange(0, {n})")
        base = f"p{self.inputs[1]}"
        if self.sink >= 0:
            name = next(f"p{i}" for t, i, _ in self.tables if t == f"t{self.sink}")
            start = f"tl.load({name} + head).to(tl.float32) * {LOG2E}"
            if split:  # the first part has it
                w.line(f"top = tl.where(split == 0, {start}, {LOWEST})")
                w.line(f"total = tl.where(split == 0, 1.0, 0.0) + tl.zeros([{rows}], tl.float32)")
            else:
                w.line(f"top = {start}")
                w.line(f"total = tl.full([{rows}], 1.0, tl.float32)")
        else:
            w.line(f"top = tl.full([{rows}], {LOWEST}, tl.float32)")
            w.line(f"total = tl.zeros([{rows}], tl.float32)")
        w.line(f"acc = tl.zeros([{rows}, {self.dv}], tl.float32)")
        env = {"q_pos": "q_pos[:, None]", "k_pos": "k_pos[None, :]", "head": "head[:, None]", "score": "s",
               "token": "token[:, None]"}
        score, visible = self._attr("score"), self._attr("visible")
        # What does not depend on the key comes before the loop.
        for e in (score, visible):
            self._hoist(w, e, env)
        # A walk over keys that all rows see needs no mask, then comes the rest.
        plain = visible == CAUSAL and not split and self.chosen < 0
        if self.chosen >= 0:
            _, place, _ = self.tables[self.chosen]
            ld, count = self.choices
            w.line(f"nth = tl.arange(0, {next_power_of_2(count)})")
            w.line(f"choices = tl.load(p{place} + ((first + mine) * {ld} + kv_head * {count})[:, None] + nth[None, :], "
                   f"mask=(nth < {count})[None, :], other=-1)")
        if plain:
            w.line(f"whole = tl.maximum((position + 1) // {n} * {n}, {begin})")
            spans = [(begin, "whole", False), ("whole", end, True)]
        else:
            spans = [(begin, end, True)]
        for start, stop, masked in spans:
            with w.block(f"for at in range({start}, {stop}, {n}):"):
                if self.chosen < 0:
                    self._step(w, base, n, score, visible if masked else None, env, end)
                    continue
                w.line(f"named = tl.sum((choices == at // {self.state.block_tokens}).to(tl.int32), 1) > 0")
                with w.block("if tl.max(named.to(tl.int32), 0) > 0:"):
                    self._step(w, base, n, score, visible if masked else None, env, end)

    def _step(self, w: Writer, base: str, n: int, score: scalar.Expr, visible: scalar.Expr | None,
              env: dict[str, str], end: str) -> None:
        state, heads = self.state, self.heads
        tokens = state.block_tokens
        w.line("k_pos = at + ks")
        # Keys past the end lie in the last block or repeat the last key; no row sees them.
        last = "" if visible is None else "tl.minimum(k_pos, high - 1)"
        w.line(f"key = {last}" if last else "key = k_pos")
        w.line(f"block = tl.load(p{self.inputs[4]} + seq * {self.columns} + key // {tokens}).to(tl.int64) * {self.stride}")
        w.line(f"ka = block + (kv_head * {tokens * heads.k_dim} + key % {tokens} * {heads.k_dim})")
        precision = ', input_precision="ieee"' if self.dtype is DType.F32 else ""
        for i, (column, size, used, start) in enumerate(self.parts_of_key):
            mask = f", mask=({column} < {used})[None, :], other=0" if size != used else ""
            w.line(f"k{i or ''} = tl.load({base} + ka[:, None] + {column}[None, :]{f' + {start}' if start else ''}{mask})")
            w.line(f"s = tl.dot(q{i or ''}, k{i or ''}.T{', s' if i else ''}{precision})")
        scale = float(str(self.node.attrs["scale"]))
        if score == scalar.Var("score"):
            w.line(f"s = s * {repr_float(scale * LOG2E)}")
        else:
            w.line(f"s = s * {repr_float(scale)}")
            w.line(f"s = ({self._expr(w, score, env, ())}) * {repr_float(LOG2E)}")
        if visible is not None:
            seen = self._expr(w, visible, env, ())
            if end != "high":
                seen = f"({seen}) & (k_pos < {end})[None, :]"
            elif not _bounded(visible):
                seen = f"({seen}) & (k_pos < high)[None, :]"
            if self.chosen >= 0:
                seen = f"({seen}) & named[:, None]"
            w.line(f"s = tl.where({seen}, s, {LOWEST})")
        w.line("new = tl.maximum(top, tl.max(s, 1))")
        w.line("shrink = tl.exp2(top - new)")
        w.line("p = tl.exp2(s - new[:, None])")
        w.line("total = total * shrink + tl.sum(p, 1)")
        narrow = self._narrow(self.dtype)
        if state.latent:
            w.line(f"acc = tl.dot(p{narrow}, k{len(self.parts_of_key) - 1 or ''}, acc * shrink[:, None]{precision})")
            w.line("top = new")
            return
        start = heads.kv * tokens * heads.k_dim
        w.line(f"va = block + (kv_head * {tokens * heads.v_dim} + key % {tokens} * {heads.v_dim} + {start})")
        mask = f", mask=(dv < {heads.v_dim})[None, :], other=0" if self.dv != heads.v_dim else ""
        w.line(f"v = tl.load({base} + va[:, None] + dv[None, :]{mask})")
        w.line(f"acc = tl.dot(p{narrow}, v, acc * shrink[:, None]{precision})")
        w.line("top = new")

    def _finish(self, w: Writer) -> None:
        w.line("y = acc / total[:, None]")
        w.line(f"out = ((first + mine) * {self.ldo} + head * {self.heads.v_dim})[:, None] + dv[None, :]")
        w.line(f"tl.store(p{len(self.body.inputs)} + out, y{self._narrow(self.out_type)}, "
               f"mask={self._masked('valid[:, None]')})")

    def _masked(self, mask: str) -> str:
        return mask if self.dv == self.heads.v_dim else f"{mask} & (dv < {self.heads.v_dim})[None, :]"

    def _narrow(self, dtype: DType) -> str:
        return f".to({TL_TYPES[dtype]})" if dtype in (DType.F16, DType.BF16) else ""

    # -- scalar expressions

    def _attr(self, name: str) -> scalar.Expr:
        made = self.node.attrs[name]
        if not isinstance(made, scalar.Expr):
            raise TypeError(made)
        return made

    def _hoist(self, w: Writer, e: scalar.Expr, env: dict[str, str]) -> None:
        """Name the largest parts of `e` that are the same for all keys."""
        if isinstance(e, (scalar.Call, scalar.Load)):
            if not e.variables() & {"k_pos", "score"}:
                self._expr(w, e, env, ())
                return
            for part in e.parts:
                self._hoist(w, part, env)

    def _expr(self, w: Writer, e: scalar.Expr, env: dict[str, str], path: tuple[str, ...]) -> str:
        """Text of a scalar expression; mixed operands become float32, as NumPy would."""
        if isinstance(e, scalar.Const):
            return repr_float(e.value) if isinstance(e.value, float) else str(e.value)
        if isinstance(e, scalar.Var):
            return env[e.name]
        if isinstance(e, scalar.Load):
            name, value = next((f"p{i}", v) for t, i, v in self.tables if t == e.table)
            wide = ".to(tl.float32)" if value.type.dtype in (DType.F16, DType.BF16) else ""
            return w.name(f"tl.load({name} + {self._expr(w, e.index, env, path)}){wide}", "t")
        if not isinstance(e, scalar.Call) or e.function not in _FUNCTIONS:
            raise UnsupportedError(f"{self.node.loc}: the GPU target cannot lower {e} yet")
        args = [self._expr(w, a, env, path) for a in e.args]
        text = _FUNCTIONS[e.function].format(*args)
        # Scores change in every step of the loop, and so does what is made of them: only names of others are kept.
        return w.name(text, "e") if "score" not in e.variables() else f"({text})"


_FUNCTIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    # Positions are not negative, so that truncation is floor; differences of positions are not divided.
    "idiv": "{0} // {1}", "mod": "{0} % {1}", "min": "tl.minimum({0}, {1})", "max": "tl.maximum({0}, {1})",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "eq": "{0} == {1}", "and": "({0}) & ({1})", "or": "({0}) | ({1})",
    "not": "~({0})", "neg": "-{0}", "abs": "tl.abs({0})", "exp": "tl.exp({0})", "tanh": "tanh({0})",
    "select": "tl.where({0}, {1}, {2})",
}


def _bounded(e: scalar.Expr) -> bool:
    """Whether the expression says that a key is not after the query (as causal ones do)."""
    return e == CAUSAL or (isinstance(e, scalar.Call) and e.function == "and" and any(_bounded(a) for a in e.args))


def padded(size: int) -> int:
    """Bytes rounded up, so that what follows is aligned."""
    return -(-size // 256) * 256


def _offsets(sizes: tuple[int, ...]) -> list[Scratch]:
    return [Scratch(sum(padded(s) for s in sizes[:i])) for i in range(len(sizes))]


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
