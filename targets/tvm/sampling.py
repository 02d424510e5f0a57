"""What sampling needs of the logits, found while they are in cache: each row's largest, and the sum of its exponentials.

A row is cut into a few parts. A chunk of the first kernel keeps the largest of a part in a short sorted list; what cannot
be among them is not even compared with it, since the largest of many sets of logits say how large one must be. The second
kernel joins the lists of a row. A logit and its token's id are one 64-bit key that sorts as the logit does, lower ids
first. Exponentials are added up run by run, so that a draw from all tokens looks at one run: see `Top` in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.targets.base import OUTPUT, Grid, KernelInfo, Logits, Scratch, Sums, Top
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, kernel, lane_of, number, scratch, splat, store, wide
from inferloom.targets.tvm.rowvalue import tree

Expr = Any
TOP = 64
#: Logits that are looked at together.
GROUP = 128
#: Parts of a row: enough for as many threads, and few lists to begin.
PARTS = 8
#: Runs of a part. Each has a sum, and makes a set of every lane.
RUNS = 16
#: Halvings of the range in which the least of the largest is sought: what is left costs less than another.
HALVINGS = 20
ROWS = 2
#: Times the least difference of two logits, this leaves nothing of the lower one's exponential; times none, one.
SHARPEST = T.float32(1e30)
#: The largest of a part that has none but minus infinities: no less, so that differences are numbers.
LEAST = T.float32(-3.4028234e38)
#: A step's kernels after its last source.
AFTER = -1
#: The key of minus infinity and no token.
_NOTHING = -0x7F80000100000000


class Sampling:
    """The two kernels for `logits`: their `functions` by symbol, their `infos`, the bytes of `scratch` memory they need."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.run = -(-logits.vocab // (PARTS * RUNS * LANES)) * LANES
        self.columns = RUNS * self.run
        self.parts = -(-logits.vocab // self.columns)
        sizes = {"top_keys": TOP * 8, "top_stats": 8, "sums": self.parts * RUNS * 4, "keys": self.parts * TOP * 8,
                 "stats": self.parts * 8}
        offsets, self.scratch = {}, 0
        for name, size in sizes.items():
            offsets[name] = self.scratch
            self.scratch += -(-logits.rows * size // 64) * 64
        self.top = Top(TOP, offsets["top_keys"], offsets["top_stats"], Sums(offsets["sums"], self.parts * RUNS, self.run))
        types = {"keys": "int64", "stats": "float32", "sums": "float32", "top_keys": "int64", "top_stats": "float32"}
        self.functions, self.infos = {}, []
        for symbol, emit, inputs, names, mult in (
                ("sample_parts", self._part, {OUTPUT: "float32", "sharpness": "float32"}, ("keys", "stats", "sums"),
                 self.parts),
                ("sample_rows", self._row, {"sharpness": "float32"}, ("keys", "stats", "sums", "top_keys", "top_stats"),
                 1)):
            signature: list[tuple[int | str, str]] = [*inputs.items(), *((name, types[name]) for name in names)]
            self.functions[symbol] = kernel(symbol, signature, emit)
            args: tuple[int | str | Scratch, ...] = (*inputs, *(Scratch(offsets[name]) for name in names))
            self.infos.append(KernelInfo(symbol, "sampling", AFTER, Grid(ROWS, 1, mult), args))

    def _part(self, views: list[Expr], dims: Expr, chunk: Expr) -> None:
        """The list of a part of a row, its largest logit, what all but minus infinities add up to, and the runs' sums."""
        logits, sharpness, keys, stats, sums = views
        row, begin = bind(chunk // self.parts), bind(chunk % self.parts * self.columns)
        count = bind(T.min(T.int32(self.columns), T.int32(self.logits.vocab) - begin))
        base = bind(wide(row) * self.logits.ld + wide(begin))
        peaks, plain, found = scratch(LANES), scratch(LANES), _List()
        for buffer, start in ((peaks, float("-inf")), (plain, 0.0)):
            store(buffer, number(start, LANES), T.int32(0), LANES)

        def read(i: Expr, lanes: int) -> Expr:
            return bind(logits[lane_of(base + wide(i), lanes)])

        def watch(x: Expr, lanes: int) -> None:
            at = lane_of(T.int32(0), lanes)
            T.buffer_store(peaks, T.max(peaks[at], x), [at])
            nothing = T.EQ(x, number(float("-inf"), lanes))
            T.buffer_store(plain, plain[at] + T.Select(nothing, number(0.0, lanes), x), [at])

        def each(run: Expr, body: Callable[[Expr, int], None]) -> None:
            """`body(i, lanes)` over what there is of a run."""
            first = bind(run * self.run)
            here = bind(T.max(T.int32(0), T.min(T.int32(self.run), count - first)))
            with T.serial(0, here // LANES) as v:
                body(first + v * LANES, LANES)
            with T.serial(here // LANES * LANES, here) as i:
                body(first + i, 1)

        sets = scratch(RUNS * LANES)
        with T.serial(0, RUNS) as run:
            at = run * LANES
            store(sets, number(float("-inf"), LANES), at, LANES)

            def look(i: Expr, lanes: int) -> None:
                x, place = read(i, lanes), lane_of(at, lanes)
                watch(x, lanes)
                T.buffer_store(sets, T.max(sets[place], x), [place])

            each(run, look)
        peak = bind(T.max(LEAST, tree([peaks[i] for i in range(LANES)], T.max)))
        found.exclude(sets, peak)

        groups = bind(count // GROUP)
        with T.serial(0, groups) as g:
            best = scratch(LANES)
            store(best, tree([read(g * GROUP + v * LANES, LANES) for v in range(GROUP // LANES)], T.max), T.int32(0), LANES)
            with T.If(tree([best[i] for i in range(LANES)], T.max) > found.floor[0]):
                with T.Then():
                    with T.serial(0, GROUP) as i:
                        self._offer(found, read(g * GROUP + i, 1), begin + g * GROUP + i)
        with T.serial(groups * GROUP, count) as i:
            self._offer(found, read(i, 1), begin + i)

        sharp, total = bind(T.min(sharpness[row], SHARPEST)), scratch(LANES)
        with T.serial(0, RUNS) as run:
            store(total, number(0.0, LANES), T.int32(0), LANES)

            def add(i: Expr, lanes: int) -> None:
                at = lane_of(T.int32(0), lanes)
                power = (read(i, lanes) - splat(peak, lanes)) * splat(sharp, lanes)
                T.buffer_store(total, total[at] + vmath.exp(power, lanes), [at])

            each(run, add)
            store(sums, _added(total), chunk * RUNS + run, 1)
        found.save(keys, chunk * TOP)
        store(stats, peak, chunk * 2, 1)
        store(stats, _added(plain), chunk * 2 + 1, 1)

    def _offer(self, found: _List, x: Expr, id: Expr) -> None:
        with T.If(x > found.floor[0]):
            with T.Then():
                found.insert(key(x, id))

    def _row(self, views: list[Expr], dims: Expr, row: Expr) -> None:
        """A row's list, its largest logit, and the sums of its runs: as if of one part. NaN if a logit is NaN or infinity."""
        sharpness, keys, stats, sums, top_keys, top_stats = views
        found, first, sharp = _List(), bind(row * self.parts), bind(T.min(sharpness[row], SHARPEST))
        with T.serial(0, self.parts * TOP) as i:
            offered = bind(keys[first * TOP + i])
            with T.If(offered > found.keys[TOP - 1]):
                with T.Then():
                    found.insert(offered)
        found.save(top_keys, row * TOP)
        peak = bind(tree([stats[(first + p) * 2] for p in range(self.parts)], T.max))
        plain = bind(tree([stats[(first + p) * 2 + 1] for p in range(self.parts)], lambda a, b: a + b))
        total = scratch(1)
        T.buffer_store(total, T.float32(0), [0])
        with T.serial(0, self.parts) as p:
            part = bind(first + p)
            factor = vmath.exp((stats[part * 2] - peak) * sharp, 1)
            with T.serial(0, RUNS) as run:
                made = bind(sums[part * RUNS + run] * factor)
                store(sums, made, part * RUNS + run, 1)
                T.buffer_store(total, total[0] + made, [0])
        finite = vmath.absolute(plain, 1) <= T.float32(3.4028234e38)
        store(top_stats, peak * sharp, row * 2, 1)
        store(top_stats, T.Select(finite, total[0], T.reinterpret("float32", T.int32(0x7FC00000))), row * 2 + 1, 1)


def _added(lanes: Expr) -> Expr:
    return tree([lanes[i] for i in range(LANES)], lambda a, b: a + b)


def key(x: Expr, id: Expr) -> Expr:
    """A logit and a token's id as one number; the two zeros are one."""
    bits = T.reinterpret("int32", T.Select(T.EQ(x, T.float32(0)), T.float32(0), x))
    return bind(T.shift_left(wide(ordered(bits)), T.int64(32)) + wide(T.int32(0x7FFFFFFF) - id))


def ordered(bits: Expr) -> Expr:
    """The bits of a float as an integer that sorts as it does; and back."""
    bits = bind(bits)
    return bind(T.Select(bits < 0, T.bitwise_xor(bits, T.int32(0x7FFFFFFF)), bits))


class _List:
    """The `TOP` largest keys so far, sorted; `floor`: what a logit must exceed to become one of them."""

    def __init__(self) -> None:
        # One more in front, larger than all, whose place a whole vector may be read from.
        self._keys = scratch(TOP + LANES, "int64")
        self.keys = _From(self._keys, LANES)
        self.floor = scratch(1)
        T.buffer_store(self._keys, splat(T.int64(0x7FFFFFFFFFFFFFFF), LANES), [lane_of(T.int32(0), LANES)])
        with T.serial(1, TOP // LANES + 1) as v:
            T.buffer_store(self._keys, splat(T.int64(_NOTHING), LANES), [lane_of(v * LANES, LANES)])
        T.buffer_store(self.floor, T.float32(float("-inf")), [0])

    def exclude(self, sets: Expr, peak: Expr) -> None:
        """Raise the floor as far as the largest of `TOP` sets at least are above it; `peak` is the largest of all."""
        low, high, above = scratch(1, "int32"), scratch(1, "int32"), scratch(LANES)
        T.buffer_store(low, ordered(T.reinterpret("int32", T.float32(float("-inf")))), [0])
        T.buffer_store(high, ordered(T.reinterpret("int32", peak)), [0])
        with T.serial(0, HALVINGS):
            middle = bind(T.shift_right(low[0], T.int32(1)) + T.shift_right(high[0], T.int32(1)))
            floor = bind(splat(T.reinterpret("float32", ordered(middle)), LANES))
            store(above, number(0.0, LANES), T.int32(0), LANES)
            at = lane_of(T.int32(0), LANES)
            with T.serial(0, RUNS) as run:
                more = sets[lane_of(run * LANES, LANES)] > floor
                T.buffer_store(above, above[at] + T.Select(more, number(1.0, LANES), number(0.0, LANES)), [at])
            enough = bind(T.cast(tree([above[i] for i in range(LANES)], lambda a, b: a + b) >= T.float32(TOP), "int32"))
            T.buffer_store(low, T.Select(enough > 0, middle, low[0]), [0])
            T.buffer_store(high, T.Select(enough > 0, high[0], middle), [0])
        T.buffer_store(self.floor, T.reinterpret("float32", ordered(low[0])), [0])

    def insert(self, new: Expr) -> None:
        """Put a key, larger than the last, where it belongs: each place keeps its own, or takes the lower of the new one
        and its neighbour's. From the end, since each reads the one before it."""
        wide_new = bind(splat(new, LANES))
        for v in reversed(range(TOP // LANES)):
            at = LANES + v * LANES
            own, before = (bind(self._keys[lane_of(T.int32(i), LANES)]) for i in (at, at - 1))
            T.buffer_store(self._keys, T.max(own, T.min(before, wide_new)), [lane_of(T.int32(at), LANES)])
        last = T.reinterpret("float32", ordered(T.cast(T.shift_right(self.keys[TOP - 1], T.int64(32)), "int32")))
        T.buffer_store(self.floor, T.max(self.floor[0], last), [0])

    def save(self, to: Expr, at: Expr) -> None:
        with T.serial(0, TOP) as i:
            T.buffer_store(to, self.keys[i], [at + i])


class _From:
    """A buffer from some element on."""

    def __init__(self, buffer: Expr, start: int) -> None:
        self._buffer, self._start = buffer, start

    def __getitem__(self, i: Expr) -> Expr:
        return self._buffer[i + self._start]
