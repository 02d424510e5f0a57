"""Recurrent layers: a chunk is one sequence's part of the state (a head, or a vector of channels), token after token.

The state's block is read once, lives in the block that is written (or in registers' reach of it, the cache) while the
tokens go by, and is left there. Tokens are worked on one after the other in the order of the sequence, so that a
sequence's bits do not depend on how it was cut into steps, nor on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Value
from inferloom.ir.types import DType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.recurrence import Recurrence
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import (
    LANES,
    STORAGE,
    bind,
    kernel,
    lane_of,
    number,
    scratch,
    splat,
    store,
    vectors,
    wide,
)

Expr = Any
SEQS = 1


def lower(source: KernelSource) -> tuple[Any, Grid, tuple[int | str, ...]]:
    """The PrimFunc of a "scan" kernel, its grid, and its arguments as operand-then-result numbers."""
    made = _Scan(source)
    return (kernel(source.symbol, made.signature, made.emit), Grid(SEQS, 1, made.parts), tuple(a for a, _ in made.signature))


class _Scan(Recurrence):
    def __init__(self, source: KernelSource) -> None:
        super().__init__(source)
        self.signature: list[tuple[int | str, str]] = [(i, STORAGE[str(v.type.dtype)]) for i, v in (  # type: ignore[union-attr]
            *enumerate(self.inputs), (self.result, self.out))]
        self.shapes = [_shape(v) for v in self.node.operands]
        self.body: Callable[..., None]
        if self.op == "linear_attention":
            self.parts, self.body = self.shapes[6][1], self._linear_attention
        else:
            channels = self.shapes[4][1]
            self.lanes = vectors(channels)
            self.parts = channels // self.lanes
            bodies = {"causal_conv1d": self._conv, "selective_scan": self._selective, "linear_recurrence": self._linear,
                      "wkv": self._wkv}
            if self.op not in bodies:
                raise UnsupportedError(f"{self.node.loc}: the CPU target cannot lower {self.op} yet")
            self.body = bodies[self.op]

    def emit(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        views = [*views[:len(self.inputs)], views[-1]]
        state, starts, lens, pages = (views[self.place(i)] for i in range(4))
        seq, part = bind(chunk // self.parts), bind(chunk % self.parts)
        begin, end = bind(starts[seq]), bind(starts[seq + 1])
        past = bind(lens[seq] - (end - begin))
        read, write = (bind(wide(pages[seq * 2 + i]) * self.stride) for i in range(2))
        self.body(views, state, part, begin, end, past, read, write)

    # -- operands

    def _row(self, views: list[Expr], operand: int, row: Expr, column: Expr, lanes: int) -> Expr:
        """Elements of an operand's row, as float32."""
        place = self.place(operand)
        raw = views[place][lane_of(row * self.layouts[place].ld + column, lanes)]
        narrow = self.inputs[place].type.dtype is DType.BF16  # type: ignore[union-attr]
        return bind(vmath.bf16_to_f32(raw, lanes) if narrow else raw)

    def _fixed(self, views: list[Expr], operand: int, index: Expr, lanes: int) -> Expr:
        place = self.place(operand)
        raw = views[place][lane_of(index, lanes)]
        return bind(vmath.bf16_to_f32(raw, lanes) if self.inputs[place].type.dtype is DType.BF16 else raw)  # type: ignore[union-attr]

    def _put(self, views: list[Expr], row: Expr, column: Expr, value: Expr, lanes: int) -> None:
        store(views[-1], value, row * self.layouts[self.result].ld + column, lanes)

    def _load_state(self, state: Expr, past: Expr, read: Expr, write: Expr, first: Expr, rows: int, step: int,
                    width: int) -> None:
        """Bring `rows` rows of `width` elements, `step` apart, into the block that is written."""
        lanes = vectors(width, step)
        with T.serial(0, rows) as r:
            with T.serial(0, width // lanes) as v:
                at = first + r * step + v * lanes
                with T.If(past > 0):
                    with T.Then():
                        store(state, state[lane_of(read + wide(at), lanes)], write + wide(at), lanes)
                    with T.Else():
                        store(state, number(0.0, lanes), write + wide(at), lanes)

    # -- the recurrences

    def _linear_attention(self, views: list[Expr], state: Expr, head: Expr, begin: Expr, end: Expr, past: Expr, read: Expr,
                          write: Expr) -> None:
        (_, groups, dk), (_, heads, dv) = self.shapes[4], self.shapes[6]
        by_row, delta = len(self.shapes[7]) == 3, bool(self.node.attrs["delta"])
        lanes = vectors(dv)
        own = bind(head * (dk * dv))
        self._load_state(state, past, read, write, own, dk, dv, dv)
        base = bind(write + wide(own))
        group = bind(head * groups // heads)
        u, out = scratch(max(dv, LANES)), scratch(max(dv, LANES))
        with T.serial(begin, end) as t:
            kept = None if by_row else bind(vmath.exp(self._row(views, 7, t, head, 1), 1))

            def decayed(i: Expr) -> Expr:
                return kept if kept is not None else bind(vmath.exp(self._row(views, 7, t, head * dk + i, 1), 1))

            def columns(body: Callable[[Expr], None]) -> None:
                with T.serial(0, dv // lanes) as v:
                    body(bind(v * lanes))

            columns(lambda j: store(u, number(0.0, lanes), j, lanes))
            columns(lambda j: store(out, number(0.0, lanes), j, lanes))
            if delta:  # what the decayed state holds of this key
                with T.serial(0, dk) as i:
                    k = bind(self._row(views, 5, t, group * dk + i, 1) * decayed(i))
                    columns(lambda j: store(u, vmath.fma(splat(k, lanes), state[lane_of(base + wide(i * dv + j), lanes)],
                                                         u[lane_of(j, lanes)], lanes), j, lanes))
            beta = self._row(views, 8, t, head, 1) if self.given(8) else None

            def update(j: Expr) -> None:
                made = self._row(views, 6, t, head * dv + j, lanes)
                made = made - u[lane_of(j, lanes)] if delta else made
                store(u, made if beta is None else made * splat(beta, lanes), j, lanes)

            columns(update)
            with T.serial(0, dk) as i:
                e = decayed(i)
                k, q = (self._row(views, operand, t, group * dk + i, 1) for operand in (5, 4))

                def step(j: Expr) -> None:
                    place = base + wide(i * dv + j)
                    s = bind(state[lane_of(place, lanes)] * splat(e, lanes))
                    s = bind(vmath.fma(splat(k, lanes), u[lane_of(j, lanes)], s, lanes))
                    store(state, s, place, lanes)
                    store(out, vmath.fma(splat(q, lanes), s, out[lane_of(j, lanes)], lanes), j, lanes)

                columns(step)
            columns(lambda j: self._put(views, t, head * dv + j, out[lane_of(j, lanes)], lanes))

    def _selective(self, views: list[Expr], state: Expr, part: Expr, begin: Expr, end: Expr, past: Expr, read: Expr,
                   write: Expr) -> None:
        n, channels = self.shapes[6]
        lanes = self.lanes
        first = bind(part * lanes)
        self._load_state(state, past, read, write, first, n, channels, lanes)
        total = scratch(LANES)
        with T.serial(begin, end) as t:
            x, dt = self._row(views, 4, t, first, lanes), self._row(views, 5, t, first, lanes)
            dx = bind(dt * x)
            store(total, number(0.0, lanes), 0, lanes)
            with T.serial(0, n) as i:
                b, c = (splat(self._row(views, operand, t, i, 1), lanes) for operand in (7, 8))
                place = bind(write + wide(i * channels + first))
                kept = vmath.exp(bind(dt * self._fixed(views, 6, i * channels + first, lanes)), lanes)
                h = bind(kept * state[lane_of(place, lanes)] + dx * b)
                store(state, h, place, lanes)
                store(total, vmath.fma(h, c, total[lane_of(0, lanes)], lanes), 0, lanes)
            self._put(views, t, first, total[lane_of(0, lanes)], lanes)

    def _linear(self, views: list[Expr], state: Expr, part: Expr, begin: Expr, end: Expr, past: Expr, read: Expr,
                write: Expr) -> None:
        lanes = self.lanes
        first = bind(part * lanes)
        self._load_state(state, past, read, write, first, 1, lanes, lanes)
        place = bind(write + wide(first))
        with T.serial(begin, end) as t:
            h = bind(self._row(views, 5, t, first, lanes) * state[lane_of(place, lanes)] + self._row(views, 4, t, first, lanes))
            store(state, h, place, lanes)
            self._put(views, t, first, h, lanes)

    def _wkv(self, views: list[Expr], state: Expr, part: Expr, begin: Expr, end: Expr, past: Expr, read: Expr,
             write: Expr) -> None:
        (channels,), lanes = self.shapes[6], self.lanes
        first = bind(part * lanes)
        self._load_state(state, past, read, write, first, 3, channels, lanes)
        places = [bind(write + wide(first + i * channels)) for i in range(3)]
        decay, bonus = self._fixed(views, 6, first, lanes), self._fixed(views, 7, first, lanes)
        with T.serial(begin, end) as t:
            k, v = self._row(views, 4, t, first, lanes), self._row(views, 5, t, first, lanes)
            total, weight, top = (bind(state[lane_of(place, lanes)]) for place in places)
            top = bind(T.Select(weight > number(0.0, lanes), top, number(-1e38, lanes)))

            def joined(top: Expr, own: Expr) -> tuple[Expr, Expr, Expr]:
                high = bind(T.max(top, own))
                old, new = vmath.exp(bind(top - high), lanes), vmath.exp(bind(own - high), lanes)
                return bind(old * total + new * v), bind(old * weight + new), high

            over, under, _ = joined(top, bind(k + bonus))
            self._put(views, t, first, over / under, lanes)
            for place, x in zip(places, joined(bind(top + decay), k)):
                store(state, x, place, lanes)

    def _conv(self, views: list[Expr], state: Expr, part: Expr, begin: Expr, end: Expr, past: Expr, read: Expr,
              write: Expr) -> None:
        width, channels = self.shapes[5]
        lanes = self.lanes
        first = bind(part * lanes)
        self._load_state(state, past, read, write, first, width - 1, channels, lanes)
        with T.serial(begin, end) as t:
            y = self._fixed(views, 6, first, lanes) if self.given(6) else number(0.0, lanes)
            x = self._row(views, 4, t, first, lanes)
            for i in range(width - 1):
                place = write + wide(i * channels + first)
                old = bind(state[lane_of(place, lanes)])
                y = bind(vmath.fma(old, self._fixed(views, 5, i * channels + first, lanes), y, lanes))
                if i:  # the window moves on by one token
                    store(state, old, place - wide(channels), lanes)
            store(state, x, write + wide((width - 2) * channels + first), lanes)
            newest = self._fixed(views, 5, (width - 1) * channels + first, lanes)
            self._put(views, t, first, vmath.fma(x, newest, y, lanes), lanes)


def _shape(value: Value | None) -> tuple[int, ...]:
    """A shape, -1 for the tokens (or what else is symbolic)."""
    shape = value.type.shape if value is not None and isinstance(value.type, TensorType) else ()
    return tuple(d if isinstance(d, int) else -1 for d in shape)
