"""The block pool under random use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferloom.runtime.blocks import BlockPool, Key, OutOfBlocks
from inferloom.runtime.prefix_cache import PrefixCache
from inferloom.runtime.state import Held

SIZE = 6


class PoolMachine(RuleBasedStateMachine):
    """Holders are a list with one entry a reference; content is what a cached block must still hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.held = BlockPool(SIZE), list[int]()
        self.content: dict[int, Key] = {}
        self.serial = 0

    @rule()
    def allocate(self) -> None:
        if len(set(self.held)) == SIZE:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate()
            return
        block = self.pool.allocate()
        assert block not in self.held
        self.held.append(block)
        self.content.pop(block, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.serial += 1
        self.content[block] = 0, self.serial.to_bytes(4, "big")
        self.pool.register((block,), self.content[block])

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content)))
        assert self.pool.lookup(self.content[block]) == (block,)
        self.pool.retain(block)
        self.held.append(block)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.available == SIZE - len(set(self.held))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_releasing_too_often_is_noticed() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match="more often"):
        pool.release(block)


def test_prefixes_are_exact_and_salted() -> None:
    pool = BlockPool(8)
    cache, other = PrefixCache(pool, 2, b"a"), PrefixCache(pool, 2, b"b")
    tokens, key = [5, 6, 7, 8, 9], None
    for start in (0, 2):
        key = cache.key(key, tokens[start:start + 2])
        pool.register((pool.allocate(),), (0, key))
    assert [len(cache.take(t)[1]) for t in (tokens, tokens[:4], [5, 6, 1, 8, 9], [1, 6, 7, 8, 9])] == [2, 1, 1, 0]
    assert other.take(tokens) == ([Held()], [])
