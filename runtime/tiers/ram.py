"""State in memory: bounded bytes, least recently used first."""

from __future__ import annotations

from collections import OrderedDict

from inferloom.runtime.blocks import Key
from inferloom.runtime.errors import RequestError
from inferloom.runtime.tiers.store import Pages, size


class RamStore:
    """At most `capacity` bytes of pages."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise RequestError(f"a tier cannot have {capacity} bytes")
        self.capacity, self.used = capacity, 0
        self._pages: OrderedDict[Key, Pages] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._pages

    def __len__(self) -> int:
        return len(self._pages)

    def fetch(self, key: Key) -> Pages | None:
        if key in self._pages:
            self._pages.move_to_end(key)
        return self._pages.get(key)

    def put(self, key: Key, pages: Pages) -> list[tuple[Key, Pages]]:
        """Keep `pages`; what had to go for them, themselves if they are larger than everything."""
        self.drop(key)
        gone = []
        while self._pages and self.used + size(pages) > self.capacity:
            old, its = self._pages.popitem(last=False)
            self.used -= size(its)
            gone.append((old, its))
        if size(pages) > self.capacity:
            return [*gone, (key, pages)]
        self._pages[key] = pages
        self.used += size(pages)
        return gone

    def drop(self, key: Key) -> None:
        pages = self._pages.pop(key, None)
        if pages is not None:
            self.used -= size(pages)

    def check_integrity(self) -> None:
        """Raise ValueError when the bytes do not add up."""
        if self.used != sum(map(size, self._pages.values())) or self.used > self.capacity:
            raise ValueError(f"the tier in memory counts {self.used} bytes of {self.capacity}")
