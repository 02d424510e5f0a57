"""Sessions: what an agent has said and read so far, whose state waits while the agent is away.

A session is a name for a sequence of tokens. Its state is ordinary cache: whoever sends these tokens again, under this
name or not, starts from what is left of it. While it is paused, the state can be kept in the pool by a lease, be copied to
memory or disk, or be given up; `auto` takes what costs least (tiers/policy.py). Each wish is answered by an `Outcome`,
none changes any result. A name may start with an owner and a colon: where there is no room for all (of names, leases,
memory, disk), the owner who has most gives first.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from inferloom.runtime.blocks import Key
from inferloom.runtime.errors import RequestError
from inferloom.runtime.leases import Leases, Outcome
from inferloom.runtime.owners import owner_of
from inferloom.runtime.prefix_cache import PrefixCache
from inferloom.runtime.tiers.disk import SavedSession
from inferloom.runtime.tiers.policy import PLACES
from inferloom.runtime.tiers.store import Pages, size
from inferloom.runtime.tiers.tiers import Tiers

MAX_NAME, MAX_SESSIONS = 320, 10_000
#: Tokens of all sessions together at most: each takes 4 bytes, and a share of its block's hash.
MAX_TOKENS = 1 << 25
#: How long a session is held in memory and stays on disk at most, in seconds.
LONGEST_IN_RAM, LONGEST_ON_DISK = 86400.0, 30 * 86400.0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as it stands: tokens, where the blocks that it needs are, seconds until its lease ends."""

    name: str
    tokens: int
    blocks: int
    pooled: int
    in_ram: int
    on_disk: int
    leased: float
    saved: bool


@dataclass(frozen=True, slots=True)
class _Session:
    root: bytes | None
    tokens: array[int]
    keys: tuple[bytes, ...]


