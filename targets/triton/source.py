"""Writing Triton source: lines with indentation, names for repeated expressions, and index arithmetic.

An index is affine in named variables whose ranges are known, so that flattening an index and splitting it again
along other dims costs nothing in the generated code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Index:
    """`const + sum(coefficient * name)`; names are texts of integer scalars or tiles."""

    terms: tuple[tuple[str, int], ...] = ()
    const: int = 0

    @staticmethod
    def of(name: str) -> Index:
        return Index(((name, 1),))

    def __add__(self, other: Index) -> Index:
        made = dict(self.terms)
        for name, c in other.terms:
            made[name] = made.get(name, 0) + c
        return Index(tuple((n, c) for n, c in made.items() if c), self.const + other.const)

    def __mul__(self, factor: int) -> Index:
        return Index(tuple((n, c * factor) for n, c in self.terms) if factor else (), self.const * factor)

    def __str__(self) -> str:
        parts = [name if c == 1 else f"{name} * {c}" for name, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)


@dataclass(slots=True)
class Variable:
    """What is known of a name: 0 <= it < extent; `mask` where it is in range; whether it is a tile."""

    extent: int
    mask: str = ""
    tile: bool = False


class Writer:
    """Source text of one kernel. `name` gives an expression a name, once in each block that is open."""

    def __init__(self, indent: int = 1) -> None:
        self.lines: list[str] = []
        self.variables: dict[str, Variable] = {}
        self._depth = indent
        self._count = 0
        self._known: list[dict[str, str]] = [{}]
        self._splits: list[tuple[str, str, int, Index]] = []

    def line(self, text: str) -> None:
        self.lines.append("    " * self._depth + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines below `head`; names made inside are not known after it."""
        self.line(head)
        self._depth += 1
        self._known.append({})
        yield
        self._known.pop()
        self._depth -= 1

    def name(self, expression: str, hint: str = "v") -> str:
        """The name that holds `expression`."""
        for known in reversed(self._known):
            if expression in known:
                return known[expression]
        made = f"{hint}{self._count}"
        self._count += 1
        self.line(f"{made} = {expression}")
        self._known[-1][expression] = made
        return made

    def variable(self, name: str, extent: int, mask: str = "", tile: bool = False) -> Index:
        """Declare what is known of a name."""
        self.variables[name] = Variable(extent, mask, tile)
        return Index.of(name)

    # -- index arithmetic

    def bound(self, index: Index) -> int:
        """One more than the largest value."""
        return index.const + sum(c * (self.variables[n].extent - 1) for n, c in index.terms if c > 0) + 1

    def is_tile(self, index: Index) -> bool:
        return any(self.variables[n].tile for n, _ in index.terms)

    def mask(self, indices: Sequence[Index]) -> str:
        """Where all of the indices are in range: "" for everywhere."""
        masks = dict.fromkeys(self.variables[n].mask for i in indices for n, _ in i.terms)
        return " & ".join(f"({m})" if len(masks) > 1 else m for m in masks if m)

    def split(self, index: Index, by: int) -> tuple[Index, Index]:
        """(index // by, index % by)."""
        whole = Index(tuple((n, c // by) for n, c in index.terms if c % by == 0), index.const // by)
        rest = Index(tuple((n, c) for n, c in index.terms if c % by), index.const % by)
        if self.bound(rest) <= by:
            return whole, rest
        text = str(index)
        text = text if len(index.terms) == 1 and not index.const and index.terms[0][1] == 1 else f"({text})"
        quotient, remainder = self.name(f"{text} // {by}", "q"), self.name(f"{text} % {by}", "r")
        mask, tile = self.mask([index]), self.is_tile(index)
        self._splits.append((quotient, remainder, by, index))
        self.variable(quotient, -(-self.bound(index) // by), mask, tile)
        self.variable(remainder, by, mask, tile)
        return Index.of(quotient), Index.of(remainder)

    def flatten(self, index: Sequence[Index], shape: Sequence[int]) -> Index:
        """The place in a dense array of `shape`."""
        made = Index()
        for i, size in zip(index, shape, strict=True):
            made = made * size + i
        for quotient, remainder, by, whole in reversed(self._splits):
            terms = dict(made.terms)
            if remainder in terms and terms.get(quotient) == terms[remainder] * by:
                scale = terms[remainder]
                rest = Index(tuple((n, c) for n, c in made.terms if n not in (quotient, remainder)), made.const)
                made = rest + whole * scale
        return made

    def unflatten(self, flat: Index, shape: Sequence[int]) -> list[Index]:
        """The index into `shape` of a place in its dense array."""
        made: list[Index] = []
        for axis in range(len(shape) - 1, 0, -1):
            if shape[axis] == 1:
                made.append(Index())
            elif prod(shape[:axis]) == 1:
                made.append(flat)
                flat = Index()
            else:
                flat, rest = self.split(flat, shape[axis])
                made.append(rest)
        return [flat, *made[::-1]] if shape else []

    def address(self, index: Index) -> str:
        """Text of an element offset; in 64 bits where 32 could overflow."""
        if self.bound(index) <= INT32_MAX:
            return str(index)
        parts = [f"{n}.to(tl.int64) * {c}" if c * self.variables[n].extent > INT32_MAX else f"{n} * {c}" if c != 1 else n
                 for n, c in index.terms]
        return " + ".join([*parts, *([str(index.const)] if index.const else [])])


@dataclass(frozen=True, slots=True)
class KernelText:
    """A generated Triton kernel.

    `parameters`: (name, Triton type) of its pointers; `args` where each comes from. `options` are Triton's
    (num_warps, num_stages, ...). `wide` are the parameters whose offsets may need more than 31 bits.
    """

    symbol: str
    kind: str
    source: int
    body: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]
    args: tuple[object, ...]
    grid: tuple[int, int, int]
    options: Mapping[str, int]
    least: int = 0
    most: int = INT32_MAX
    wide: frozenset[str] = frozenset()
    notes: Mapping[str, object] = field(default_factory=dict)
    expects_matrix: bool = False

    def text(self) -> str:
        """The function as source."""
        head = f"def {self.symbol}({', '.join(n for n, _ in self.parameters)}):"
        comment = [f"    # {', '.join(f'{n}: {t}' for n, t in self.parameters)}"]
        comment += [f"    # {k}: {v}" for k, v in self.notes.items()]
        return "\n".join(["@triton.jit", head, *comment, *self.body]) + "\n"


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
