"""State in memory: bounded bytes, least recently used first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from inferloom.runtime.blocks import Key, Leasable
from inferloom.runtime.errors import RequestError
from inferloom.runtime.tiers.store import Pages, size


class RamStore(Leasable):
    """At most `capacity` bytes of pages. What is under lease stays when others come."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise RequestError(f"a tier cannot have {capacity} bytes")
        super().__init__()
        self.capacity, self.used = capacity, 0
        self._kept_bytes = 0
        self._pages: OrderedDict[Key, Pages] = OrderedDict()
        self._kept: OrderedDict[Key, Pages] = OrderedDict()  # pages under lease

    def __contains__(self, key: Key) -> bool:
        return key in self._of(key)

    def __len__(self) -> int:
        return len(self._pages) + len(self._kept)

    def fetch(self, key: Key) -> Pages | None:
        pages = self._of(key).get(key)
        if pages is not None:
            self._of(key).move_to_end(key)
        return pages

    def put(self, key: Key, pages: Pages) -> list[tuple[Key, Pages]]:
        """Keep `pages`; what had to go for them, themselves if there is no room.

        Leased pages go for leased ones only.
        """
        self.drop(key)
        gone, need = list[tuple[Key, Pages]](), size(pages)
        if need > self.capacity - (0 if key in self._leases else self._kept_bytes):
            return [(key, pages)]
        while self.used + need > self.capacity:
            old = next(iter(self._pages or self._kept))
            gone.append((old, self._of(old)[old]))
            self.drop(old)
        self._add(key, pages, 1)
        return gone

    def drop(self, key: Key) -> Pages | None:
        """Forget what is under `key`, and return it."""
        pages = self.lookup(key)
        if pages is not None:
            self._add(key, pages, -1)
        return pages

    def lookup(self, key: Key) -> Pages | None:
        """What is under `key`, which is not counted as a use."""
        return self._of(key).get(key)

    def _lease(self, key: Key, change: int) -> None:
        pages = self.drop(key)
        self._count(key, change)
        if pages is not None:
            self._add(key, pages, 1)

    def _add(self, key: Key, pages: Pages, sign: int) -> None:
        """Put the pages where they belong (1) or take them away (-1)."""
        self.used += sign * size(pages)
        if sign > 0:
            self._of(key)[key] = pages
        else:
            del self._of(key)[key]
        if key in self._leases:
            self.leased += sign * len(pages)
            self._kept_bytes += sign * size(pages)

    def _of(self, key: Key) -> OrderedDict[Key, Pages]:
        """Where the key's pages belong."""
        return self._kept if key in self._leases else self._pages

    def check_leases(self, keys: Iterable[Key]) -> None:
        """Raise ValueError unless these leased keys (one entry a lease) are all that there are."""
        if Counter(keys) != self._leases:
            raise ValueError("leases and the tier in memory disagree")

    def check_integrity(self) -> None:
        """Raise ValueError when the bytes do not add up."""
        if self.used != sum(map(size, (*self._pages.values(), *self._kept.values()))) or self.used > self.capacity:
            raise ValueError(f"the tier in memory counts {self.used} bytes of {self.capacity}")
        kept = self._kept.values()
        counts = sum(map(len, kept)), sum(map(size, kept))
        if self._kept.keys() - self._leases.keys() or (self.leased, self._kept_bytes) != counts:
            raise ValueError(f"the tier in memory counts {self.leased} leased blocks, and has others")
