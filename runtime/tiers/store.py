"""What a place below the pool does."""

from __future__ import annotations

from typing import Protocol

from inferloom.runtime.blocks import Key

#: The bytes of the blocks that are cached together under one key, one entry a table of their group.
Pages = tuple[bytes, ...]


def size(pages: Pages) -> int:
    """Bytes of all pages together."""
    return sum(map(len, pages))


class Store(Protocol):
    """State by key, below the pool; what it gives back is what was put, or nothing."""

    @property
    def keeps(self) -> bool:
        """Whether anything that is put can be kept."""
        ...

    @property
    def empty(self) -> bool:
        """Whether nothing can be fetched now."""
        ...

    def __contains__(self, key: Key) -> bool: ...

    def fetch(self, key: Key) -> Pages | None:
        """The pages under `key`; None when they are not there, or not whole: then `key` is forgotten, too."""
        ...

    def moved(self, key: Key) -> None:
        """What was fetched is in the pool now."""
        ...

    def put(self, key: Key, pages: Pages) -> None:
        """Take what leaves the pool. What finds no room is dropped: it can be computed again."""
        ...
