"""How a weight is quantised, and what its matmul does with the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inferloom.ir.errors import UnsupportedError

Format = Literal["int8", "int4", "fp8"]
Activations = Literal["int8", "none"]

FORMATS: tuple[Format, ...] = ("int8", "int4", "fp8")
GROUPS = (32, 64, 128)
#: The group of `int4` when its name gives none: one scale for a row of 4-bit weights costs too much accuracy.
INT4_GROUP = 32
_CHOICES = "int8 | int4 | fp8, then any of -g32 -g64 -g128 -channel (weights that share a scale), -asym, -wo (weight only)"


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantise the weight [n, k] of a linear layer.

    `format`: what a weight is stored as: a signed 8-bit or 4-bit integer, or fp8 (e4m3fn: 4 bits of exponent, 3 of
    mantissa, no infinities). `group`: how many consecutive weights of a row share a scale, 0 for all of them (per
    output channel). `symmetric`: a weight is `value * scale`; otherwise `value * scale + offset`. `activations`:
    "int8" when they are quantised as well, each token by a scale of its own at run time, so that products are of
    integers; "none" when only weights are (weight only). fp8 is symmetric and weight only.
    """

    format: Format = "int8"
    group: int = 0
    symmetric: bool = True
    activations: Activations = "int8"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UnsupportedError(f"no weight format is called {self.format!r}; choose from {', '.join(FORMATS)}")
        if self.group and self.group not in GROUPS:
            raise UnsupportedError(f"groups of {self.group} weights; choose from {', '.join(map(str, GROUPS))}, or 0 "
                                   "for one scale a channel")
        if self.activations not in ("int8", "none"):
            raise UnsupportedError(f"no format of activations is called {self.activations!r}; choose int8 or none")
        if self.format == "fp8" and (not self.symmetric or self.activations != "none"):
            raise UnsupportedError("fp8 weights are symmetric and weight only")

    @property
    def bits(self) -> int:
        """Bits of a value, without scales."""
        return 4 if self.format == "int4" else 8

    @property
    def name(self) -> str:
        """The shortest name that `parse` turns into this scheme."""
        usual = INT4_GROUP if self.format == "int4" else 0
        parts: list[str] = [self.format]
        if self.group != usual:
            parts.append(f"g{self.group}" if self.group else "channel")
        if not self.symmetric:
            parts.append("asym")
        if self.activations == "none" and self.format != "fp8":
            parts.append("wo")
        return "-".join(parts)

    def __str__(self) -> str:
        return self.name

    def groups(self, k: int) -> int:
        """Scales of a row of k weights. UnsupportedError when groups do not divide the row."""
        if self.group and k % self.group:
            raise UnsupportedError(f"{self.name}: rows of {k} weights are not whole groups of {self.group}")
        return k // self.group if self.group else 1


def parse(name: str) -> Scheme:
    """The scheme called `name`, e.g. int8, int8-wo, int4, int4-g128, int4-g128-asym, fp8.

    UnsupportedError says how names are made.
    """
    head, *rest = name.split("-")
    group = [part for part in rest if part == "channel" or part in {f"g{g}" for g in GROUPS}]
    known = {*group, "asym", "wo"}
    if head not in FORMATS or len(group) > 1 or len(set(rest)) < len(rest) or not known.issuperset(rest):
        raise UnsupportedError(f"no quantisation is called {name!r}; names are {_CHOICES}")
    size = INT4_GROUP if head == "int4" else 0
    if group:
        size = 0 if group[0] == "channel" else int(group[0][1:])
    weight_only = head == "fp8" or "wo" in rest
    return Scheme(head, size, "asym" not in rest, "none" if weight_only else "int8")  # type: ignore[arg-type]
