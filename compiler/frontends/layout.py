"""Token-major layouts: how a traced tensor is held by an IR value.

A traced tensor has a batch axis and its token axis anywhere; an IR value has the token axis first and no batch
axis. `Traced` keeps, beside the value, the traced shape and which traced axis each axis of the value is. Axes of
size one may be absent, and the order of the others is free, so that transposes, squeezes and unsqueezes of the
trace cost no node; `Layouts.arrange` makes a node only where an op needs another order or another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import Dim, Shape, TensorType


class Merged(int):
    """The size of an axis that the trace has merged with the token axis before it, as `view(-1, dim)` does."""


@dataclass(frozen=True, slots=True)
class Traced:
    """`value` holds a traced tensor of `shape`; `axes[i]` is the traced axis that the value's axis i is.

    Every traced axis whose size is not one appears in `axes` exactly once.
    """

    value: Value
    shape: Shape
    axes: tuple[int, ...]

    @property
    def type(self) -> TensorType:
        made = self.value.type
        if not isinstance(made, TensorType):
            raise UnsupportedError(f"{self.value} is not a tensor")
        return made

    @property
    def token_axis(self) -> int | None:
        """The traced axis that is symbolic (tokens or rows), None for constants."""
        for axis, dim in enumerate(self.shape):
            if not isinstance(dim, int):
                return axis
        return None

    def renumber(self, shape: Shape, axes: dict[int, int]) -> Traced:
        """The same value seen with another shape; `axes` maps old traced axes to new ones."""
        return Traced(self.value, shape, tuple(axes[a] for a in self.axes))


def natural_axes(shape: Shape) -> tuple[int, ...]:
    """Axes that are not of size one, the symbolic one first."""
    axes = [a for a, d in enumerate(shape) if d != 1]
    return tuple(sorted(axes, key=lambda a: (isinstance(shape[a], int), a)))


@dataclass(slots=True)
class Layouts:
    """Emits the reshapes and permutes that layouts need."""

    builder: Builder
    loc: str = ""

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        """`value` with another shape; no node when it has that shape already."""
        if getattr(value.type, "shape", None) == tuple(shape):
            return value
        return self.builder.emit("reshape", value, shape=tuple(shape), loc=self.loc)

    def arrange(self, x: Traced, axes: Sequence[int]) -> Value:
        """A value whose axes are exactly these traced axes, in this order (the token axis must lead)."""
        kept = [a for a in x.axes if a in axes]
        wanted = [a for a in axes if a in kept]
        value = x.value
        if len(kept) < len(x.axes):
            value = self.reshape(value, [x.shape[a] for a in kept])
        if kept != wanted:
            value = self.builder.emit("permute", value, axes=tuple(kept.index(a) for a in wanted), loc=self.loc)
        return self.reshape(value, [x.shape[a] for a in axes])

    def with_axes(self, x: Traced, needed: Sequence[int]) -> Traced:
        """`x` with the traced axes `needed` present; those of size one are added in traced order."""
        missing = [a for a in needed if a not in x.axes]
        if not missing:
            return x
        axes = list(x.axes)
        for axis in sorted(missing):
            first = 1 if axes and not isinstance(x.shape[axes[0]], int) else 0
            place = next((i for i in range(first, len(axes)) if axes[i] > axis), len(axes))
            axes.insert(place, axis)
        return Traced(self.arrange(x, axes), x.shape, tuple(axes))

    def _without_ones(self, x: Traced) -> Traced:
        axes = tuple(a for a in x.axes if x.shape[a] != 1)
        return x if axes == x.axes else Traced(self.arrange(x, axes), x.shape, axes)

    def last(self, x: Traced, axis: int) -> Traced:
        """`x` with traced axis `axis` present and last in the value; the others keep their order."""
        axes = [a for a in x.axes if a != axis] + [axis]
        return Traced(self.arrange(x, axes), x.shape, tuple(axes))

    def ordered(self, x: Traced) -> Traced:
        """`x` with its axes in traced order, the token axis first."""
        axes = sorted(x.axes, key=lambda a: (isinstance(x.shape[a], int), a))
        return Traced(self.arrange(x, axes), x.shape, tuple(axes))

    def broadcast(self, parts: Sequence[Traced], shape: Shape) -> tuple[list[Value], tuple[int, ...]]:
        """Values that broadcast together by NumPy's rules, and the axes of the result of traced `shape`."""
        moved = [p.renumber(p.shape, {a: a + len(shape) - len(p.shape) for a in p.axes}) for p in parts]
        moved = [Traced(p.value, (1,) * (len(shape) - len(p.shape)) + p.shape, p.axes) for p in moved]
        if any(p.token_axis is not None for p in moved):  # a constant's ones must not come before the token axis
            moved = [p if p.token_axis is not None else self._without_ones(p) for p in moved]
        base = max(moved, key=lambda p: (len(p.axes), p.token_axis is not None))
        axes = list(base.axes)
        for part in moved:
            for axis in part.axes:
                if axis in axes:
                    continue
                if not isinstance(shape[axis], int):
                    axes.insert(0, axis)
                    continue
                first = 1 if axes and not isinstance(shape[axes[0]], int) else 0
                axes.insert(next((i for i in range(first, len(axes)) if axes[i] > axis), len(axes)), axis)
        values = []
        for part in moved:
            present = [i for i, a in enumerate(axes) if a in part.axes]
            values.append(self.arrange(part, axes[present[0]:]) if present else self.arrange(part, ()))
        return values, tuple(axes)

    def view(self, x: Traced, shape: Shape) -> Traced:
        """`x` reshaped from its traced shape to another one (row-major, as torch's `view`)."""
        groups = _match(x.shape, shape)
        axes: list[int] = []
        dims: list[Dim] = []
        changed = False
        order = list(x.axes)
        for old, _ in groups:
            present = [a for a in old if a in order]
            if len(present) > 1 or len(old) > 1:
                places = [order.index(a) for a in present]
                if places != list(range(places[0], places[0] + len(places))):
                    order = list(self.ordered_axes(x))
                    break
        source = Traced(self.arrange(x, order), x.shape, tuple(order))
        done: set[int] = set()
        by_axis = {a: (old, new) for old, new in groups for a in old}
        for axis in source.axes:
            if x.shape[axis] == 1:
                changed = True
                continue
            if axis in done:
                continue
            old, new = by_axis[axis]
            done.update(old)
            axes += new
            dims += [shape[n] for n in new]
            changed = changed or len(old) != 1 or len(new) != 1
        value = self.reshape(source.value, dims) if changed else source.value
        return Traced(value, shape, tuple(axes))

    def ordered_axes(self, x: Traced) -> tuple[int, ...]:
        return tuple(sorted(x.axes, key=lambda a: (isinstance(x.shape[a], int), a)))


def _match(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Split both shapes, their ones left out, into the shortest runs of equal product."""
    a = [i for i, d in enumerate(old) if d != 1]
    b = [i for i, d in enumerate(new) if d != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        have, want = old[a[i]], new[b[j]]
        i, j = i + 1, j + 1
        while have != want:
            if not isinstance(have, int) or not isinstance(want, int):
                raise UnsupportedError(f"reshape {_show(old)} -> {_show(new)} mixes the token axis with others")
            if have < want and i < len(a) and isinstance(old[a[i]], int):
                left.append(a[i])
                have *= int(str(old[a[i]]))
                i += 1
            elif want < have and j < len(b) and isinstance(new[b[j]], int):
                right.append(b[j])
                want *= int(str(new[b[j]]))
                j += 1
            else:
                raise UnsupportedError(f"reshape {_show(old)} -> {_show(new)} mixes the token axis with others")
        groups.append((left, right))
    if i != len(a) or j != len(b):
        raise UnsupportedError(f"reshape {_show(old)} -> {_show(new)} does not keep the number of elements")
    return groups


def _show(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
