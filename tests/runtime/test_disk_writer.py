"""Sessions that are saved on a thread of their own."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferloom.runtime.params import SamplingParams
from inferloom.runtime.tiers.disk import DiskStore
from inferloom.runtime.tiers.tiers import Tiers
from inferloom.runtime.tiers.writer import DiskWriter
from tests.runtime.fake import FakeDevice, finish, make_engine
from tests.runtime.test_disk import PAGE, entry, open_, session
from tests.runtime.test_sessions import BLOCKS, SIZE, crowd, say


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A disk whose syncs wait: set when one has begun, and to be set so that it ends."""
    begun, go = threading.Event(), threading.Event()
    real = os.fsync

    def wait(descriptor: int) -> None:
        begun.set()
        assert go.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    yield begun, go
    go.set()


@pytest.fixture
def open_writer(tmp_path: Path) -> Iterator[Callable[..., tuple[DiskStore, DiskWriter]]]:
    made: list[tuple[DiskStore, DiskWriter]] = []

    def new(capacity: int = 1 << 20, most: int = 1 << 20) -> tuple[DiskStore, DiskWriter]:
        store = open_(tmp_path, capacity)
        made.append((store, DiskWriter(store, most)))
        return made[-1]

    yield new
    for store, writer in made:
        writer.close()
        if store._lock >= 0:
            store.check_integrity()
        store.close()


def test_no_step_waits_for_it(slow: tuple[threading.Event, threading.Event], tmp_path: Path) -> None:
    begun, go = slow
    device = FakeDevice(BLOCKS, SIZE)
    disk = DiskStore(tmp_path, "toy", device.block_bytes, 1 << 20)
    tiers = Tiers(device.block_bytes, None, disk, writer=DiskWriter(disk))
    engine = make_engine(BLOCKS, SIZE, device=device, tiers=tiers)
    assert engine.sessions is not None and tiers.writer is not None
    engine.add_request("r", list(range(20)), SamplingParams(temperature=0, max_tokens=6), session="agent", hold=60.0,
                       place="disk")
    done = finish(engine)["r"]
    said = [*range(20), *done.outputs[0].token_ids]
    assert done.held is not None and (done.held.status, done.held.place, done.held.blocks) == ("deferred", "disk", 6)
    assert begun.wait(30)
    crowd(engine)  # takes all blocks while the disk does nothing
    assert not engine.sessions.info("agent").saved and engine.sessions.info("agent").on_disk == 0
    go.set()
    tiers.writer.flush()
    info = engine.sessions.info("agent")
    assert info.saved and info.on_disk == info.blocks == 6 and tiers.writer.failed == 0
    assert engine.sessions.resume("agent").status == "accepted"
    assert say(engine, [*said, 1]) == say(make_engine(), [*said, 1])
    engine.check_integrity()
    tiers.close()


@pytest.mark.parametrize("again", [False, True])
def test_what_waits_can_be_read(slow: tuple[threading.Event, threading.Event], tmp_path: Path, again: bool) -> None:
    """The disk does nothing, and the pool has forgotten it: it is computed nowhere again."""
    begun, go = slow
    device = FakeDevice(BLOCKS, SIZE)
    disk = DiskStore(tmp_path, "toy", device.block_bytes, 1 << 20)
    tiers = Tiers(device.block_bytes, None, disk, writer=DiskWriter(disk))
    tiers.costs.compute.guess = 1e-3  # so that bringing anything back is worth it
    engine = make_engine(BLOCKS, SIZE, device=device, tiers=tiers)
    assert engine.sessions is not None and tiers.writer is not None and tiers.empty
    said = say(engine, list(range(20)), session="agent")
    assert engine.sessions.pause("agent", 60.0, place="disk").status == "deferred"
    assert begun.wait(30)
    crowd(engine)
    info = engine.sessions.info("agent")
    assert (info.pooled, info.in_ram, info.on_disk, info.saved) == (0, 6, 0, False) and not tiers.empty
    if again:  # from where it waits, back to where it waits
        assert engine.sessions.pause("agent", 60.0, place="disk").blocks == 6
    before = device.computed
    assert say(engine, [*said, 1], session="agent") == say(make_engine(), [*said, 1])
    assert device.computed - before == 27 - 24 + 5 and tiers.fetched_disk == 0
    assert tiers.fetched_ram == (12 if again else 6)
    go.set()
    tiers.writer.flush()
    assert tiers.writer.empty and disk.sessions["agent"].needs and len(disk) == 6
    assert not any(key in tiers.writer for key in disk.sessions["agent"].needs)
    crowd(engine)
    before = device.computed
    assert say(engine, [*said, 2]) == say(make_engine(), [*said, 2])
    assert device.computed - before == 27 - 24 + 5 and tiers.fetched_disk == 6
    engine.check_integrity()
    tiers.close()


