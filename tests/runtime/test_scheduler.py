"""The scheduler under random use, through an engine on a device that notices every wrong block."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inferloom.runtime.params import SamplingParams
from inferloom.runtime.state import ALL_KEYS, Group
from tests.runtime.fake import VOCAB, finish, make_engine

GROUPS = (ALL_KEYS, ALL_KEYS, (Group(2, window=6),), (Group(recurrent=True),), (Group(), Group(2, window=6)),
          (Group(2), Group(1, window=9), Group(recurrent=True)))


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted; books agree after every move, and everything ends exactly once."""

    @initialize(blocks=st.integers(0, 16), tokens=st.integers(1, 24), seqs=st.integers(1, 5), caching=st.booleans(),
                groups=st.sampled_from(GROUPS))
    def start(self, blocks: int, tokens: int, seqs: int, caching: bool, groups: tuple[Group, ...]) -> None:
        least = sum(g.most(28, tokens, 4) for g in groups)
        self.engine = make_engine(blocks=least + blocks, tokens=tokens, seqs=seqs, length=28, prefix_caching=caching,
                                  groups=groups)
        self.open, self.ended, self.count = set[str](), set[str](), 0

    @rule(start=st.integers(0, 3), length=st.integers(1, 20), made=st.integers(1, 9), n=st.integers(1, 3),
          priority=st.integers(0, 2))
    def add(self, start: int, length: int, made: int, n: int, priority: int) -> None:
        prompt = [(start + i) % VOCAB for i in range(length)]
        name, self.count = str(self.count), self.count + 1
        self.engine.add_request(name, prompt, SamplingParams(n=n, max_tokens=made, seed=0), priority=priority)
        self.open.add(name)

    @rule()
    def step(self) -> None:
        limits, work = self.engine.limits, self.engine.device.computed  # type: ignore[attr-defined]
        for output in self.engine.step():
            if output.finished:
                self.open.remove(output.request_id)
                self.ended.add(output.request_id)
        assert self.engine.device.computed - work <= limits.tokens  # type: ignore[attr-defined]
        assert len(self.engine.scheduler.running) <= limits.seqs

    @precondition(lambda self: getattr(self, "open", None))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        output = self.engine.abort(name)
        assert output is not None and output.finished
        self.open.remove(name)
        self.ended.add(name)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            assert set(finish(self.engine)) == self.open
            assert self.engine.pool.available == self.engine.pool.size


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
