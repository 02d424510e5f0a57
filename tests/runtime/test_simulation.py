"""Random lives of the engine: nothing leaks, nothing is read that is another's, and every request ends once."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from inferloom.runtime.engine import Engine
from tests.runtime.simulator import Event, events, live, shrink, world


@pytest.mark.parametrize("steps", [pytest.param(100_000, id="some"), pytest.param(1_000_000, id="many", marks=pytest.mark.slow)])
def test_lives(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # what the disk makes of it has tests of its own
    done, hits, restarts, preemptions, fetched = 0, 0, 0, 0, 0
    for seed in count(steps):
        happenings = events(seed, 1000)
        try:
            life = live(world(seed), happenings, tmp_path / str(seed))
        except Exception as error:
            few = shrink(lambda some: _fails(seed, some, tmp_path), happenings)
            pytest.fail(f"seed {seed} in {world(seed)}: {error!r}; these events are enough: {few}")
        done, restarts = done + life.steps, restarts + life.restarts
        stats, tiers = life.engine.stats(), life.engine.tiers
        hits, preemptions = hits + stats.prefix_hits, preemptions + stats.preemptions
        fetched += tiers.fetched_ram + tiers.fetched_disk
        if done >= steps:
            break
    assert min(hits, restarts, preemptions, fetched) > 0


def _fails(seed: int, some: list[Event], folder: Path) -> bool:
    try:
        live(world(seed), some, folder / f"{seed}-{next(_NUMBERS)}", _BUGS.get(seed, lambda engine: None))
    except Exception:
        return True
    return False


_NUMBERS = count()


def _forgetful(engine: Engine) -> None:
    """A bug: blocks that are found in the cache are not held."""
    engine.pool.retain = lambda block: None  # type: ignore[method-assign]


def _mistaken(engine: Engine) -> None:
    """A bug: what comes back from below is written one block further."""
    below = engine.cache.below  # type: ignore[union-attr]
    wrong = lambda block, page: engine.device.write_block((block + 1) % engine.pool.size, page)  # noqa: E731
    object.__setattr__(below, "write", wrong)


_BUGS = {7: _forgetful, 11: _mistaken}


@pytest.mark.parametrize("seed", _BUGS)
def test_bugs_are_found_and_shrunk(seed: int, tmp_path: Path) -> None:
    """Negative controls."""
    happenings = events(seed, 200)
    assert not _alive(seed, happenings, tmp_path)
    few = shrink(lambda some: _fails(seed, list(some), tmp_path), happenings)
    assert 1 <= len(few) <= 30 and _fails(seed, few, tmp_path)
    live(world(seed), few, tmp_path / "without")


def _alive(seed: int, happenings: list[Event], folder: Path) -> bool:
    return not _fails(seed, happenings, folder)
