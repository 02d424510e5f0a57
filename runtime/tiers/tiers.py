"""The places below the pool, in order: memory, then disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from inferloom.runtime.blocks import Key
from inferloom.runtime.tiers.disk import DiskStore
from inferloom.runtime.tiers.policy import Costs
from inferloom.runtime.tiers.ram import RamStore
from inferloom.runtime.tiers.store import Pages, size
from inferloom.runtime.tiers.writer import DiskWriter


class Tiers:
    """What leaves the pool goes to memory, and what leaves memory is dropped, unless it is on disk.

    Only sessions that are saved are written to disk: writing all that is ever evicted would wear it out for prefixes
    that nobody asks for again. `page_bytes`: bytes of a block. With a `writer`, saving is its business, and what waits there
    to be written counts as in memory.
    """

    def __init__(self, page_bytes: int = 0, ram: RamStore | None = None, disk: DiskStore | None = None,
                 costs: Costs | None = None, writer: DiskWriter | None = None) -> None:
        self.page_bytes, self.ram, self.disk, self.costs = page_bytes, ram, disk, costs or Costs.unknown()
        self.writer = writer
        self.fetched_ram = self.fetched_disk = 0

    @property
    def keeps(self) -> bool:
        return self.ram is not None

    @property
    def empty(self) -> bool:
        return not ((self.ram is not None and len(self.ram)) or (self.writer is not None and not self.writer.empty)
                    or (self.disk is not None and len(self.disk)))

    def worth(self, keys: Sequence[Key], tokens: int) -> bool:
        """Whether reading these keys takes less time than computing so many tokens."""
        where = self.where(keys)
        seconds = sum(where[place] * self.page_bytes / rate.guess
                      for place, rate in (("ram", self.costs.ram), ("disk", self.costs.disk)))
        return seconds < tokens / self.costs.compute.guess

    def __contains__(self, key: Key) -> bool:
        return self._in_memory(key) or (self.disk is not None and key in self.disk)

    def _in_memory(self, key: Key) -> bool:
        return (self.ram is not None and key in self.ram) or (self.writer is not None and key in self.writer)

    def fetch(self, key: Key) -> Pages | None:
        pages = self.ram.fetch(key) if self.ram is not None else None
        if pages is None and self.writer is not None:  # before the disk: what is written leaves the writer after it is there
            pages = self.writer.fetch(key)
        if pages is not None:
            self.fetched_ram += 1
            return pages
        if self.disk is None:
            return None
        start = time.perf_counter()
        pages = self.disk.fetch(key)
        if pages is not None:
            self.fetched_disk += 1
            self.costs.disk.add(size(pages), time.perf_counter() - start)
        return pages

    def moved(self, key: Key) -> None:
        """What the pool has need not be in memory twice: it comes back when it leaves the pool."""
        if self.ram is not None:
            self.ram.drop(key)

    def put(self, key: Key, pages: Pages) -> None:
        if self.ram is not None:
            self.ram.put(key, pages)

    def where(self, keys: Iterable[Key]) -> dict[str, int]:
        """How many of the keys each tier has; a key that both have counts as in memory."""
        counts = {"ram": 0, "disk": 0}
        for key in keys:
            if self._in_memory(key):
                counts["ram"] += 1
            elif self.disk is not None and key in self.disk:
                counts["disk"] += 1
        return counts

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.disk is not None:
            self.disk.close()