class Sessions:
    """The sessions of one engine; `clock` gives monotonic seconds, `wall` those since 1970."""

    def __init__(self, cache: PrefixCache, leases: Leases, tiers: Tiers, clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time) -> None:
        self.cache, self.leases, self.tiers, self._clock, self._wall = cache, leases, tiers, clock, wall
        self._in_ram = None if tiers.ram is None else Leases(tiers.ram, tiers.ram.capacity // tiers.page_bytes, LONGEST_IN_RAM)
        self._leases = [leases] if self._in_ram is None else [leases, self._in_ram]
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._tokens = 0
        self._looked = wall()
        if tiers.disk is not None:
            tiers.disk.expire(wall())
            for saved in tiers.disk.sessions.values():
                self._set(saved.name, saved.tokens, saved.root)

    def remember(self, name: str, tokens: Sequence[int], root: bytes | None = None) -> None:
        """A request of the session has come so far: `tokens`, whose hashes start from `root`, have state."""
        check_name(name)
        self._drop_leases(name)
        self._set(name, tokens, root)
        while len(self._sessions) > MAX_SESSIONS or (self._tokens > MAX_TOKENS and len(self._sessions) > 1):
            self.close(self._one_too_many())

    def pause(self, name: str, seconds: float, *, returns_in: float | None = None, place: str = "auto") -> Outcome:
        """Let the session's state wait for at most `seconds`; it is expected back in `returns_in`.

        `place`: keep, ram, disk, discard, auto for the cheapest of them, or memory for the cheapest but disk. RequestError
        for a session that is not there or a place that is none.
        """
        session = self._find(name)
        check_place(place)
        if not seconds > 0 or (returns_in is not None and not returns_in >= 0):
            raise RequestError("a pause must last longer than 0 seconds")
        needed = self.cache.needs(session.keys)
        if not needed:
            return Outcome("rejected", f"the session has less than a block of {self.cache.block_tokens} tokens")
        if place in PLACES:
            return self._put(place, name, session, needed, seconds)
        self._drop_leases(name)
        pause = seconds if returns_in is None else min(returns_in, seconds)
        places = self._by_cost(name, session, needed, pause, place == "auto")
        made = (self._put(each, name, session, needed, seconds) for each in places)
        return next(outcome for outcome in made if outcome.status != "rejected")  # discard never is

    def hold(self, name: str, seconds: float, place: str = "auto") -> Outcome:
        """`pause`; what its place cannot take waits where it costs least, clipped."""
        outcome = self.pause(name, seconds, place=place)
        if outcome.status != "rejected" or place in ("auto", "memory") or not self.cache.needs(self._find(name).keys):
            return outcome
        other = self.pause(name, seconds)
        return other if other.status == "rejected" else replace(other, status="clipped", why="; ".join(
            filter(None, (f"{place}: {outcome.why}", other.why))))

    def resume(self, name: str) -> Outcome:
        """Bring the session's state back into the pool before its next request comes."""
        session = self._find(name)
        needed = self.cache.needs(session.keys)
        missing = len([key for key in needed if self.cache.pool.lookup(key) is None])
        keys = self.cache.prepare((*session.tokens, 0), session.root)
        brought = missing - len([key for key in needed if self.cache.pool.lookup(key) is None])
        if len(keys) == len(session.keys):
            return Outcome("accepted", "", brought, "keep")
        why = f"{len(keys)} of its {len(session.keys)} blocks of tokens are there; the rest will be computed again"
        return Outcome("clipped" if keys else "rejected", why, brought, "keep")

    def close(self, name: str) -> bool:
        """The session is over: no lease, no saved copy. Whether there was one."""
        self._drop_leases(name)
        if self.tiers.writer is not None:
            self.tiers.writer.cancel(name)
        if self.tiers.disk is not None:
            self.tiers.disk.forget_session(name)
        gone = self._sessions.pop(name, None)
        self._tokens -= 0 if gone is None else len(gone.tokens)
        return gone is not None

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, name: str) -> bool:
        return name in self._sessions

    def newest(self, owner: str, most: int) -> tuple[list[SessionInfo], bool]:
        """At most so many sessions whose names start with `owner`, the last used first; whether there are more."""
        names = [name for name in reversed(self._sessions) if name.startswith(owner)]
        return [self.info(name) for name in names[:most]], len(names) > most

    def list(self) -> list[SessionInfo]:
        """All sessions, the one that was longest unused first."""
        return [self.info(name) for name in self._sessions]

    def info(self, name: str) -> SessionInfo:
        """RequestError for a session that is not there."""
        session, now = self._find(name), self._clock()
        needed = self.cache.needs(session.keys)
        below = [key for key in needed if self.cache.pool.lookup(key) is None]
        where = self.tiers.where(below)
        saved = self.tiers.disk is not None and name in self.tiers.disk.sessions
        return SessionInfo(name, len(session.tokens), len(needed), len(needed) - len(below), where["ram"], where["disk"],
                           max(leases.remaining(name, now) for leases in self._leases), saved)

    def tick(self) -> None:
        """End what has timed out; cheap enough for every step."""
        for leases in self._leases:
            leases.expire(self._clock())
        now = self._wall()
        if self.tiers.disk is not None and abs(now - self._looked) > 10:
            self._looked = now
            self.tiers.disk.expire(now)

    def check_integrity(self) -> None:
        """Raise ValueError when what is leased and what is there disagree."""
        for leases in self._leases:
            leases.check_integrity()
        if self.tiers.ram is not None:
            self.tiers.ram.check_integrity()

    def _put(self, place: str, name: str, session: _Session, needed: Sequence[Key], seconds: float) -> Outcome:
        if place == "keep":
            made = self.leases.take(name, needed, seconds, self._clock())
            if self._in_ram is not None and made.status != "rejected":  # the last wish counts
                self._in_ram.drop(name)
            return made
        if place == "ram":
            return self._to_ram(name, needed, seconds)
        if place == "disk":
            return self._to_disk(name, session, needed, min(seconds, LONGEST_ON_DISK))
        self._drop_leases(name)
        return Outcome("accepted", "its blocks are ordinary cache now", 0, "discard")

    def _to_ram(self, name: str, needed: Sequence[Key], seconds: float) -> Outcome:
        ram, leases = self.tiers.ram, self._in_ram
        if ram is None or leases is None:
            return Outcome("rejected", "there is no tier in memory", place="ram")
        start = time.perf_counter()
        pages = self._pages(needed)
        count = sum(map(size, pages.values()))
        if count > ram.capacity:
            return Outcome("rejected", f"it is larger than the tier in memory, {ram.capacity:,} bytes", place="ram")
        leases.drop(name)
        if not leases.make_room(name, sum(len(each) for key, each in pages.items() if not ram.is_leased(key))):
            return Outcome("rejected", "others are held in the tier in memory", place="ram")
        for key, each in pages.items():
            ram.put(key, each)
        self.tiers.costs.ram.add(count, time.perf_counter() - start)
        self.leases.drop(name)
        there = [key for key in needed if key in pages]
        made = leases.take(name, there, seconds, self._clock())
        if made.status == "rejected" or len(there) == len(needed):
            return replace(made, place="ram")
        return replace(made, status="clipped", why="some of it was gone already", place="ram")

    def _to_disk(self, name: str, session: _Session, needed: Sequence[Key], seconds: float) -> Outcome:
        disk = self.tiers.disk
        if disk is None:
            return Outcome("rejected", "there is no disk tier", place="disk")
        pages = self._pages([key for key in needed if key not in disk])
        saved = [key for key in needed if key in pages or key in disk]
        if not saved:
            return Outcome("rejected", "none of it is there any more", place="disk")
        made = SavedSession(name, session.root, tuple(session.tokens), tuple(saved), self._wall() + seconds)
        why = "" if len(saved) == len(needed) else "some of it was gone already"
        if self.tiers.writer is not None:
            if not self.tiers.writer.put(pages, made):
                return Outcome("rejected", "too much waits to be written already", place="disk")
            self._drop_leases(name)
            return Outcome("deferred", why, len(saved), "disk", seconds)
        try:
            disk.save(pages, made)
        except RequestError as error:
            return Outcome("rejected", str(error), place="disk")
        self._drop_leases(name)
        return Outcome("clipped" if why else "accepted", why, len(saved), "disk", seconds)

    def _pages(self, needed: Sequence[Key]) -> dict[Key, Pages]:
        """What there is of it in the pool and in the tiers."""
        found = {}
        for key in needed:
            blocks = self.cache.pool.lookup(key)
            pages = self.cache.pages(blocks) if blocks is not None else self.tiers.fetch(key)
            if pages is not None:
                found[key] = pages
        return found

    def _by_cost(self, name: str, session: _Session, needed: Sequence[Key], pause: float, disk: bool) -> Sequence[str]:
        """Places that there are, the cheapest first."""
        pool, page = self.cache.pool, self.tiers.page_bytes
        there = {"keep": self.leases.fits(name, needed), "ram": self.tiers.ram is not None,
                 "disk": disk and self.tiers.disk is not None, "discard": True}
        own = page * sum(len(pool.lookup(key) or ()) for key in needed)
        return self.tiers.costs.order((place for place in PLACES if there[place]), tokens=len(session.tokens), bytes=own,
                                      pause=pause, pressure=1 - pool.unused / pool.size,
                                      running=page * (pool.size - pool.available))

    def _drop_leases(self, name: str) -> None:
        for leases in self._leases:
            leases.drop(name)

    def _set(self, name: str, tokens: Sequence[int], root: bytes | None) -> None:
        old = self._sessions.pop(name, None)
        self._sessions[name] = _Session(root, array("i", tokens), tuple(self.cache.chain(tokens, root)))
        self._tokens += len(tokens) - (0 if old is None else len(old.tokens))

    def _one_too_many(self) -> str:
        """The session that was longest unused of the owner who has most: nobody's are pushed out by another's many."""
        counts = Counter(map(owner_of, self._sessions))
        most = max(counts, key=lambda owner: counts[owner])
        return next(name for name in self._sessions if owner_of(name) == most)

    def _find(self, name: str) -> _Session:
        if name not in self._sessions:
            raise RequestError(f"there is no session {name!r}")
        return self._sessions[name]


def check_place(place: str) -> None:
    """RequestError unless `place` is one where a session can be told to wait."""
    if place not in ("auto", "memory", *PLACES):
        raise RequestError(f"place {place!r} must be auto, memory, {', '.join(PLACES)}")


def check_name(name: str) -> None:
    """RequestError unless `name` is printable and short."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise RequestError(f"a session's name has 1 to {MAX_NAME} printable characters")
