"""Tiles of keys and values in attention: how a tile gets into registers, and the products of rows with it.

Where the chip has a dot product of bf16 pairs and both queries and cache are bf16, keys and values are multiplied as
they lie in the cache. Else a tile is widened to float32 first, once for all rows of a chunk; scales of keys of 8 bits go into
the scores, those of values into the probabilities. Each sum is taken in order
of the inner dimension by one accumulator (by one of 16, where keys lie as rows), whatever the number of rows.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.types import DType, StateType
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import LANES, bind, f32, lane_of, number, scratch, splat, store, vectors
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.kvlayout import KEYS, KvLayout

Expr = Any


def _fold(name: str, step: str) -> str:
    """An LLVM function that folds 16 floats in halves."""
    lines, size = [f"define linkonce_odr hidden float @{name}(<16 x float> %v16) alwaysinline nounwind {{"], 16
    while size > 1:
        half = size // 2
        for part, first in (("a", 0), ("b", half)):
            at = ", ".join(f"i32 {first + i}" for i in range(half))
            source = f"<{size} x float> %v{size}, <{size} x float> poison"
            lines.append(f"  %{part}{half} = shufflevector {source}, <{half} x i32> <{at}>")
        lines += [line.format(n=half) for line in step.strip().splitlines()]
        size = half
    return "\n".join([*lines, "  %r = extractelement <1 x float> %v1, i32 0", "  ret float %r", "}", ""])


_FOLDS = _fold("inferloom_sum16", "  %v{n} = fadd <{n} x float> %a{n}, %b{n}") + _fold("inferloom_max16", """
  %c{n} = fcmp ogt <{n} x float> %a{n}, %b{n}
  %v{n} = select <{n} x i1> %c{n}, <{n} x float> %a{n}, <{n} x float> %b{n}""")
#: 16 numbers that are neither negative nor NaN, as bf16: with the instruction, and spelled out.
_NARROW = {"avx512": """  %h{x} = fptrunc <16 x float> %{x} to <16 x bfloat>
  %n{x} = bitcast <16 x bfloat> %h{x} to <16 x i16>""", "": """  %i{x} = bitcast <16 x float> %{x} to <16 x i32>
  %s{x} = lshr <16 x i32> %i{x}, splat (i32 16)
  %o{x} = and <16 x i32> %s{x}, splat (i32 1)
  %p{x} = add <16 x i32> %i{x}, splat (i32 32767)
  %q{x} = add <16 x i32> %p{x}, %o{x}
  %r{x} = lshr <16 x i32> %q{x}, splat (i32 16)
  %n{x} = trunc <16 x i32> %r{x} to <16 x i16>"""}


def llvm(isa: CpuIsa) -> str:
    """LLVM IR with the functions that attention calls."""
    narrow = _NARROW.get(isa.bf16_dot, _NARROW[""])
    order = ", ".join(f"i32 {i}" for i in range(32))
    return _FOLDS + f"""
