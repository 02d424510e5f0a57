"""Products of 8-bit integers, as a chip can do them: unsigned weights by signed activations, summed exactly in int32.

Operands are 16 lanes of 32 bits, each with four steps of k: a weight's are 8-bit integers, or nibbles of which the lower
halves are four steps and the upper halves the next four; an activation's are those of one row in every lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.targets.tvm.emit import LANES, bind, splat
from inferloom.targets.tvm.isa import PAIR_DOTS, CpuIsa

Expr = Any
_KIND = f"int32x{LANES}"
_LOW_NIBBLES, _EVEN = 0x0F0F0F0F, 0x00FF00FF


class Products:
    """With an instruction that multiplies and adds four at a time (or none at all: then it is spelled out)."""

    #: Whether `split` makes the activations' words that are multiplied, two of each, or they are taken as they are.
    splits = False

    def __init__(self, isa: CpuIsa, nibbles: bool) -> None:
        self.isa, self.nibbles = isa, nibbles

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.isa.rows

    def width(self, rows: int) -> int:
        """Vectors that a block works on at a time: fewer rows leave registers for more columns."""
        width = 1
        while width < 4 and rows * width * 2 <= self.rows * self.isa.vectors:
            width *= 2
        return width

    @property
    def words(self) -> int:
        """Words of activations that one word of a weight is multiplied by."""
        return 2 if self.nibbles or self.splits else 1

    def factors(self, raw: Expr) -> list[Expr]:
        """What the words of activations are multiplied by, each in turn."""
        return _halves(raw) if self.nibbles else [raw]

    def start(self, sums: Expr) -> Expr:
        """What a few steps are added to, before `finish` brings it to `sums`."""
        return sums

    def add(self, acc: Expr, factor: Expr, x: Expr) -> Expr:
        return self.isa.dot_quad(acc, factor, x)

    def finish(self, sums: Expr, acc: Expr) -> Expr:
        return acc


class _Pairs(Products):
    """Where 16 lanes are two registers of 16, a block is smaller: what it is multiplied by must stay in some as well."""

    @property
    def rows(self) -> int:
        return self.isa.rows if self.isa.vectors > 1 else 4

    def width(self, rows: int) -> int:
        return super().width(rows) if self.isa.vectors > 1 or rows > 1 or self.splits else 2


class PairProducts(_Pairs):
    """With one that multiplies 16-bit integers and adds pairs: even and odd bytes apart, on both sides."""

    splits = True

    def factors(self, raw: Expr) -> list[Expr]:
        return [bind(T.bitwise_and(raw, splat(T.int32(_EVEN), LANES))),
                bind(T.bitwise_and(_right(raw, 8), splat(T.int32(_EVEN), LANES)))]

    def add(self, acc: Expr, factor: Expr, x: Expr) -> Expr:
        return T.call_pure_extern(_KIND, "inferloom_add_pairs", acc, factor, x)

    @staticmethod
    def split(x: Expr) -> Sequence[Expr]:
        """Activations of four steps as 16-bit integers: the even ones, the odd ones."""
        return [T.call_pure_extern(_KIND, f"inferloom_{which}_bytes", x) for which in ("even", "odd")]


class NibbleProducts(_Pairs):
    """Nibbles by bytes, in 16 bits: eight products of at most 15 * 127, and pairs of them, do not leave these."""

    def start(self, sums: Expr) -> Expr:
        return splat(T.int32(0), LANES)

    def add(self, acc: Expr, factor: Expr, x: Expr) -> Expr:
        return T.call_pure_extern(_KIND, "inferloom_add_bytes", acc, factor, x)

    def finish(self, sums: Expr, acc: Expr) -> Expr:
        return T.call_pure_extern(_KIND, "inferloom_add_shorts", sums, acc)


def products(isa: CpuIsa, nibbles: bool) -> Products:
    """How `isa` multiplies."""
    if isa.i8_dot in PAIR_DOTS:
        return NibbleProducts(isa, True) if nibbles else PairProducts(isa, False)
    return Products(isa, nibbles)


def _halves(raw: Expr) -> list[Expr]:
    mask = splat(T.int32(_LOW_NIBBLES), LANES)
    return [bind(T.bitwise_and(raw, mask)), bind(T.bitwise_and(_right(raw, 4), mask))]


def _right(raw: Expr, bits: int) -> Expr:
    return T.shift_right(raw, splat(T.int32(bits), LANES))
