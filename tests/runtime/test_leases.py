"""Leases keep cached state in the pool for a while, and stand in nobody's way."""

from __future__ import annotations

import random

import pytest

from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.leases import Leases


def cached(pool: BlockPool, name: bytes, count: int = 1) -> tuple[int, bytes]:
    """Cache `count` blocks under a key and let them go."""
    blocks = tuple(pool.allocate() for _ in range(count))
    pool.register(blocks, (0, name))
    for block in blocks:
        pool.release(block)
    return 0, name


def test_leased_blocks_go_last_and_go_then() -> None:
    pool = BlockPool(4)
    leases = Leases(pool, most=2)
    old, new = cached(pool, b"old"), cached(pool, b"new")
    assert leases.take("s", [old], 10.0, now=0.0).status == "accepted"
    taken = [pool.allocate() for _ in range(3)]
    assert pool.lookup(old) is not None and pool.lookup(new) is None
    taken.append(pool.allocate())
    assert pool.lookup(old) is None and pool.available == 0
    pool.check_integrity(taken)
    leases.check_integrity()
    leases.drop("s")
    leases.check_integrity()


def test_a_lease_ends_by_itself_and_is_ordinary_cache_then() -> None:
    pool = BlockPool(3)
    leases = Leases(pool, most=3, longest=5.0)
    first = cached(pool, b"a")
    outcome = leases.take("s", [first], 60.0, now=0.0)
    assert (outcome.status, outcome.seconds, outcome.why) == ("clipped", 5.0, "leases last 5 s at most")
    leases.expire(4.9)
    assert leases.remaining("s", 4.0) == 1.0 and pool.is_leased(first) and leases.blocks == 1
    leases.expire(5.0)
    assert not pool.is_leased(first) and leases.blocks == 0 and leases.remaining("s", 5.0) == 0
    for _ in range(3):
        pool.allocate()
    assert pool.lookup(first) is None


def test_leases_hold_a_bounded_share() -> None:
    pool = BlockPool(8)
    leases = Leases(pool, most=3)
    keys = [cached(pool, bytes([i]), 2) for i in range(3)]
    outcome = leases.take("a", keys, 1.0, now=0.0)
    assert (outcome.status, outcome.blocks, outcome.why) == ("clipped", 2, "leases hold 3 blocks at most")
    assert leases.take("b", keys[:1], 1.0, now=0.0).status == "accepted"  # what is leased already takes no more room
    assert leases.take("c", keys[1:], 1.0, now=0.0).status == "rejected"
    assert leases.take("d", [(0, b"unknown")], 1.0, now=0.0).why == "not all of it is there"
    assert leases.take("e", keys, 0.0, now=0.0).status == "rejected"
    assert leases.take("f", [], 1.0, now=0.0).why == "there is nothing to hold"


def test_books_that_disagree_are_noticed() -> None:
    pool = BlockPool(2)
    leases = Leases(pool, most=2)
    key = cached(pool, b"a")
    pool.lease(key)
    with pytest.raises(ValueError, match="leases and the pool disagree"):
        leases.check_integrity()
    pool.unlease(key)
    leases.check_integrity()
    with pytest.raises(ValueError, match="more often than it was leased"):
        pool.unlease(key)


@pytest.mark.parametrize("seed", range(20))
def test_random_use(seed: int) -> None:
    r, pool = random.Random(seed), BlockPool(12)
    leases, held, now = Leases(pool, most=6), list[int](), 0.0
    for i in range(400):
        now += r.random()
        action = r.randrange(5)
        if action == 0 and pool.available:
            block = pool.allocate()
            pool.register((block,), (0, bytes([r.randrange(20)])))
            held.append(block)
        elif action == 1 and held:
            pool.release(held.pop(r.randrange(len(held))))
        elif action == 2:
            name = f"{r.choice('ab')}:{r.randrange(4)}"
            leases.take(name, [(0, bytes([r.randrange(20)])) for _ in range(3)], r.random() * 8, now)
        elif action == 3:
            leases.expire(now)
        elif (found := pool.lookup((0, bytes([r.randrange(20)])))) is not None:
            pool.retain(found[0])
            held.append(found[0])
        pool.check_integrity(held)
        leases.check_integrity()


def test_who_has_most_gives_first() -> None:
    pool = BlockPool(20)
    leases = Leases(pool, most=6)
    keys = [cached(pool, bytes([i])) for i in range(16)]
    assert leases.take("a:1", keys[:3], 9.0, now=0.0).status == leases.take("a:2", keys[3:6], 9.0, now=0.0).status == "accepted"
    assert leases.take("a:3", keys[6:9], 9.0, now=0.0).status == "rejected", "an owner who has most gets no more"
    assert leases.take("b:1", keys[9:11], 9.0, now=0.0).status == "accepted"
    assert [pool.is_leased(k) for k in keys[:6]] == [True, False, False, True, True, True], "from the end of the oldest"
    outcome = leases.take("b:2", keys[11:14], 9.0, now=0.0)
    assert (outcome.status, outcome.blocks) == ("clipped", 1) and leases.blocks == 6
    assert leases.remaining("a:1", 0.0) == 0 and leases.remaining("a:2", 0.0) == 9.0
    assert leases.take("c:1", keys[14:], 9.0, now=0.0).blocks == 2
    leases.check_integrity()
    leases._of["a"] += 1
    with pytest.raises(ValueError, match="owners"):
        leases.check_integrity()
