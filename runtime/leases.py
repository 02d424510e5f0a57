"""Leases: cached state that is to stay where it is for a while, in the pool or in memory.

A lease is a wish. Leased blocks are the last to be taken when the pool needs room, but they are taken then, so no lease
can stand in the way of a request; leases together hold a bounded share of the place, each ends by itself, and what it held
is ordinary cache from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from inferloom.runtime.blocks import Key


class Place(Protocol):
    """What state can be leased in; `leased` counts the blocks that are there under lease."""

    @property
    def leased(self) -> int: ...

    def lookup(self, key: Key) -> Sequence[object] | None:
        """The blocks under `key`."""
        ...

    def lease(self, key: Key) -> None: ...

    def unlease(self, key: Key) -> None: ...

    def is_leased(self, key: Key) -> bool: ...

    def check_leases(self, keys: Iterable[Key]) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a wish: accepted, clipped (in part), deferred (will be done), or rejected, and why.

    `blocks` are affected; `place`: keep, ram, disk or discard; `seconds` until it ends by itself.
    """

    status: str
    why: str = ""
    blocks: int = 0
    place: str = ""
    seconds: float = 0.0


class Leases:
    """Leases on cached keys of one place, at most `most` blocks together, each for at most `longest` seconds."""

    def __init__(self, pool: Place, most: int, longest: float = 3600.0) -> None:
        self.pool, self.most, self.longest = pool, most, longest
        self._held: dict[str, tuple[tuple[Key, ...], float]] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def blocks(self) -> int:
        """Blocks under lease."""
        return self.pool.leased

    def take(self, name: str, keys: Sequence[Key], seconds: float, now: float) -> Outcome:
        """Lease those of `keys` that the pool has, in order, as far as there is room; replaces the lease of this name."""
        self.drop(name)
        if seconds <= 0:
            return Outcome("rejected", "a lease lasts longer than 0 seconds")
        until, why = min(seconds, self.longest), []
        if until < seconds:
            why.append(f"leases last {self.longest:g} s at most")
        taken, blocks = list[Key](), 0
        for key in keys:
            found = self.pool.lookup(key)
            if found is None:
                why.append("not all of it is there")
                break
            if not self.pool.is_leased(key) and self.pool.leased + len(found) > self.most:
                why.append(f"leases hold {self.most} blocks at most")
                break
            self.pool.lease(key)
            taken.append(key)
            blocks += len(found)
        if not taken:
            return Outcome("rejected", "; ".join(why) or "there is nothing to hold")
        self._held[name] = tuple(taken), now + until
        return Outcome("clipped" if why else "accepted", "; ".join(why), blocks, "keep", until)

    def fits(self, keys: Sequence[Key]) -> bool:
        """Whether all of `keys` are there, and could be leased together."""
        found = {key: self.pool.lookup(key) for key in keys}
        new = sum(len(blocks or ()) for key, blocks in found.items() if not self.pool.is_leased(key))
        return None not in found.values() and self.pool.leased + new <= self.most

    def remaining(self, name: str, now: float) -> float:
        """Seconds until the lease ends; 0 when there is none."""
        return max(0.0, self._held[name][1] - now) if name in self._held else 0.0

    def drop(self, name: str) -> None:
        """End a lease; what it held is ordinary cache from here on."""
        keys, _ = self._held.pop(name, ((), 0.0))
        for key in keys:
            self.pool.unlease(key)

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for name in [n for n, (_, until) in self._held.items() if until <= now]:
            self.drop(name)

    def check_integrity(self) -> None:
        """Raise ValueError unless the pool's counts are those of the leases."""
        self.pool.check_leases(key for keys, _ in self._held.values() for key in keys)