def test_reading_while_it_is_written(open_writer: Callable[..., Any]) -> None:
    """Between the writer and the disk nothing is ever nowhere."""
    store, writer = open_writer()
    tiers = Tiers(PAGE, None, store, writer=writer)
    for i in range(20):
        key, pages = entry(i)
        assert writer.put({key: pages}, session(f"s{i % 3}", [key]))
        seen = 0
        while key in writer or not seen:
            assert key in tiers and tiers.fetch(key) == pages
            seen += 1
        assert tiers.fetch(key) == pages
    assert tiers.fetched_ram and tiers.fetched_disk


def test_what_waits_is_written_before_the_end(open_writer: Callable[..., Any], tmp_path: Path) -> None:
    store, writer = open_writer()
    for i in range(8):
        assert writer.put(dict([entry(i)]), session(f"s{i}", [entry(i)[0]]))
    writer.close()
    assert not writer.put(dict([entry(9)]), session("late", []))
    store.close()
    with_restart = open_(tmp_path)
    assert set(with_restart.sessions) == {f"s{i}" for i in range(8)}
    assert all(with_restart.fetch(entry(i)[0]) == entry(i)[1] for i in range(8))
    with_restart.close()


def test_a_session_that_is_closed_is_not_saved(slow: tuple[threading.Event, threading.Event],
                                               open_writer: Callable[..., Any]) -> None:
    begun, go = slow
    store, writer = open_writer()
    for name in ("written", "waits", "stays"):
        writer.put(dict([entry(len(name))]), session(name, [entry(len(name))[0]]))
    assert begun.wait(30)
    for name in ("written", "waits"):
        writer.cancel(name)
    go.set()
    writer.flush()
    store.check_integrity()
    assert set(store.sessions) == {"stays"} and entry(7)[0] not in store


def test_what_waits_is_bounded(slow: tuple[threading.Event, threading.Event], open_writer: Callable[..., Any]) -> None:
    begun, go = slow
    store, writer = open_writer(most=3 * PAGE)
    assert writer.put(dict(entry(i) for i in range(5)), session("large, but alone", []))
    assert begun.wait(30)
    assert not writer.put(dict(entry(i) for i in range(5, 9)), session("large", []))
    assert writer.put(dict(entry(i) for i in range(9, 11)), session("first", []))
    assert writer.put(dict([entry(11)]), session("second", [])) and writer.put(dict([entry(12)]), session("second", []))
    assert not writer.put(dict([entry(13)]), session("third", []))
    assert not writer.put(dict(entry(i) for i in range(14, 16)), session("second", []))  # the one before stays
    go.set()
    writer.flush()
    assert list(store.sessions) == ["large, but alone", "first", "second"] and not writer.failed
    assert [entry(i)[0] in store for i in range(16)] == [True] * 5 + [False] * 4 + [True] * 2 + [False, True] + [False] * 3
    assert writer.put(dict(entry(i) for i in range(20, 24)), session("large", []))
    writer.flush()
    assert "large" in store.sessions


