"""Attention over a cache of 8-bit integers, in integers: queries and probabilities become integers of 16 bits.

A tile is widened to pairs of 16-bit integers once for all rows of a chunk. A key's pairs are an element of the first half
of the head and one of the second; a value's are those of two keys, 16 apart. Sums of products are exact in int32 and
become floats once a tile. The step between a row's integers is its own (of probabilities, with the scales of values in
them, its own in the tile), so that its bits depend on nothing else. Steps are 256 times finer than the cache's.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.types import DType, StateType
from inferloom.targets.tvm import attention_tiles, vmath
from inferloom.targets.tvm.attention_tiles import KeyTiles
from inferloom.targets.tvm.emit import LANES, bind, f32, lane_of, number, scratch, splat, store, vectors, wide
from inferloom.targets.tvm.isa import PAIR_DOTS, CpuIsa
from inferloom.targets.tvm.kvlayout import KEYS
from inferloom.targets.tvm.pairs import pair_products
from inferloom.targets.tvm.rowvalue import tree

Expr = Any
#: The largest integer that a query or a probability becomes.
MOST = 32767
#: Elements of a head whose products stay in int32 when they are summed.
WIDEST = 2**31 // (MOST * 128)
#: What is less is taken as 0: its inverse must be finite.
LEAST = 1e-30

_WORDS = f"int32x{LANES}"
_WIDEN = """
define linkonce_odr hidden <16 x i32> @inferloom_widen_pairs(<16 x i8> %a, <16 x i8> %b) alwaysinline nounwind {
  %l = shufflevector <16 x i8> %a, <16 x i8> %b, <16 x i32> <LOW>
  %h = shufflevector <16 x i8> %a, <16 x i8> %b, <16 x i32> <HIGH>
  %x = sext <16 x i8> %l to <16 x i16>
  %y = sext <16 x i8> %h to <16 x i16>
  %z = shufflevector <16 x i16> %x, <16 x i16> %y, <32 x i32> <ALL>
  %r = bitcast <32 x i16> %z to <16 x i32>
  ret <16 x i32> %r
}
"""


def _integers(isa: CpuIsa) -> bool:
    return isa.i8_dot in (*PAIR_DOTS, "vnni")


def llvm(isa: CpuIsa) -> str:
    """LLVM IR with the functions that attention calls."""
    text = attention_tiles.llvm(isa)
    if isa.i8_dot == "vnni":  # which has these, too
        text += pair_products(16, "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pmaddubs.w.512")
    if _integers(isa):
        pairs = [", ".join(f"i32 {i}, i32 {16 + i}" for i in part) for part in (range(8), range(8, 16))]
        every = ", ".join(f"i32 {i}" for i in range(32))
        text += _WIDEN.replace("LOW", pairs[0]).replace("HIGH", pairs[1]).replace("ALL", every)
    return text


def key_tiles(state: StateType, query: DType, isa: CpuIsa, loc: str, by_block: bool) -> KeyTiles:
    """The tiles for a cache: in integers where the chip multiplies pairs of them and sizes allow it."""
    tiles = KeyTiles(state, query, isa, loc, by_block)
    whole = state.k_dim % 2 == 0 and state.v_dim % LANES == 0 and tiles.subs % 2 == 0
    if state.dtype is DType.I8 and not state.latent and _integers(isa) and whole and state.k_dim <= WIDEST:
        return IntegerTiles(state, query, isa, loc, by_block)
    return tiles


class IntegerTiles(KeyTiles):
    """Tiles of 8-bit integers that are multiplied as such."""

    def __init__(self, state: StateType, query: DType, isa: CpuIsa, loc: str, by_block: bool) -> None:
        super().__init__(state, query, isa, loc, by_block)
        self.held, self.words = "int32", state.k_dim // 2
        #: Words of a row's probabilities.
        self.ld = self.subs * KEYS // 2

    @property
    def direct(self) -> bool:
        return False

    def bind(self, views: list[Expr]) -> None:
        super().bind(views)
        self.keys = scratch(self.subs * KEYS * self.words, "int32")
        self.vals = scratch(self.subs // 2 * KEYS * self.state.v_dim, "int32")

    def begin(self, rows: int) -> None:
        self.query_steps = scratch(rows)

    def take_query(self, q: Expr, source: Expr, held: Expr, row: Expr) -> None:
        half, lanes = self.words, vectors(self.words)

        def load(i: Expr) -> Expr:
            x = q[lane_of(source + i * lanes, lanes)]
            return bind(vmath.bf16_to_f32(x, lanes) if self.query == "uint16" else x)

        highest = scratch(lanes)
        store(highest, number(LEAST, lanes), T.int32(0), lanes)
        with T.serial(0, self.state.k_dim // lanes) as i:
            size = vmath.absolute(load(i), lanes)
            store(highest, T.max(highest[lane_of(T.int32(0), lanes)], size), T.int32(0), lanes)
        largest = highest[lane_of(T.int32(0), lanes)]
        largest = bind(self.max16(largest) if lanes == LANES else largest)
        store(self.query_steps, largest * T.float32(1 / MOST), row, 1)
        inverse = bind(splat(T.float32(MOST) / largest, lanes))
        with T.serial(0, half // lanes) as i:
            first, second = (vmath.to_int32(load(bind(i + n * (half // lanes))) * inverse, lanes) for n in range(2))
            store(held, _pair(first, second, lanes), row * half + i * lanes, lanes)

    def room(self, rows: int) -> Expr | None:
        self.weights, self.steps = scratch(rows * self.subs * KEYS), scratch(LANES)
        store(self.steps, number(LEAST, LANES), T.int32(0), LANES)
        return scratch(rows * self.ld, "int32")

    def keep(self, p: list[Expr], probs: Expr, m: Expr) -> None:
        """Take row m's probabilities as floats, and the largest of them."""
        zero = number(0.0, KEYS)  # scales of values that no row sees may be anything
        p = [bind(T.Select(x > zero, x * self._scales(s, self.layout.value_scales), zero)) for s, x in enumerate(p)]
        for s, x in enumerate(p):
            store(self.weights, x, (m * self.subs + s) * KEYS, KEYS)
        store(self.steps, T.max(self.max16(tree(p, lambda a, b: bind(T.max(a, b)))), T.float32(LEAST)), m, 1)

    def _round(self, count: int, probs: Expr) -> None:
        """Probabilities of all rows as integers: the divisions are one."""
        every = lane_of(T.int32(0), LANES)
        inverses = scratch(LANES)
        T.buffer_store(inverses, number(MOST, LANES) / self.steps[every], [every])
        T.buffer_store(self.steps, self.steps[every] * number(1 / MOST, LANES), [every])
        half = number(0.5, KEYS)
        with T.serial(0, count) as m:
            inverse = bind(splat(inverses[m], KEYS))
            for s in range(0, self.subs, 2):
                whole = [bind(T.cast(vmath.fma(self.weights[lane_of((m * self.subs + s + n) * KEYS, KEYS)], inverse, half, KEYS),
                                     _WORDS)) for n in range(2)]
                store(probs, _pair(whole[0], whole[1], KEYS), m * self.ld + s * KEYS // 2, KEYS)

    def stage(self, low: Expr, high: Expr) -> None:
        """Widen keys and values up to `high`; those below `low`, which no row sees, have probability 0."""
        half, dv = self.words, self.state.v_dim
        with T.serial(0, (high + (KEYS - 1)) // KEYS) as s:
            base, after = self._key_words(s), self._key_words(s, self.after)
            with T.serial(0, half) as i:
                self._put(self.keys, (s * half + i) * KEYS, base + wide(i * KEYS), base + wide((i + half) * KEYS))
            self._fetch(after, self.layout.tile)
        with T.serial(0, (high + (2 * KEYS - 1)) // (2 * KEYS)) as s:
            first, second = self._value_words(s * 2), self._value_words(s * 2 + 1)
            with T.serial(0, KEYS) as j:
                with T.serial(0, dv // LANES) as c:
                    at = bind(j * dv + c * LANES)
                    self._put(self.vals, s * (KEYS * dv) + at, first + wide(at), second + wide(at))

    def _put(self, room: Expr, place: Expr, first: Expr, second: Expr) -> None:
        parts = [self.pool[lane_of(x, LANES)] for x in (first, second)]
        store(room, T.call_pure_extern(_WORDS, "inferloom_widen_pairs", *parts), place, LANES)

    def _fetch(self, begin: Expr, size: int) -> None:
        with T.serial(0, size // 64) as line:
            self._prefetch(begin + wide(line * 64))

    def scores(self, queries: Expr, row: Expr, count: int, scores: Expr, high: Expr, direct: bool) -> None:
        half = self.words
        starts = [bind((row + m) * half) for m in range(count)]
        with T.serial(0, (high + (KEYS - 1)) // KEYS) as s:
            acc = self._sums(count)
            with T.serial(0, half) as i:
                w = bind(self.keys[lane_of((s * half + i) * KEYS, KEYS)])
                self._add(acc, w, [queries[start + i] for start in starts])
            for m in range(count):
                step = splat(self.query_steps[row + m], KEYS)
                store(scores, self._floats(acc, m) * step, m * (self.subs * KEYS) + s * KEYS, KEYS)

    def values(self, sums: Expr, row: Expr, count: int, probs: Expr, decay: Expr, low: Expr, high: Expr, direct: bool) -> None:
        dv = self.state.v_dim
        self._round(count, probs)
        with T.serial(0, dv // LANES) as c:
            acc = self._sums(count)
            with T.serial(0, (high + (2 * KEYS - 1)) // (2 * KEYS) * KEYS) as j:
                w = bind(self.vals[lane_of(j * dv + c * LANES, LANES)])
                self._add(acc, w, [probs[m * self.ld + j] for m in range(count)])
            for m in range(count):
                place = lane_of((row + m) * dv + c * LANES, LANES)
                made = self._floats(acc, m) * splat(self.steps[m], LANES)
                T.buffer_store(sums, vmath.fma(sums[place], splat(decay[m], LANES), made, LANES), [place])

    def _sums(self, count: int) -> Expr:
        acc = scratch(count * LANES, "int32")
        for m in range(count):
            store(acc, splat(T.int32(0), LANES), T.int32(m * LANES), LANES)
        return acc

    def _add(self, acc: Expr, w: Expr, xs: list[Expr]) -> None:
        for m, x in enumerate(xs):
            cell = lane_of(T.int32(m * LANES), LANES)
            T.buffer_store(acc, T.call_pure_extern(_WORDS, "inferloom_add_pairs", acc[cell], w, splat(x, LANES)), [cell])

    def _floats(self, acc: Expr, m: int) -> Expr:
        return T.cast(acc[lane_of(T.int32(m * LANES), LANES)], f32(LANES))


def _pair(first: Expr, second: Expr, lanes: int) -> Expr:
    """Two 16-bit integers in a word."""
    return T.bitwise_or(T.bitwise_and(first, splat(T.int32(65535), lanes)), T.shift_left(second, splat(T.int32(16), lanes)))
