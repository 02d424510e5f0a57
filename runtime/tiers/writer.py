"""Saves sessions on a thread of its own, so that no step waits for a disk.

Pages are copies: what the pool does meanwhile does not matter. Until they are on disk they can be fetched from here. What
waits is bounded, a session that is closed is not saved any more, and one that is saved again before its turn is saved once, as
it was last. Owners take turns, and where there is no room for all that would wait, the owner with most of it gives first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

from inferloom.runtime.blocks import Key
from inferloom.runtime.owners import owner_of, who_gives
from inferloom.runtime.tiers.disk import DiskStore, SavedSession
from inferloom.runtime.tiers.store import Pages, size

#: Bytes of pages that may wait to be written, beside those that are being written.
MAX_WAITING = 256 << 20

_Save = tuple[Mapping[Key, Pages], SavedSession]


class DiskWriter:
    """Writes to `disk` what is put: of each owner in order. `failed` counts what could not be saved, or gave its place."""

    def __init__(self, disk: DiskStore, most: int = MAX_WAITING) -> None:
        self._disk, self._most = disk, most
        #: What waits by owner, whose turn comes next first; of each owner by name, the oldest first.
        self._waiting: OrderedDict[str, OrderedDict[str, _Save]] = OrderedDict()
        self._now: _Save | None = None  # what is being written
        self._wanted = True  # still, when it is
        self._pages: dict[Key, tuple[Pages, int]] = {}  # all that waits or is being written, and how many want it written
        self._closed = False
        self.failed = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="inferloom-disk", daemon=True)
        self._thread.start()

    def put(self, pages: Mapping[Key, Pages], session: SavedSession) -> bool:
        """Save this when its turn comes. False when too much waits already, and no owner has more of it than this one would:
        what was put before stays as it is then. What is larger than all that may wait goes alone."""
        with self._changed:
            givers = [] if self._now is None else self._givers(session.name, _bytes(pages))
            if self._closed or givers is None:
                return False
            for name in (session.name, *givers):
                self._drop(name)
            self.failed += len(givers)
            self._waiting.setdefault(owner_of(session.name), OrderedDict())[session.name] = pages, session
            for key, each in pages.items():
                first, wanted = self._pages.get(key, (each, 0))
                self._pages[key] = first, wanted + 1
            if self._now is None:
                self._take_turn()
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
            if self._now is not None and self._now[1].name == name:
                self._wanted = False

    def flush(self) -> None:
        """Wait until nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._now is None)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _givers(self, name: str, more: int) -> list[str] | None:
        """Sessions whose places `more` bytes under `name` take, each owner's last ones first; None if there is no room."""
        taker, over = owner_of(name), list[str]()
        sizes = {owner: [(each, _bytes(pages)) for each, (pages, _) in saves.items() if each != name]
                 for owner, saves in self._waiting.items()}
        held = {owner: sum(count for _, count in each) for owner, each in sizes.items()}
        while sum(held.values()) + more > self._most:
            giver = who_gives(held, taker, more)
            if giver is None:
                return None
            last, count = sizes[giver].pop()
            held[giver] -= count
            over.append(last)
        return over

    def _drop(self, name: str) -> None:
        saves: OrderedDict[str, _Save] = self._waiting.get(owner_of(name), OrderedDict())
        if name in saves:
            pages, _ = saves.pop(name)
            self._let_go(pages)
            if not saves:
                del self._waiting[owner_of(name)]

    def _let_go(self, pages: Mapping[Key, Pages]) -> None:
        for key in pages:
            first, wanted = self._pages.pop(key)
            if wanted > 1:
                self._pages[key] = first, wanted - 1

    def _take_turn(self) -> None:
        """What is next is being written from here on, and its owner's next turn comes after the others'."""
        self._now, self._wanted = None, True
        if self._waiting:
            owner, saves = self._waiting.popitem(last=False)
            _, self._now = saves.popitem(last=False)
            if saves:
                self._waiting[owner] = saves
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._now is not None or self._closed)
                if self._now is None:
                    return
                pages, session = self._now
            try:
                self._disk.save(pages, session, lambda: self._wanted)
            except Exception:  # no room, or a disk that fails: the next one may go better
                with self._changed:
                    self.failed += 1
            finally:
                with self._changed:
                    self._let_go(pages)
                    self._take_turn()


def _bytes(pages: Mapping[Key, Pages]) -> int:
    return sum(map(size, pages.values()))
