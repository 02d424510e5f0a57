"""Leases: cached state that is to stay where it is for a while, in the pool or in memory.

A lease is a wish. Leased blocks are the last to be taken when the pool needs room, but they are taken then, so no lease
can stand in the way of a request; leases together hold a bounded share of the place, each ends by itself, and what it held
is ordinary cache from then on. When that share is full, the owner who has most of it gives what another lacks: blocks from
the end of the lease that was taken longest ago.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from inferloom.runtime.blocks import Key, Leasable
from inferloom.runtime.owners import owner_of, who_gives


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


@dataclass(slots=True)
class _Lease:
    """The keys that it holds, with their numbers of blocks, and when it ends."""

    keys: list[tuple[Key, int]]
    until: float


class Leases:
    """Leases on cached keys of one place, at most `most` blocks together, each for at most `longest` seconds."""

    def __init__(self, pool: Leasable, most: int, longest: float = 3600.0) -> None:
        self.pool, self.most, self.longest = pool, most, longest
        self._held: dict[str, _Lease] = {}
        self._of = Counter[str]()  # blocks of each owner's leases; what two lease counts for both
        self._names: dict[str, dict[str, None]] = {}  # of each owner's leases, the one taken longest ago first

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
        lease, blocks = self._held.setdefault(name, _Lease([], now + until)), 0
        self._names.setdefault(owner_of(name), {})[name] = None
        for key in keys:
            found = self.pool.lookup(key)
            if found is None:
                why.append("not all of it is there")
                break
            if not (self.pool.is_leased(key) or self.make_room(name, len(found))):
                why.append(f"leases hold {self.most} blocks at most")
                break
            self.pool.lease(key)
            lease.keys.append((key, len(found)))
            self._of[owner_of(name)] += len(found)
            blocks += len(found)
        if not lease.keys:
            self.drop(name)
            return Outcome("rejected", "; ".join(why) or "there is nothing to hold")
        return Outcome("clipped" if why else "accepted", "; ".join(why), blocks, "keep", until)

    def fits(self, name: str, keys: Sequence[Key]) -> bool:
        """Whether all of `keys` are there, and could be leased together under this name."""
        found = {key: self.pool.lookup(key) for key in keys}
        new = sum(len(blocks or ()) for key, blocks in found.items() if not self.pool.is_leased(key))
        return None not in found.values() and self._room_for(name, new)

    def make_room(self, name: str, blocks: int) -> bool:
        """Whether so many blocks more may be leased under this name; owners who have more than its own would have give them."""
        if not self._room_for(name, blocks):
            return False
        while self.pool.leased + blocks > self.most:
            giver = who_gives(self._of, owner_of(name), blocks)
            if giver is None:  # what was given is leased by others as well
                return False
            self._give(next(iter(self._names[giver])))
        return True

    def _room_for(self, name: str, blocks: int) -> bool:
        own = owner_of(name)
        given = sum(max(0, count - self._of[own] - blocks) for owner, count in self._of.items() if owner != own)
        return self.pool.leased + blocks - self.most <= given

    def remaining(self, name: str, now: float) -> float:
        """Seconds until the lease ends; 0 when there is none."""
        return max(0.0, self._held[name].until - now) if name in self._held else 0.0

    def drop(self, name: str) -> None:
        """End a lease; what it held is ordinary cache from here on."""
        while name in self._held:
            self._give(name)

    def _give(self, name: str) -> None:
        """One key less in this lease, from its end; it is over with its last one."""
        lease, owner = self._held[name], owner_of(name)
        if lease.keys:
            key, blocks = lease.keys.pop()
            self.pool.unlease(key)
            self._of[owner] -= blocks
        if not lease.keys:
            del self._held[name], self._names[owner][name]
        if not self._names[owner]:
            del self._names[owner], self._of[owner]

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for name in [n for n, lease in self._held.items() if lease.until <= now]:
            self.drop(name)

    def check_integrity(self) -> None:
        """Raise ValueError unless the pool's counts are those of the leases."""
        self.pool.check_leases(key for lease in self._held.values() for key, _ in lease.keys)
        counts, names = Counter[str](), dict[str, dict[str, None]]()
        for name, lease in self._held.items():
            counts[owner_of(name)] += sum(blocks for _, blocks in lease.keys)
            names.setdefault(owner_of(name), {})[name] = None
        if counts != self._of or names != self._names:
            raise ValueError("leases and what their owners have of them disagree")