def test_who_has_most_of_what_waits_gives(slow: tuple[threading.Event, threading.Event],
                                          open_writer: Callable[..., Any]) -> None:
    begun, go = slow
    store, writer = open_writer(most=6 * PAGE)
    for i in range(7):
        assert writer.put(dict([entry(i)]), session(f"a:{i}", []))
        assert begun.wait(30)  # a:0 is being written
    assert not writer.put(dict([entry(7)]), session("a:7", []))
    assert writer.put(dict(entry(i) for i in range(10, 12)), session("b:0", []))  # in the place of a:6 and a:5
    assert writer.failed == 2 and entry(5)[0] not in writer and entry(4)[0] in writer
    assert not writer.put(dict(entry(i) for i in range(20, 24)), session("c:0", [])) and writer.failed == 2
    assert writer.put(dict([entry(20)]), session("c:0", [])) and writer.failed == 3  # of a:4
    assert writer.put(dict(entry(i) for i in range(30, 33)), session("b:0", [])) is False  # a would have less than b
    assert entry(10)[0] in writer and entry(30)[0] not in writer
    go.set()
    writer.flush()
    assert set(store.sessions) == {"a:0", "a:1", "a:2", "a:3", "b:0", "c:0"} and writer.empty


def test_owners_take_turns(slow: tuple[threading.Event, threading.Event], open_writer: Callable[..., Any]) -> None:
    begun, go = slow
    store, writer = open_writer()
    for i, name in enumerate(("a:0", "a:1", "a:2", "a:3", "b:0", "b:1", "nobody's")):
        assert writer.put(dict([entry(i)]), session(name, []))
    assert begun.wait(30)
    go.set()
    writer.flush()
    assert list(store.sessions) == ["a:0", "a:1", "b:0", "nobody's", "a:2", "b:1", "a:3"]


def test_a_full_disk_fails_one_and_not_the_next(open_writer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    store, writer = open_writer(capacity=4 * PAGE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.put(dict([entry(1)]), session("a", [entry(1)[0]]))
        writer.flush()
    writer.put(dict(entry(i) for i in range(9)), session("b", []))
    writer.put(dict([entry(2)]), session("c", [entry(2)[0]]))
    writer.flush()
    assert writer.failed == 2 and set(store.sessions) == {"c"}


def test_pages_that_are_damaged_meanwhile_are_left_out(slow: tuple[threading.Event, threading.Event],
                                                       open_writer: Callable[..., Any]) -> None:
    """A page that was there already is not written again; here it goes while the others are written."""
    begun, go = slow
    store, writer = open_writer()
    go.set()
    (old, page), (new, other) = entry(1), entry(2)
    store.save({old: page})
    begun.clear()
    go.clear()
    writer.put({(0, b"equal"): page, new: other}, session("s", [(0, b"equal"), new]))
    assert begun.wait(30)
    next(store.path.glob(f"pages/*/{store._by_key[old][0]}")).write_bytes(b"?" * PAGE)
    assert store.fetch(old) is None
    go.set()
    writer.flush()
    assert (0, b"equal") not in store and store.fetch(new) == other and "s" in store.sessions


def test_a_disk_too_full_to_forget_fails_nobody(tmp_path: Path) -> None:
    store = open_(tmp_path)
    store.save(dict([entry(1)]), session("s", [entry(1)[0]], expires=5.0))
    real, store._db = store._db, _Full()  # type: ignore[assignment]
    assert store.expire(6.0) == ["s"] and not store.sessions
    store._forget([entry(1)[0]])
    store._db = real
    assert store.fetch(entry(1)[0]) is None
    store.save(dict([entry(1)]))
    assert store.fetch(entry(1)[0]) == entry(1)[1]
    store.check_integrity()
    store.close()


class _Full:
    def __enter__(self) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def __exit__(self, *_: object) -> None:
        raise AssertionError("it was not entered")
