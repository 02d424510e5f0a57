"""State on disk: files named by their content, and a SQLite index of what each is the state of.

    lock          held while a process uses the folder
    index.sqlite  sessions, and the pages under each key (WAL, synchronous=FULL)
    pages/ab/...  one block's bytes each, named by their BLAKE3

Pages are durable before the index speaks of them, and the index changes in one transaction: a process may be killed at
any moment, and what was committed is there, whole. Files that no entry names are left-overs of such a process, and are
removed when the folder is opened. What is read is hashed again; a page that is not what its name says is refused, and
everything under its key is forgotten.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from inferloom.runtime.blocks import Key
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.owners import owner_of, who_gives
from inferloom.runtime.tiers.store import Pages

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pages (grp INTEGER NOT NULL, key BLOB NOT NULL, part INTEGER NOT NULL, hash TEXT NOT NULL,
                                  PRIMARY KEY (grp, key, part));
CREATE TABLE IF NOT EXISTS sessions (name TEXT PRIMARY KEY, root BLOB, tokens BLOB NOT NULL, expires REAL NOT NULL);
CREATE TABLE IF NOT EXISTS needs (name TEXT NOT NULL, grp INTEGER NOT NULL, key BLOB NOT NULL,
                                  PRIMARY KEY (name, grp, key));
"""


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A session on disk: its tokens, what the hashes of its blocks start from, and the keys of what it needs.

    `expires`: seconds since 1970 after which its pages may go.
    """

    name: str
    root: bytes | None
    tokens: tuple[int, ...]
    needs: tuple[Key, ...]
    expires: float


class DiskStore:
    """At most `capacity` bytes of pages of `page_bytes` each in folder `path`, for one process.

    `identity` names what the state belongs to; ArtifactError when the folder holds another's, or is still in use after
    `patience` seconds. One thread may save while another reads and forgets: files are written without keeping it waiting.
    """

    def __init__(self, path: str | os.PathLike[str], identity: str, page_bytes: int, capacity: int,
                 patience: float = 0.0) -> None:
        self.path, self.page_bytes, self.capacity = Path(path).absolute(), page_bytes, capacity
        self.refused = 0
        self._saving, self._index = threading.Lock(), threading.RLock()  # the second guards all of the index
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.path / "pages").mkdir(mode=0o700, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        until = time.monotonic() + patience
        while not _locked(self._lock):
            if time.monotonic() >= until:
                user = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
                os.close(self._lock)
                raise ArtifactError(f"{self.path} is in use by another process{f' ({user})' if user else ''}: sessions are "
                                    "saved by one server at a time; end that one, or give this one a folder of its own")
            time.sleep(0.05)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        try:
            self._db = self._open(identity)
        except BaseException:
            os.close(self._lock)
            raise
        self._by_key: OrderedDict[Key, tuple[str, ...]] = OrderedDict()
        self._users: dict[str, int] = {}
        for group, key, _, hash in self._db.execute("SELECT grp, key, part, hash FROM pages ORDER BY rowid"):
            self._by_key[group, key] = (*self._by_key.get((group, key), ()), hash)
            self._users[hash] = self._users.get(hash, 0) + 1
        self._sessions = {s.name: s for s in self._read_sessions()}
        self._remove_leftovers()

    def _open(self, identity: str) -> sqlite3.Connection:
        file = self.path / "index.sqlite"
        try:
            db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(_SCHEMA)
            wanted = {"identity": identity, "version": str(VERSION), "page_bytes": str(self.page_bytes)}
            found = dict(db.execute("SELECT name, value FROM about"))
            if not found:
                with db:
                    db.execute("BEGIN")
                    db.executemany("INSERT INTO about VALUES (?, ?)", wanted.items())
            elif found != wanted:
                what = ", ".join(f"{k} {found.get(k)} (wanted {v})" for k, v in wanted.items() if found.get(k) != v)
                raise ArtifactError(f"{self.path} holds state of something else: {what}; choose another folder, or remove it")
        except sqlite3.DatabaseError as error:
            raise ArtifactError(f"{file} cannot be read: {error}; remove {self.path} to start without saved state") from None
        os.chmod(file, 0o600)
        return db

    def _read_sessions(self) -> Iterable[SavedSession]:
        needs: dict[str, list[Key]] = {}
        for name, group, key in self._db.execute("SELECT name, grp, key FROM needs ORDER BY rowid"):
            needs.setdefault(name, []).append((group, key))
        for name, root, tokens, expires in self._db.execute("SELECT name, root, tokens, expires FROM sessions ORDER BY rowid"):
            yield SavedSession(name, root, tuple(np.frombuffer(tokens, "<i4").tolist()), tuple(needs.get(name, ())), expires)

    def _remove_leftovers(self) -> None:
        for file in (self.path / "pages").glob("*/*"):
            if file.name not in self._users:
                file.unlink()

    @property
    def used(self) -> int:
        """Bytes of pages."""
        return len(self._users) * self.page_bytes

    @property
    def sessions(self) -> Mapping[str, SavedSession]:
        return self._sessions

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        return len(self._by_key)

    def fetch(self, key: Key) -> Pages | None:
        """The pages under `key`, verified; None when they are not there or were refused."""
        with self._index:
            hashes = self._by_key.get(key)
            if hashes is None:
                return None
            self._by_key.move_to_end(key)
        pages = []
        for hash in hashes:
            try:
                data = self._file(hash).read_bytes()
            except OSError:
                data = b""
            if len(data) != self.page_bytes or blake3(data).hexdigest() != hash:
                self.refused += 1
                self._forget([key])
                return None
            pages.append(data)
        return tuple(pages)

    def save(self, entries: Mapping[Key, Pages], session: SavedSession | None = None,
             wanted: Callable[[], bool] = lambda: True) -> bool:
        """Commit pages, and the session that needs them, together or not at all; False when, once they are written, they
        are not `wanted` any more.

        For a session's sake, saved sessions of an owner who has more than its own would have are forgotten, the longest
        saved first. RequestError, which names what failed, when there is no room even so; none is forgotten then.
        """
        with self._saving:
            return self._save(entries, session, wanted)

    def _save(self, entries: Mapping[Key, Pages], session: SavedSession | None, wanted: Callable[[], bool]) -> bool:
        hashes = {key: tuple(blake3(page).hexdigest() for page in pages) for key, pages in entries.items()
                  if key not in self._by_key}
        with self._index:
            data = {h: page for key, names in hashes.items() for h, page in zip(names, entries[key], strict=True)
                    if h not in self._users}
            if any(len(page) != self.page_bytes for page in data.values()):
                raise RequestError(f"a page of state has {self.page_bytes} bytes")
            self._make_room(len(data) * self.page_bytes, {*entries, *(session.needs if session else ())}, session)
        written: list[Path] = []
        try:
            self._write(data, written)
            with self._index:
                if not wanted():
                    _remove(written)
                    return False
                # Meanwhile a damaged page may have been forgotten, and with it what was equal to a page of these.
                hashes = {key: names for key, names in hashes.items() if all(h in data or h in self._users for h in names)}
                for h in data.keys() - {h for names in hashes.values() for h in names}:
                    self._file(h).unlink(missing_ok=True)
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    self._db.executemany("REPLACE INTO pages VALUES (?, ?, ?, ?)", (
                        (*key, part, h) for key, names in hashes.items() for part, h in enumerate(names)))
                    if session is not None:
                        self._insert(session)
                for key, names in hashes.items():
                    self._by_key[key] = names
                    for h in names:
                        self._users[h] = self._users.get(h, 0) + 1
                if session is not None:
                    self._sessions.pop(session.name, None)  # the last saved is the last one
                    self._sessions[session.name] = session
        except (OSError, sqlite3.Error) as error:
            _remove(written)
            raise RequestError(f"state could not be saved in {self.path}: {error}") from error
        return True

    def _insert(self, session: SavedSession) -> None:
        self._db.execute("DELETE FROM needs WHERE name = ?", (session.name,))
        self._db.execute("REPLACE INTO sessions VALUES (?, ?, ?, ?)", (
            session.name, session.root, np.asarray(session.tokens, "<i4").tobytes(), session.expires))
        self._db.executemany("INSERT OR IGNORE INTO needs VALUES (?, ?, ?)", ((session.name, *key) for key in session.needs))

    def _write(self, data: Mapping[str, bytes], written: list[Path]) -> None:
        folders = set()
        for hash, page in data.items():
            file = self._file(hash)
            if not file.parent.is_dir():
                file.parent.mkdir(mode=0o700)
                folders.add(file.parent.parent)
            part = file.with_name(f"{hash[:8]}-{secrets.token_hex(4)}.part")
            written += [part, file]
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                view = memoryview(page)
                while view:
                    view = view[os.write(descriptor, view):]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(part, file)
            folders.add(file.parent)
        for folder in folders:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def forget_session(self, name: str) -> None:
        """The session is over; its pages stay until room is needed."""
        with self._index:
            if self._sessions.pop(name, None) is None:
                return
            with contextlib.suppress(sqlite3.Error), self._db:  # on a full disk; it expires after a restart then
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("DELETE FROM sessions WHERE name = ?", (name,))
                self._db.execute("DELETE FROM needs WHERE name = ?", (name,))

    def expire(self, now: float) -> list[str]:
        """Forget the sessions that `expires` before `now` (seconds since 1970); their names."""
        with self._index:
            gone = [s.name for s in self._sessions.values() if s.expires <= now]
        for name in gone:
            self.forget_session(name)
        return gone

    def _make_room(self, more: int, keep: set[Key], session: SavedSession | None) -> None:
        staying, over = dict(self._sessions), list[str]()
        while True:
            going, used = self._to_go(more, keep.union(*(s.needs for s in staying.values())))
            missing = used + more - self.capacity
            if missing <= 0:
                break
            givers = [] if session is None else self._givers(owner_of(session.name), more, missing, staying)
            if not givers:
                raise RequestError(f"{more:,} bytes of state do not fit into {self.path}: {used:,} of {self.capacity:,} are "
                                   "held by saved sessions")
            over += givers
            for name in givers:
                del staying[name]
        for name in over:
            self.forget_session(name)
        self._forget(going)

    def _to_go(self, more: int, held: set[Key]) -> tuple[list[Key], int]:
        """What to forget so that so many bytes more fit: what is not held, longest unused first. And the bytes left then."""
        going, used, users = list[Key](), self.used, dict(self._users)
        for key in self._by_key:
            if used + more <= self.capacity:
                break
            if key in held:
                continue
            going.append(key)
            for h in self._by_key[key]:
                users[h] -= 1
                used -= 0 if users[h] else self.page_bytes
        return going, used

    def _givers(self, taker: str, more: int, missing: int, sessions: Mapping[str, SavedSession]) -> list[str]:
        """Sessions of who has to give, about as many as are missing bytes; none if it is the taker who has most."""
        uses = dict[str, Counter[Key]]()
        for name, each in sessions.items():
            uses.setdefault(owner_of(name), Counter()).update(set(each.needs))
        held = {owner: sum(map(self._size, keys)) for owner, keys in uses.items()}
        giver = who_gives(held, taker, more)
        if giver is None:
            return []
        names, given = list[str](), 0
        for name, each in sessions.items():
            if owner_of(name) == giver and given < missing and held[giver] - given > held.get(taker, 0) + more:
                names.append(name)
                for key in set(each.needs):
                    uses[giver][key] -= 1
                    given += 0 if uses[giver][key] else self._size(key)
        return names

    def _size(self, key: Key) -> int:
        return len(self._by_key.get(key, ())) * self.page_bytes

    def _forget(self, keys: list[Key]) -> None:
        with self._index:
            keys = [key for key in keys if key in self._by_key]
            if keys:
                self._forget_now(keys)

    def _forget_now(self, keys: list[Key]) -> None:
        with contextlib.suppress(sqlite3.Error), self._db:  # on a full disk; a page without its file is refused later
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM pages WHERE grp = ? AND key = ?", keys)
        for key in keys:
            for h in self._by_key.pop(key):
                self._users[h] -= 1
                if not self._users[h]:
                    del self._users[h]
                    self._file(h).unlink(missing_ok=True)

    def _file(self, hash: str) -> Path:
        return self.path / "pages" / hash[:2] / hash

    def close(self) -> None:
        """Give the folder to whoever wants it. Closing twice is fine."""
        if self._lock >= 0:
            self._db.close()
            os.close(self._lock)
            self._lock = -1

    def check_integrity(self) -> None:
        """Raise ValueError unless the index, its copy in memory and the files agree."""
        rows: dict[Key, tuple[str, ...]] = {}
        for group, key, _, hash in self._db.execute("SELECT grp, key, part, hash FROM pages ORDER BY grp, key, part"):
            rows[group, key] = (*rows.get((group, key), ()), hash)
        if rows != dict(self._by_key):
            raise ValueError("the index on disk and its copy in memory disagree")
        files = {file.name for file in (self.path / "pages").glob("*/*")}
        if files != set(self._users):
            raise ValueError(f"{len(files)} files are there for {len(self._users)} pages")


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
