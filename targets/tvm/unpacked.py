"""Micro-kernels over weights of few bits and float32 activations, whose sums are left in a panel.

Few rows unpack weights in registers and multiply them there. More rows work on a slice of k that is unpacked to the stack
once and stays in cache for all of them. Either way an output element is summed over k in order, in one accumulator lane,
from the same unpacked numbers, so a row's bits do not depend on its batch.

Integers with one scale a row are multiplied as they are, and their sum by the scale (`whole` is false). All others are
brought to the weight that they stand for first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.graph import Node
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, f32, number, scratch, splat, store, wide
from inferloom.targets.tvm.matmul import TILE, Blocks

Expr = Any
#: Steps of k that are unpacked to the stack together: 32 KiB. Groups divide it.
SLICE = 128
#: How many words of a column are prefetched ahead of the one that few rows multiply.
AHEAD = 16
SHIFT = {"int8": 128, "int4": 8}


class Unpacked(Blocks):
    """Where x, the packed weight, its scales and its offsets are among a kernel's arguments, and how it is stored."""

    pair, wide = 1, True
    x: int
    packed: int
    scales: int
    offsets: int | None

    def stored(self, node: Node, rows: int) -> None:
        """The weight's form, from the attributes of its op; `rows` are those of its scales."""
        self.k, self.group = int(str(node.attrs["k"])), int(str(node.attrs["group"]))
        self.format, self.weight_rows = str(node.attrs["format"]), rows
        self.per_word = 8 if self.format == "int4" else 4
        self.whole = self.group > 0 or self.offsets is not None

    @property
    def few(self) -> int:
        """Rows that are multiplied by weights in registers: unpacking takes two vectors of them, or four registers."""
        return max(1, self.isa.rows - 2)

    def multiply(self, views: list[Expr], panel: Expr, weights: Expr, tile: Expr, place: Callable[[Expr, int], list[Expr]],
                 here: Expr) -> None:
        """Sums of `here` rows; `place(row, count)` says where rows of x begin. `tile` is counted over all of the weight."""
        unpacked = scratch(SLICE * TILE)
        for count in range(1, self.few + 1):
            with T.If(T.EQ(here, count)):
                with T.Then():
                    self._in_registers(views, panel, weights, tile, place(T.int32(0), count))
        with T.If(here > self.few):
            with T.Then():
                self._in_slices(views, panel, unpacked, weights, tile, place, here)

    # -- many rows

    def _in_slices(self, views: list[Expr], panel: Expr, unpacked: Expr, weights: Expr, tile: Expr,
                   place: Callable[[Expr, int], list[Expr]], here: Expr) -> None:
        with T.serial(0, here * (TILE // LANES)) as i:
            store(panel, number(0.0, LANES), i * LANES, LANES)

        def multiply(begin: Expr, steps: int) -> None:
            self._unpack(views, unpacked, weights, tile, begin, steps)
            self._blocks(views[self.x], unpacked, panel, T.int32(0), lambda row, count: [
                bind(start + begin) for start in place(row, count)], here, T.int32(0), T.int32(steps))

        with T.serial(0, self.k // SLICE) as s:
            multiply(bind(s * SLICE), SLICE)
        if self.k % SLICE:
            multiply(T.int32(self.k // SLICE * SLICE), self.k % SLICE)

    def _unpack(self, views: list[Expr], unpacked: Expr, weights: Expr, tile: Expr, begin: Expr, steps: int) -> None:
        """The tile's weights for `steps` steps from `begin` on, as float32 [steps, TILE]."""
        run = self.group or max(self.per_word, steps // self.per_word * self.per_word)

        def words(start: Expr, count: int) -> None:
            with T.serial(0, TILE // LANES) as v:
                column = bind(v * LANES)
                about = self._about(views, tile, bind((begin + start) // self.group) if self.group else T.int32(0), column)

                def word(i: Expr, size: int) -> None:
                    at = bind(weights + wide((bind((begin + start) // self.per_word) + i) * TILE + column))
                    raw = bind(views[self.packed][T.ramp(at, 1, LANES)])
                    for j, w in enumerate(self._numbers(raw, about, size)):
                        store(unpacked, w, (start + i * self.per_word + j) * TILE + column, LANES)

                with T.serial(0, count // self.per_word) as i:
                    word(i, self.per_word)
                if count % self.per_word:
                    word(T.int32(count // self.per_word), count % self.per_word)

        if self.group:
            with T.serial(0, steps // run) as g:
                words(bind(g * run), run)
        else:
            words(T.int32(0), steps)

    # -- few rows

    def _in_registers(self, views: list[Expr], panel: Expr, weights: Expr, tile: Expr, rows: list[Expr]) -> None:
        """All of k for the rows of x that begin at `rows`, whose sums stay in registers."""
        count, width = len(rows), 1
        while width < TILE // LANES and 2 * width * count <= self.few * self.isa.vectors:
            width *= 2
        acc = scratch(count * width * LANES)
        x, w = views[self.x], views[self.packed]

        def cell(m: int, v: int) -> Expr:
            return T.ramp((m * width + v) * LANES, 1, LANES)

        with T.serial(0, TILE // LANES // width) as part:
            column = bind(part * (width * LANES))
            for m in range(count):
                for v in range(width):
                    T.buffer_store(acc, number(0.0, LANES), [cell(m, v)])

            def words(group: Expr, begin: Expr, steps: int) -> None:
                about = [self._about(views, tile, group, bind(column + v * LANES)) for v in range(width)]

                def word(i: Expr, size: int) -> None:
                    at = bind(weights + wide(i * TILE + column))
                    for v in range(width):
                        ahead = w[at + (AHEAD * TILE + v * LANES)]
                        T.evaluate(T.call_extern("void", "inferloom_prefetch", T.address_of(ahead)))
                    raws = [bind(w[T.ramp(at + v * LANES, 1, LANES)]) for v in range(width)]
                    made = [self._numbers(raw, about[v], size) for v, raw in enumerate(raws)]
                    for j in range(size):
                        for m in range(count):
                            xv = bind(splat(x[rows[m] + i * self.per_word + j], LANES))
                            for v in range(width):
                                T.buffer_store(acc, vmath.fma(xv, made[v][j], acc[cell(m, v)], LANES), [cell(m, v)])

                with T.serial(0, steps // self.per_word) as i:
                    word(bind(begin + i), self.per_word)
                if steps % self.per_word:
                    word(bind(begin + steps // self.per_word), steps % self.per_word)

            if self.group:
                with T.serial(0, self.k // self.group) as g:
                    words(g, bind(g * (self.group // self.per_word)), self.group)
            else:
                words(T.int32(0), T.int32(0), self.k)
            for m in range(count):
                for v in range(width):
                    T.buffer_store(panel, acc[cell(m, v)], [T.ramp(m * TILE + column + v * LANES, 1, LANES)])

    # -- numbers

    def _about(self, views: list[Expr], tile: Expr, group: Expr, column: Expr) -> tuple[Expr, ...]:
        """Scale and start of 16 columns of the tile, `weight = number * scale + start`; nothing where the epilogue scales."""
        if not self.whole:
            return ()
        scale, offset = (None if i is None else self._column(views[i], tile, group, column) for i in (self.scales, self.offsets))
        shift = SHIFT.get(self.format, 0)
        if not shift:
            return (scale,)
        down = scale * number(-float(shift), LANES)
        return scale, bind(down if offset is None else down + offset)

    def _column(self, view: Expr, tile: Expr, group: Expr, column: Expr) -> Expr:
        if self.group:
            place = bind(wide(tile) * (self.k // self.group * TILE) + wide(group * TILE + column))
            return bind(vmath.f16_to_f32(view[T.ramp(place, 1, LANES)], LANES))
        # Scales of rows are as many as the weight has, which the last tile may exceed.
        last = splat(T.int32(self.weight_rows - 1), LANES)
        at = bind(T.min(T.ramp(tile * TILE + column, 1, LANES), last))
        return bind(view[at])

    def _numbers(self, raw: Expr, about: tuple[Expr, ...], count: int) -> list[Expr]:
        """The first `count` weights of the words of 16 columns."""
        def word(value: int) -> Expr:
            return splat(T.int32(value), LANES)

        made = []
        if self.format == "fp8" or not self.whole:
            # Signed: each value is brought to the top, and its sign comes down with it.
            if self.format == "int8":
                raw = bind(T.bitwise_xor(raw, word(-0x7F7F7F80)))
            elif self.format == "int4":
                raw = bind(T.bitwise_xor(raw, word(-0x77777778)))
            for j in range(count):
                up = 24 - 8 * (j % 4) + (4 - 4 * (j // 4) if self.format == "int4" else 0)
                top = T.shift_left(raw, word(up)) if up else raw
                if self.format == "fp8":
                    # Sign, and 4 bits of exponent above 3 of mantissa, where a float32 has its own; smaller by 2^120.
                    bits = T.bitwise_and(T.shift_right(top, word(4)), word(-0x78100000))
                    value = bind(T.reinterpret(f32(LANES), bits) * number(2.0**120, LANES))
                    made.append(bind(value * about[0]) if about else value)
                else:
                    made.append(bind(T.cast(T.shift_right(top, word(24 if self.format == "int8" else 28)), f32(LANES))))
            return made
        mask = 15 if self.format == "int4" else 255
        for j in range(count):
            down = 8 * (j % 4) + 4 * (j // 4)
            bits = T.bitwise_and(T.shift_right(raw, word(down)) if down else raw, word(mask))
            made.append(bind(vmath.fma(T.cast(bits, f32(LANES)), about[0], about[1], LANES)))
        return made