define linkonce_odr hidden <16 x i32> @inferloom_bf16_pairs(<16 x float> %a, <16 x float> %b) alwaysinline nounwind {{
{narrow.format(x="a")}
{narrow.format(x="b")}
  %z = shufflevector <16 x i16> %na, <16 x i16> %nb, <32 x i32> <{order}>
  %r = bitcast <32 x i16> %z to <16 x i32>
  ret <16 x i32> %r
}}
"""


class KeyTiles:
    """Tiles of `subs` times 16 keys of one head. `views` are the element types that the pool is read as.

    Queries are read from memory as `query`, and held as `words` of `held` a row.
    """

    def __init__(self, state: StateType, query: DType, isa: CpuIsa, loc: str, by_block: bool) -> None:
        self.state, self.isa, self.layout = state, isa, KvLayout(state)
        self.layout.check(loc)
        #: Products of bf16 pairs, in the scores and in the sums of values.
        self.dot = bool(isa.bf16_dot) and query is DType.BF16 and state.dtype is DType.BF16
        self.dot_values = self.dot and not state.latent and state.v_dim % LANES == 0
        self.subs = 1 if state.latent else 4
        if by_block:
            self.subs = gcd(self.subs, self.layout.tiles)
        self.query = {DType.F32: "float32", DType.BF16: "int32" if self.dot else "uint16"}[query]
        self.held, self.words = ("int32", state.k_dim // 2) if self.dot else ("float32", state.k_dim)
        if state.dtype is DType.F32:
            self.views = ["float32"]
        elif state.scales:
            self.views = ["int8", "float32"]
        elif state.latent:
            self.views = ["uint16", *(["int32"] if self.dot else [])]
        else:
            self.views = ["int32"]
        self.size = {"float32": 4, "int32": 4, "uint16": 2, "int8": 1}[self.views[0]]  # of an element of the first view

    def bind(self, views: list[Expr]) -> None:
        """Take the pool's views, and room for the tile.

        `bases` are the byte offsets of its parts of 16 keys, `after` those of the next tile.
        """
        self.pool, self.second = views[0], views[-1]
        self.bases, self.after = scratch(self.subs, "int64"), scratch(self.subs, "int64")
        state, plain = self.state, self.state.dtype is DType.F32
        #: Widened keys and values; None where the products read them from the pool.
        self.keys: Expr = None if plain or self.dot else scratch(self.subs * KEYS * state.k_dim)
        self.vals: Expr = None if plain or self.dot_values else scratch(self.subs * KEYS * state.v_dim)

    def begin(self, rows: int) -> None:
        """Take room for what is kept of up to so many rows."""

    # -- small functions

    def _width(self, rows: int, most: int, direct: bool) -> int:
        """Vectors, a divisor of `most`, that a block of rows has sums of at a time: few rows would wait for their sums.

        With `direct`, what is widened must be in registers, too.
        """
        width, room = 1, self.isa.rows * self.isa.vectors - direct
        while most % (width * 2) == 0 and rows * width * 2 <= room:
            width *= 2
        return width

    def max16(self, x: Expr) -> Expr:
        return T.call_pure_extern("float32", "inferloom_max16", x)

    def sum16(self, x: Expr) -> Expr:
        return T.call_pure_extern("float32", "inferloom_sum16", x)

    def take_query(self, q: Expr, source: Expr, held: Expr, row: Expr) -> None:
        """Copy a row's query, which begins at element `source`, to where the products read it."""
        lanes = vectors(self.words)
        with T.serial(0, self.words // lanes) as i:
            x = q[lane_of((source // 2 if self.dot else source) + i * lanes, lanes)]
            store(held, vmath.bf16_to_f32(x, lanes) if self.query == "uint16" else x, row * self.words + i * lanes, lanes)

    def scaled(self, raw: Expr, sub: int, scale: float) -> Expr:
        """Scores of 16 keys from their products."""
        raw = raw * number(scale, KEYS)
        return raw * self._scales(sub, self.layout.key_scales) if self.state.scales else raw

    def _scales(self, sub: int, start: int) -> Expr:
        return self.second[lane_of((self.bases[sub] + start) // 4, KEYS)]

    def room(self, rows: int) -> Expr | None:
        """Where probabilities go, if not over the scores."""
        return scratch(rows * max(LANES, self.subs * KEYS // 2), "int32") if self.dot_values else None

    def keep(self, p: list[Expr], probs: Expr, m: Expr) -> None:
        """Store row m's probabilities as the values' products take them."""
        if not self.dot_values:
            for s, x in enumerate(p):
                if self.state.scales:  # values that no row sees may have any, and are not read
                    x = x * self._scales(s, self.layout.value_scales)
                store(probs, x, m * (self.subs * KEYS) + s * KEYS, KEYS)
            return
        ld = max(LANES, self.subs * KEYS // 2)
        for s in range(0, self.subs, 2):
            pair = T.call_pure_extern("int32x16", "inferloom_bf16_pairs", p[s], p[min(s + 1, self.subs - 1)])
            store(probs, pair, m * ld + s * KEYS // 2, LANES)

    # -- widening

    @property
    def widened(self) -> bool:
        """Whether products need keys or values in another form than they are stored in."""
        return not (self.state.dtype is DType.F32 or self.dot and self.dot_values)

    @property
    def direct(self) -> bool:
        """Whether a single token's rows widen what they read by themselves."""
        return self.widened

    def stage(self, low: Expr, high: Expr) -> None:
        """Widen the tile's keys, and the values of its keys `low` to `high`; those are the ones that rows see."""
        if not self.widened:
            return
        with T.serial(0, (high + (KEYS - 1)) // KEYS) as s:
            first = bind(T.max(low - s * KEYS, T.int32(0)))
            count = bind(T.min(high - s * KEYS, T.int32(KEYS)))
            if self.keys is not None:
                dk, pair = self.state.k_dim, self.layout.pair
                if self.state.latent:
                    self._widen(self.keys, s * KEYS * dk, self._key_words(s), dk, dk, T.int32(0), count)
                else:
                    self._widen(self.keys, s * KEYS * dk, self._key_words(s), KEYS, KEYS, T.int32(0), T.int32(dk // pair))
            if self.vals is not None:
                dv, pair = self.state.v_dim, self.layout.pair
                apart, end = self.state.k_dim if self.state.latent else dv, (count + (pair - 1)) // pair
                self._widen(self.vals, s * KEYS * dv, self._value_words(s), dv, apart, first // pair, end)

    def _widen(self, room: Expr, start: Expr, words: Expr, width: int, apart: int, first: Expr, end: Expr) -> None:
        """Rows `first` to `end` of `width` words of the cache, `apart` words from each other, to `room`."""
        lanes = vectors(width, apart)
        with T.serial(first, end) as j:
            with T.serial(0, width // lanes) as i:
                parts = self._parts(self.pool[lane_of(words + _long(j * apart + i * lanes), lanes)], lanes)
                for n, part in enumerate(parts):
                    store(room, part, start + (j * len(parts) + n) * width + i * lanes, lanes)

    def _parts(self, word: Expr, lanes: int) -> list[Expr]:
        """The elements of a word as floats."""
        word = bind(word)
        if self.state.scales:
            return [bind(vmath.from_8_bits(word, self.state.dtype, lanes))]
        if self.layout.pair == 1:
            return [bind(vmath.bf16_to_f32(word, lanes))]
        low = T.reinterpret(f32(lanes), T.shift_left(word, splat(T.int32(16), lanes)))
        return [bind(low), bind(T.reinterpret(f32(lanes), T.bitwise_and(word, splat(T.int32(-65536), lanes))))]

    def _key_words(self, sub: Expr, bases: Expr | None = None) -> Expr:
        """Where the keys of 16 begin in the pool, in elements of its first view."""
        return bind((self.bases if bases is None else bases)[sub] // self.size)

    def _value_words(self, sub: Expr, bases: Expr | None = None) -> Expr:
        return bind(((self.bases if bases is None else bases)[sub] + self.layout.values) // self.size)

    def _prefetch(self, place: Expr) -> None:
        T.evaluate(T.call_extern("void", "inferloom_prefetch", T.address_of(self.pool[place])))

    # -- products

    def _multiply(self, acc: Expr, x: Expr, y: Expr, dot: bool, lanes: int) -> Expr:
        return self.isa.dot_pair(acc, x, y, lanes) if dot else vmath.fma(x, y, acc, lanes)

    def scores(self, queries: Expr, row: Expr, count: int, scores: Expr, high: Expr, direct: bool) -> None:
        """scores [count, keys] = products of `count` rows from `row` on with the keys before `high`.

        With `direct` keys are widened as they are read, else they have been.
        """
        direct = direct and self.keys is not None
        if self.state.latent:
            self._by_row(queries, row, count, scores, high, direct)
        else:
            self._by_column(queries, row, count, scores, high, direct)

    def _by_column(self, queries: Expr, row: Expr, count: int, scores: Expr, high: Expr, direct: bool) -> None:
        width = self._width(count, self.subs, direct)
        pooled = self.keys is None or direct
        source = self.keys if not pooled else self.pool
        parts = self.layout.pair if direct else 1
        words, unroll = self.words // parts, gcd(self.words // parts, 4 // parts)
        starts = [bind((row + m) * self.words) for m in range(count)]
        with T.serial(0, T.min(T.int32(self.subs // width), (high + (width * KEYS - 1)) // (width * KEYS))) as g:
            acc = scratch(count * width * KEYS)
            subs = [bind(g * width + v) for v in range(width)]
            bases = [self._key_words(s) if pooled else bind(_long(s * (KEYS * self.state.k_dim))) for s in subs]
            after = [self._key_words(s, self.after) for s in subs] if pooled else []
            for i in range(count * width):
                store(acc, number(0.0, KEYS), T.int32(i * KEYS), KEYS)
            with T.serial(0, words // unroll) as outer:
                for u in range(unroll):
                    d = outer * unroll + u
                    ks = []
                    for v in range(width):
                        k = bind(source[lane_of(bases[v] + _long(d * KEYS), KEYS)])
                        ks.append(self._parts(k, KEYS) if direct else [k])
                    for place in after:
                        self._prefetch(place + _long(d * KEYS))
                    for n in range(parts):
                        for m in range(count):
                            x = bind(splat(queries[starts[m] + d * parts + n], KEYS))
                            for v in range(width):
                                cell = lane_of(T.int32((m * width + v) * KEYS), KEYS)
                                T.buffer_store(acc, self._multiply(acc[cell], x, ks[v][n], self.dot, KEYS), [cell])
            for m in range(count):
                for v in range(width):
                    x = acc[lane_of(T.int32((m * width + v) * KEYS), KEYS)]
                    store(scores, x, (m * self.subs + v) * KEYS + g * (width * KEYS), KEYS)

    def _by_row(self, queries: Expr, row: Expr, count: int, scores: Expr, high: Expr, direct: bool) -> None:
        """Keys lie one after the other, so that they can be values too."""
        words, lanes = self.words, vectors(self.words)
        if self.keys is not None and not direct:
            source, base = self.keys, bind(_long(T.int32(0)))
        else:
            source, base = (self.second, bind(self.bases[0] // 4)) if self.dot else (self.pool, self._key_words(T.int32(0)))
        with T.serial(0, high) as j:
            acc = scratch(count * lanes)
            for m in range(count):
                store(acc, number(0.0, lanes), T.int32(m * lanes), lanes)
            with T.serial(0, words // lanes) as i:
                k = bind(source[lane_of(base + _long(j * words + i * lanes), lanes)])
                if direct:
                    (k,) = self._parts(k, lanes)
                for m in range(count):
                    cell = lane_of(T.int32(m * lanes), lanes)
                    q = queries[lane_of((row + m) * words + i * lanes, lanes)]
                    T.buffer_store(acc, self._multiply(acc[cell], q, k, self.dot, lanes), [cell])
            for m in range(count):
                total = self.sum16(acc[lane_of(T.int32(m * lanes), lanes)]) if lanes == LANES else acc[T.int32(m)]
                store(scores, total, m * KEYS + j, 1)

    def values(self, sums: Expr, row: Expr, count: int, probs: Expr, decay: Expr, low: Expr, high: Expr, direct: bool) -> None:
        """sums = sums * decay + probs @ values of keys `low` to `high`, a few columns of all rows in registers."""
        direct = direct and self.vals is not None
        pooled = self.vals is None or direct
        dv, dot = self.state.v_dim, self.dot_values
        apart = self.state.k_dim if self.state.latent and pooled else dv
        lanes = vectors(dv, apart)
        width, pair = self._width(count, dv // lanes, direct) if lanes == LANES else 1, 2 if dot else 1
        parts = self.layout.pair if direct else 1
        ld = max(LANES, self.subs * KEYS // 2) if dot else self.subs * KEYS
        source = self.vals if not pooled else self.pool
        each = pair * parts  # keys of a row of words

        with T.serial(0, dv // (lanes * width)) as c:
            column = bind(c * (lanes * width))
            acc = scratch(count * width * lanes)

            def cell(m: int, v: int) -> Expr:
                return lane_of(T.int32((m * width + v) * lanes), lanes)

            def place(m: int, v: int) -> Expr:
                return lane_of((row + m) * dv + column + v * lanes, lanes)

            for m in range(count):
                for v in range(width):
                    T.buffer_store(acc, sums[place(m, v)] * splat(decay[m], lanes), [cell(m, v)])
            with T.serial(0, (high + (KEYS - 1)) // KEYS) as s:
                base = bind((self._value_words(s) if pooled else _long(s * (KEYS * dv))) + _long(column))
                after = bind(self._value_words(s, self.after) + _long(column)) if pooled else None
                first = bind(T.max(low - s * KEYS, T.int32(0)))
                end = bind(T.min(high - s * KEYS, T.int32(KEYS)))

                def step(j: Expr, odd: bool = False) -> None:
                    """Row j of words; `odd`: of what is stored for two keys, nothing is known of the second."""
                    words = [bind(source[lane_of(base + _long(j * apart + v * lanes), lanes)]) for v in range(width)]
                    if odd and dot:
                        words = [bind(T.bitwise_and(w, splat(T.int32(65535), lanes))) for w in words]
                    vs = [self._parts(w, lanes) if direct else [w] for w in words]
                    if after is not None and not odd:
                        for v in range(width):
                            self._prefetch(after + _long(j * apart + v * lanes))
                    for n in range(1 if odd else parts):
                        for m in range(count):
                            x = bind(splat(probs[m * ld + s * (KEYS // pair) + j * parts + n], lanes))
                            for v in range(width):
                                made = self._multiply(acc[cell(m, v)], x, vs[v][n], dot, lanes)
                                T.buffer_store(acc, made, [cell(m, v)])

                with T.serial(first // each, end // each) as j:
                    step(j)
                if each == 2:
                    with T.If(T.EQ(end % 2, 1)):
                        with T.Then():
                            step(end // 2, odd=True)
            for m in range(count):
                for v in range(width):
                    T.buffer_store(sums, acc[cell(m, v)], [place(m, v)])


def _long(x: Expr) -> Expr:
    return T.cast(x, "int64")
