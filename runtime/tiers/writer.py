"""Saves sessions on a thread of its own, so that no step waits for a disk.

Pages are copies: what the pool does meanwhile does not matter. Until they are on disk they can be fetched from here. What
waits is bounded, a session that is closed is not saved any more, and one that is saved again before its turn is saved once, as
it was last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

from inferloom.runtime.blocks import Key
from inferloom.runtime.tiers.disk import DiskStore, SavedSession
from inferloom.runtime.tiers.store import Pages, size

#: Bytes of pages that may wait to be written.
MAX_WAITING = 256 << 20


class DiskWriter:
    """Writes to `disk` what is put, in order. `failed` counts what could not be saved."""

    def __init__(self, disk: DiskStore, most: int = MAX_WAITING) -> None:
        self._disk, self._most = disk, most
        self._waiting: OrderedDict[str, tuple[Mapping[Key, Pages], SavedSession]] = OrderedDict()
        self._now: SavedSession | None = None  # what is being written
        self._pages: dict[Key, tuple[Pages, int]] = {}  # all that waits or is being written, and how many want it written
        self._bytes, self._busy, self._closed = 0, False, False
        self.failed = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="inferloom-disk", daemon=True)
        self._thread.start()

    def put(self, pages: Mapping[Key, Pages], session: SavedSession) -> bool:
        """Save this when its turn comes; False when too much waits already. What is larger than all that may wait goes
        alone."""
        with self._changed:
            self._drop(session.name)
            count = sum(map(size, pages.values()))
            if self._closed or (self._bytes and self._bytes + count > self._most):
                return False
            self._waiting[session.name] = pages, session
            self._bytes += count
            for key, each in pages.items():
                first, wanted = self._pages.get(key, (each, 0))
                self._pages[key] = first, wanted + 1
            self._changed.notify_all()
            return True

    def __contains__(self, key: Key) -> bool:
        with self._changed:
            return key in self._pages

    def fetch(self, key: Key) -> Pages | None:
        """The pages under `key` if they are not written yet. Whoever gets None finds on disk what has been."""
        with self._changed:
            return self._pages.get(key, (None, 0))[0]

    @property
    def empty(self) -> bool:
        return not self._pages

    def cancel(self, name: str) -> None:
        """The session is over: it is not saved any more."""
        with self._changed:
            self._drop(name)
            if self._now is not None and self._now.name == name:
                self._now = None

    def flush(self) -> None:
        """Wait until nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _drop(self, name: str) -> None:
        pages, _ = self._waiting.pop(name, ({}, None))
        self._let_go(pages)

    def _let_go(self, pages: Mapping[Key, Pages]) -> None:
        self._bytes -= sum(map(size, pages.values()))
        for key in pages:
            first, wanted = self._pages.pop(key)
            if wanted > 1:
                self._pages[key] = first, wanted - 1

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                _, (pages, session) = self._waiting.popitem(last=False)
                self._now, self._busy = session, True
            try:
                self._disk.save(pages, session, lambda session=session: self._now is session)  # type: ignore[misc]
            except Exception:  # no room, or a disk that fails: the next one may go better
                self.failed += 1
            finally:
                with self._changed:
                    self._now, self._busy = None, False
                    self._let_go(pages)
                    self._changed.notify_all()
