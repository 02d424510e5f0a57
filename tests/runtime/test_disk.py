"""State on disk: what was committed is there and whole, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from inferloom.runtime.blocks import Key
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.tiers.disk import DiskStore, SavedSession
from inferloom.runtime.tiers.ram import RamStore
from inferloom.runtime.tiers.store import Pages

PAGE = 64


def entry(number: int, tables: int = 1) -> tuple[Key, Pages]:
    """A key and pages that belong together."""
    r = random.Random(number)
    return (number % 3, r.randbytes(32)), tuple(r.randbytes(PAGE) for _ in range(tables))


def session(name: str, keys: list[Key], expires: float = 1e12) -> SavedSession:
    return SavedSession(name, None, tuple(range(len(keys))), tuple(keys), expires)


def open_(folder: Path, capacity: int = 1 << 20, identity: str = "model") -> DiskStore:
    return DiskStore(folder, identity, PAGE, capacity)


@contextmanager
def open_closing(folder: Path) -> Iterator[DiskStore]:
    store = open_(folder)
    try:
        yield store
    finally:
        store.check_integrity()
        store.close()


def test_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    store = open_(tmp_path)
    entries = dict(entry(i, 1 + i % 2) for i in range(6))
    made = session("s", list(entries))
    store.save(entries, made)
    store.save(dict([entry(9)]))
    store.check_integrity()
    for _ in range(2):
        assert all(store.fetch(key) == pages for key, pages in entries.items())
        assert store.sessions == {"s": made} and (0, b"?") not in store and store.fetch((0, b"?")) is None
        store.close()
        store = open_(tmp_path)
    store.check_integrity()
    assert (tmp_path / "index.sqlite").stat().st_mode & 0o77 == 0 and tmp_path.joinpath("pages").stat().st_mode & 0o77 == 0
    store.close()
    store.close()


def test_equal_pages_are_stored_once(tmp_path: Path) -> None:
    store = open_(tmp_path)
    _, pages = entry(1)
    store.save({(0, b"a"): pages})
    store.save({(0, b"b"): pages, (1, b"a"): (*pages, *pages)})
    assert store.used == PAGE and len(list((tmp_path / "pages").glob("*/*"))) == 1
    store.check_integrity()


def test_what_others_left_is_refused(tmp_path: Path) -> None:
    store = open_(tmp_path)
    with pytest.raises(ArtifactError, match=f"in use by another process .{os.getpid()}.: .* folder of its own"):
        open_(tmp_path)
    store.close()
    with pytest.raises(ArtifactError, match="identity model .wanted other"):
        open_(tmp_path, identity="other")
    with pytest.raises(ArtifactError, match="page_bytes 64 .wanted 65"):
        DiskStore(tmp_path, "model", PAGE + 1, 1000)
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_(tmp_path)


def test_room_is_made_of_what_no_session_needs(tmp_path: Path) -> None:
    store = open_(tmp_path, 4 * PAGE)
    held, old, used, new = entry(1), entry(2), entry(3), entry(4)
    store.save(dict([held]), session("s", [held[0]]))
    store.save(dict([old, used]))
    store.fetch(old[0])
    store.fetch(used[0])
    store.fetch(old[0])
    store.save(dict([new, entry(5)]))
    assert [e[0] in store for e in (held, old, used, new)] == [True, True, False, True]
    with pytest.raises(RequestError, match="do not fit"):
        store.save(dict(entry(i) for i in range(10, 14)))
    assert held[0] in store
    store.save(dict([held]), session("s", [held[0]], expires=5.0))
    assert store.expire(4.0) == [] and store.expire(5.0) == ["s"] and not store.sessions
    store.save(dict(entry(i) for i in range(10, 14)))
    store.check_integrity()


@pytest.mark.parametrize("seed", range(4))
def test_bit_flips_are_refused(seed: int, tmp_path: Path) -> None:
    """250 random flips, one at a time: what comes back is what was saved, or nothing."""
    r, store = random.Random(seed), open_(tmp_path)
    for number in range(250):
        key, pages = entry(number, 1 + number % 3)
        store.save({key: pages})
        files = list((tmp_path / "pages").glob("*/*"))
        file = r.choice(files)
        data = bytearray(file.read_bytes())
        data[r.randrange(PAGE)] ^= 1 << r.randrange(8)
        file.write_bytes(data)
        assert store.fetch(key) is None and key not in store
        store.check_integrity()
    assert store.refused == 250
    key, pages = entry(1000)
    store.save({key: pages})
    next((tmp_path / "pages").glob("*/*")).write_bytes(b"")
    assert store.fetch(key) is None


def test_a_full_or_broken_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th system call of a save fails, for every n: an error that names the folder, and the old state."""
    before, entries = dict([entry(1)]), dict(entry(i) for i in range(2, 6))
    calls = 0

    def save(folder: Path, error: int, nth: int) -> RequestError | None:
        nonlocal calls
        calls = 0

        def guard(real: Any, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(error, os.strerror(error))
            return real(*args, **options)

        with open_closing(folder) as store, monkeypatch.context() as patch:
            store.save(before, session("old", list(before)))
            for name in ("open", "write", "fsync", "replace"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda *a, real=real, **o: guard(real, *a, **o))
            try:
                store.save(entries, session("new", list(entries)))
            except RequestError as caught:
                return caught
        return None

    assert save(tmp_path / "whole", 0, 0) is None
    points = calls
    for error in (errno.ENOSPC, errno.EIO):
        for nth in range(1, points + 1):
            folder = tmp_path / f"{error}-{nth}"
            caught = save(folder, error, nth)
            assert str(folder) in str(caught) and os.strerror(error) in str(caught)
            with open_closing(folder) as store:
                store.check_integrity()
                assert not any(key in store for key in entries) and set(store.sessions) == {"old"}
                assert all(store.fetch(key) == pages for key, pages in before.items())
    assert points > 16  # four files at least: opened, written, synced, renamed


WORK = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.runtime.test_disk import entry, open_, session
nth, calls = int(sys.argv[2]), 0
def stop():
    global calls
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
def before(real):
    def call(*args, **options):
        stop()
        return real(*args, **options)
    return call
store = open_(Path(sys.argv[1]))
for name in ("open", "write", "fsync", "replace"):
    setattr(os, name, before(getattr(os, name)))
store._db.set_trace_callback(lambda statement: stop())
for number in range(1000):
    entries = dict(entry(3 * number + i) for i in range(3))
    store.save(entries, session(f"s{number}", list(entries)))
    print(number, flush=True)
"""


@pytest.mark.parametrize("points", [pytest.param(12, id="some"), pytest.param(200, id="many", marks=pytest.mark.slow)])
def test_killed_at_any_point(points: int, tmp_path: Path) -> None:
    """What was said to be committed is there and whole; nothing is half; and the folder can be used again."""
    r, root = random.Random(points), Path(__file__).parents[2]
    for point in range(points):
        folder = tmp_path / str(point)
        done = subprocess.run([sys.executable, "-c", WORK, str(folder), str(r.randrange(1, 150)), str(root)],
                              capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == -9, done.stderr
        said = [int(line) for line in done.stdout.split()]
        store = open_(folder)
        store.check_integrity()
        assert {f"s{n}" for n in said} <= set(store.sessions) <= {f"s{n}" for n in [*said, len(said)]}
        for made in store.sessions.values():
            number = int(made.name[1:])
            assert [store.fetch(key) for key in made.needs] == [entry(3 * number + i)[1] for i in range(3)]
        assert not list((folder / "pages").glob("*/*.part"))
        store.save(dict([entry(10_000)]))
        store.close()


def test_saving_is_quick_enough(tmp_path: Path) -> None:
    """Not a benchmark: a session of a hundred pages does not take minutes."""
    store, start = open_(tmp_path, 1 << 30), time.monotonic()
    entries = dict(entry(i) for i in range(100))
    store.save(entries, session("s", list(entries)))
    assert time.monotonic() - start < 30


def test_memory_is_bounded() -> None:
    ram = RamStore(3 * PAGE)
    entries = [entry(i) for i in range(4)]
    assert [ram.put(*e) for e in entries[:3]] == [[], [], []]
    assert ram.fetch(entries[0][0]) == entries[0][1]
    assert ram.put(*entries[3]) == [entries[1]] and entries[1][0] not in ram and len(ram) == 3
    large = entry(5, 4)
    assert ram.put(*large)[-1] == large and large[0] not in ram
    ram.check_integrity()
    ram.used += 1
    with pytest.raises(ValueError, match="counts"):
        ram.check_integrity()
    with pytest.raises(RequestError, match="-1 bytes"):
        RamStore(-1)


def test_what_is_leased_in_memory_stays() -> None:
    ram = RamStore(3 * PAGE)
    entries = [entry(i) for i in range(5)]
    for e in entries[:2]:
        ram.put(*e)
    ram.lease(entries[0][0])
    ram.lease(entries[0][0])
    ram.lease(entries[4][0])  # not there yet
    assert ram.leased == 1 and ram.is_leased(entries[4][0])
    assert ram.put(*entries[2]) == [] and ram.put(*entries[3]) == [entries[1]]
    assert ram.put(*entries[4]) == [entries[2]] and ram.leased == 2
    assert ram.put(*entries[1]) == [entries[3]] and ram.put(*entry(6, 2)) == [entry(6, 2)]
    ram.check_leases([entries[0][0], entries[0][0], entries[4][0]])
    with pytest.raises(ValueError, match="leases and the tier"):
        ram.check_leases([])
    ram.unlease(entries[0][0])
    assert ram.leased == 2
    ram.unlease(entries[0][0])
    assert ram.leased == 1 and ram.put(*entries[2]) == [entries[1]]  # as recently used as can be
    ram.check_integrity()
    with pytest.raises(ValueError, match="more often"):
        ram.unlease(entries[0][0])
    ram.leased += 1
    with pytest.raises(ValueError, match="leased blocks"):
        ram.check_integrity()


def test_on_disk_who_has_most_gives_first(tmp_path: Path) -> None:
    """One owner's many sessions, however many names it takes for them, leave others their share."""
    store = open_(tmp_path, 8 * PAGE)

    def save(name: str, start: int, count: int) -> None:
        entries = dict(entry(i) for i in range(start, start + count))
        store.save(entries, session(name, list(entries)))

    for i in range(4):
        save(f"greedy:{i}", 10 * i, 2)
    with pytest.raises(RequestError, match="held by saved sessions"):
        save("greedy:5", 50, 1)
    assert len(store.sessions) == 4
    save("meek:1", 60, 1)
    assert set(store.sessions) == {"greedy:1", "greedy:2", "greedy:3", "meek:1"}
    save("greedy:1", 10, 2)  # saved again: no longer the first to go
    save("meek:2", 70, 3)
    assert set(store.sessions) == {"greedy:1", "greedy:3", "meek:1", "meek:2"}
    with pytest.raises(RequestError, match="held by saved sessions"):
        save("meek:3", 80, 1)
    with pytest.raises(RequestError, match="do not fit"):
        save("new:1", 90, 9)
    assert len(store.sessions) == 4, "none is forgotten for what cannot be"
    with pytest.raises(RequestError, match="held by saved sessions"):
        store.save(dict([entry(100)]))
    store.close()
    store = open_(tmp_path, 8 * PAGE)
    assert list(store.sessions) == ["greedy:3", "meek:1", "greedy:1", "meek:2"], "the order outlives the process"
    store.close()
