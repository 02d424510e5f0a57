"""Sessions pause in every place, come back as if they had never been away, and outlive their process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from inferloom.runtime.engine import Engine
from inferloom.runtime.errors import RequestError
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.state import ALL_KEYS, Group
from inferloom.runtime.tiers.disk import DiskStore
from inferloom.runtime.tiers.policy import PLACES, Costs, Rate
from inferloom.runtime.tiers.ram import RamStore
from inferloom.runtime.tiers.tiers import Tiers
from tests.runtime.fake import VOCAB, FakeDevice, finish, make_engine

KINDS = {"all keys": ALL_KEYS, "windows": (Group(), Group(2, window=6)), "recurrent": (Group(recurrent=True),),
         "hybrid": (Group(2), Group(1, window=9), Group(recurrent=True))}
BLOCKS, SIZE = 48, 4


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Known(Rate):
    """A speed that is not measured: the fake device computes faster than any disk reads."""

    def add(self, amount: float, seconds: float) -> None:
        pass


def start(groups: tuple[Group, ...] = ALL_KEYS, ram: int | None = 1 << 20, folder: Path | None = None, compute: float = 1000.0,
          **options: Any) -> Engine:
    device = FakeDevice(BLOCKS, SIZE, groups)
    disk = DiskStore(folder, "toy", device.block_bytes, 1 << 20) if folder is not None else None
    tiers = Tiers(device.block_bytes, RamStore(ram) if ram is not None else None, disk,
                  Costs(Known(compute), Known(1e9), Known(1e8)))
    return make_engine(BLOCKS, SIZE, groups=groups, device=device, tiers=tiers, **options)


def say(engine: Engine, prompt: list[int], made: int = 6, **options: Any) -> list[int]:
    engine.add_request("r", prompt, SamplingParams(temperature=0, max_tokens=made, ignore_eos=True), **options)
    output = finish(engine)["r"]
    assert output.error is None
    return [*prompt, *output.outputs[0].token_ids]


def crowd(engine: Engine) -> None:
    """Other requests that need the whole pool."""
    r = random.Random(1)
    for i in range(40):
        engine.add_request(f"other {i}", [r.randrange(VOCAB) for _ in range(40)], SamplingParams(max_tokens=4, seed=i))
    finish(engine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["keep", "ram", "disk", "discard"])
def test_it_comes_back_as_if_it_had_not_been_away(kind: str, place: str, tmp_path: Path) -> None:
    prompt = [random.Random(7).randrange(VOCAB) for _ in range(21)]
    never = make_engine(BLOCKS, SIZE, groups=KINDS[kind])
    want = say(never, [*say(never, prompt), 5, 6, 7])
    # Without a tier in memory, evicted blocks are gone: what comes back is what was paused.
    engine = start(KINDS[kind], 1 << 20 if place == "ram" else None, tmp_path / "state")
    assert engine.sessions is not None
    said = say(engine, prompt, session="agent")
    outcome = engine.sessions.pause("agent", 60.0, place=place)
    assert (outcome.status, outcome.place) == ("accepted", place)
    crowd(engine) if place != "keep" else None
    before = engine.device.computed  # type: ignore[attr-defined]
    assert say(engine, [*said, 5, 6, 7], session="agent") == want
    computed = engine.device.computed - before  # type: ignore[attr-defined]
    assert computed == (35 if place == "discard" else 11)  # from the end of the last whole block, or all
    engine.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_it_outlives_the_process(kind: str, tmp_path: Path) -> None:
    prompt = [random.Random(3).randrange(VOCAB) for _ in range(21)]
    first = start(KINDS[kind], folder=tmp_path)
    said = say(first, prompt, session="agent")
    assert first.sessions is not None and first.sessions.pause("agent", 60.0, place="disk").status == "accepted"
    first.tiers.close()
    second = start(KINDS[kind], folder=tmp_path)
    assert second.sessions is not None
    (info,) = second.sessions.list()
    assert (info.name, info.tokens, info.saved, info.pooled, info.on_disk) == ("agent", 26, True, 0, info.blocks)
    assert second.sessions.resume("agent").status == "accepted"
    assert second.sessions.info("agent").pooled == info.blocks
    assert say(second, [*said, 1], session="agent") == say(make_engine(groups=KINDS[kind]), [*said, 1])
    assert second.device.computed == 28 - 24 + 5  # type: ignore[attr-defined]
    assert second.sessions.close("agent") and not second.sessions.close("agent") and not second.tiers.disk.sessions  # type: ignore[union-attr]
    second.check_integrity()


def test_what_the_pool_gives_up_comes_back_from_memory() -> None:
    engine = start(ram=1 << 20)
    said = say(engine, list(range(30)))
    crowd(engine)
    before = engine.device.computed  # type: ignore[attr-defined]
    assert say(engine, [*said, 1]) == say(make_engine(), [*said, 1])
    assert engine.device.computed - before == 37 - 32 + 5  # type: ignore[attr-defined]
    assert engine.tiers.fetched_ram > 0


def test_a_lease_holds_while_others_come_and_go() -> None:
    clock = Clock()
    engine = start(ram=None, compute=1.0, clock=clock)
    assert engine.sessions is not None
    said = say(engine, list(range(20)), session="agent", hold=30.0)
    assert engine.sessions.info("agent").leased == 30.0
    for i in range(20):
        say(engine, [VOCAB - 1 - i, *range(10)])
    assert engine.sessions.info("agent").pooled == 6
    clock.now += 31
    for i in range(20):
        say(engine, [VOCAB - 1 - i, *range(20, 30)])
    assert engine.sessions.info("agent").leased == 0 and engine.sessions.info("agent").pooled < 6
    assert engine.sessions.resume("agent").status in ("clipped", "rejected")
    assert say(engine, [*said, 1]) == say(make_engine(), [*said, 1])


def test_damaged_pages_are_computed_again(tmp_path: Path) -> None:
    engine = start(ram=None, folder=tmp_path)
    assert engine.sessions is not None
    said = say(engine, list(range(20)), session="agent")
    assert engine.sessions.pause("agent", 60.0, place="disk").status == "accepted"
    crowd(engine)
    for file in (tmp_path / "pages").glob("*/*"):
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    assert say(engine, [*said, 1]) == say(make_engine(), [*said, 1])
    assert engine.tiers.disk is not None and engine.tiers.disk.refused == 6 and engine.tiers.fetched_disk == 0
    engine.check_integrity()


def test_what_cannot_be() -> None:
    engine = start(ram=64)
    assert engine.sessions is not None
    say(engine, [1, 2], made=1, session="short")
    assert engine.sessions.pause("short", 1.0).status == "rejected"
    say(engine, list(range(20)), session="agent")
    assert engine.sessions.pause("agent", 1.0, place="disk").why == "there is no disk tier"
    assert engine.sessions.pause("agent", 1.0, place="ram").why == "it is larger than the tier in memory, 64 bytes"
    for call, message in ((lambda: engine.sessions.pause("nobody", 1.0), "no session 'nobody'"),  # type: ignore[union-attr]
                          (lambda: engine.sessions.pause("agent", 0.0), "longer than 0"),  # type: ignore[union-attr]
                          (lambda: engine.sessions.pause("agent", 1.0, place="attic"), "place 'attic'"),  # type: ignore[union-attr]
                          (lambda: say(engine, [1], session="a\n"), "printable"),
                          (lambda: say(engine, [1], hold=1.0), "needs a session"),
                          (lambda: say(make_engine(prefix_caching=False), [1], session="a"), "switched off")):
        with pytest.raises(RequestError, match=message):
            call()
    without = start(ram=None)
    assert without.sessions is not None
    say(without, list(range(20)), session="agent")
    assert without.sessions.pause("agent", 1.0, place="ram").why == "there is no tier in memory"


def test_the_cheapest_place() -> None:
    costs = Costs(compute=Rate(1000.0), ram=Rate(1e9), disk=Rate(1e8))

    def choose(tokens: int, bytes: int, pause: float, pressure: float, running: int = 0) -> str:
        return costs.order(PLACES, tokens=tokens, bytes=bytes, pause=pause, pressure=pressure, running=running)[0]

    assert choose(tokens=1000, bytes=10**8, pause=60, pressure=0.0) == "keep"
    assert choose(tokens=1000, bytes=10**8, pause=60, pressure=0.9) == "ram"
    assert choose(tokens=1000, bytes=10**8, pause=0.1, pressure=0.9) == "keep"
    assert choose(tokens=10, bytes=10**8, pause=60, pressure=0.9) == "discard"
    # What runs has to wait while a session's state moves or is computed again, but not while it stays.
    assert choose(tokens=1000, bytes=10**8, pause=1, pressure=0.9, running=0) == "ram"
    assert choose(tokens=1000, bytes=10**8, pause=1, pressure=0.9, running=10**9) == "keep"
    rate = Rate(1.0)
    rate.add(100, 1.0)
    rate.add(200, 1.0)
    rate.add(0, 1.0)
    assert rate.guess == pytest.approx(120)


def test_auto_takes_the_next_place_when_one_is_full(tmp_path: Path) -> None:
    page = FakeDevice(BLOCKS, SIZE).block_bytes
    engine = start(ram=12 * page, folder=tmp_path, compute=1.0)
    assert engine.sessions is not None and engine.tiers.ram is not None
    prompts = {f"agent {i}": [i, *range(20)] for i in range(4)}
    said, places = {}, []
    for name, prompt in prompts.items():
        said[name] = say(engine, prompt, session=name, hold=1000.0)
        crowd(engine)  # what is not held is pushed out of the pool, and out of memory
        places.append(next(p for p in ("keep", "ram", "disk") if {"keep": engine.sessions.info(name).pooled,
                                                                  "ram": engine.sessions.info(name).in_ram,
                                                                  "disk": engine.sessions.info(name).on_disk}[p] == 6))
    assert places == ["ram", "ram", "disk", "disk"]
    assert engine.tiers.ram.leased == 12 and engine.tiers.ram.put((0, b"other"), (bytes(page),)) != []
    before = engine.device.computed  # type: ignore[attr-defined]
    for name, tokens in said.items():
        assert say(engine, [*tokens, 1], session=name) == say(make_engine(), [*tokens, 1])
        engine.check_integrity()
    assert engine.device.computed - before == 4 * (28 - 24 + 5)  # type: ignore[attr-defined]
    assert engine.tiers.ram.leased == 0


def test_memory_is_held_for_who_was_first() -> None:
    clock, page = Clock(), FakeDevice(BLOCKS, SIZE).block_bytes
    engine = start(ram=10 * page, clock=clock)
    assert engine.sessions is not None
    for name in ("a", "b"):
        say(engine, [40 + ord(name) % 8, *range(20)], session=name)
    assert engine.sessions.pause("a", 2 * 86400, place="ram").why == "leases last 86400 s at most"
    assert engine.sessions.info("a").leased == 86400
    crowd(engine)
    assert engine.sessions.info("a").in_ram == 6
    say(engine, [40 + ord("b") % 8, *range(20)], session="b")
    assert engine.sessions.pause("b", 1.0, place="ram").why == "others are held in the tier in memory"
    clock.now += 86400
    engine.sessions.tick()
    assert engine.sessions.pause("b", 1.0, place="ram").status == "accepted"
    assert engine.sessions.info("a").in_ram == 4
    engine.check_integrity()


def test_too_many_are_the_fault_of_who_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferloom.runtime.sessions.MAX_SESSIONS", 4)
    engine = start(ram=None)
    sessions = engine.sessions
    assert sessions is not None
    for name in ("a:1", "b:1", "b:2", "b:3", "b:4"):
        say(engine, list(range(20)), session=name)
    assert [s.name for s in sessions.list()] == ["a:1", "b:2", "b:3", "b:4"]
    found, more = sessions.newest("b:", 2)
    assert [s.name for s in found] == ["b:4", "b:3"] and more
    monkeypatch.setattr("inferloom.runtime.sessions.MAX_TOKENS", 60)
    say(engine, list(range(20)), session="c:1")
    assert [s.name for s in sessions.list()] == ["b:4", "c:1"]
    sessions.remember("c:1", list(range(61)))
    sessions.remember("d:1", list(range(61)))
    assert [s.name for s in sessions.list()] == ["d:1"]


def test_what_one_place_cannot_take_waits_in_another(tmp_path: Path) -> None:
    engine = start(ram=None, compute=0.001)
    assert engine.sessions is not None
    engine.add_request("r", list(range(20)), SamplingParams(max_tokens=4), session="agent", hold=86400.0, place="disk")
    held = finish(engine)["r"].held
    assert held is not None and (held.status, held.place, held.seconds) == ("clipped", "keep", 3600.0)
    assert held.why == "disk: there is no disk tier; leases last 3600 s at most"
    # What is to stay in memory is never written to disk, however cheap that were.
    engine = start(ram=None, folder=tmp_path, compute=0.001)
    assert engine.sessions is not None
    say(engine, list(range(20)), session="agent")
    crowd(engine)
    say(engine, list(range(20)), session="agent")
    assert engine.sessions.pause("agent", 1e4).place == "disk"
    assert engine.sessions.pause("agent", 1e4, place="memory").place == "keep"
    with pytest.raises(RequestError, match="place 'attic'"):
        say(engine, [1], session="a", hold=1.0, place="attic")


@pytest.mark.parametrize("place", ["keep", "ram", "disk"])
def test_what_is_shared_is_shared_out(place: str, tmp_path: Path) -> None:
    """An owner's many sessions fill a place, and leave room there for another's one."""
    page = FakeDevice(BLOCKS, SIZE).block_bytes
    engine = start(ram=12 * page, folder=tmp_path, clock=Clock())
    assert engine.sessions is not None and engine.tiers.disk is not None
    engine.leases.most, engine.tiers.disk.capacity = 12, 12 * page
    for i, (name, status) in enumerate({"a:1": "accepted", "a:2": "accepted", "a:3": "rejected", "b:1": "accepted",
                                        "b:2": "rejected"}.items()):
        say(engine, [7 * i + j for j in range(21)], session=name)  # equal pages would be on disk once
        assert engine.sessions.pause(name, 60.0, place=place).status == status, name
        engine.check_integrity()
    info = engine.sessions.info("b:1")
    assert info.saved if place == "disk" else info.leased == 60.0
    lost = engine.sessions.info("a:1")
    assert not lost.saved and lost.leased == 0
