from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.runtime.batch import Batches
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.scheduler import Work
from inferloom.runtime.state import ALL_KEYS, Group
from tests.runtime.fake import FakeDevice, finish, make_engine

KEPT = ("seq_starts", "logit_rows", "block_tables", "sharpness")


class Recorder(FakeDevice):
    """Keeps what a layout stands for, as each step has it."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        super().__init__(24, 4, groups)
        self.seen: list[tuple[object, list[np.ndarray | None]]] = []

    def step(self, batch: StepBatch) -> np.ndarray:
        kept = [getattr(batch, name) for name in KEPT]
        self.seen.append((batch.layout, [None if k is None else k.copy() for k in kept]))
        return super().step(batch)


@pytest.mark.parametrize("groups", [ALL_KEYS, (Group(), Group(2, 6)), (Group(), Group(1, recurrent=True))])
def test_a_layout_stands_for_the_same_arrays(groups: tuple[Group, ...]) -> None:
    device, rng = Recorder(groups), np.random.default_rng(0)
    engine = make_engine(groups=groups, device=device)
    for i in range(12):  # more than fit at once: some wait, some are preempted
        prompt = rng.integers(1, 9, rng.integers(1, 12)).tolist()
        engine.add_request(str(i), prompt, SamplingParams(temperature=i % 2 * 0.7, max_tokens=10 + i, ignore_eos=True))
    finish(engine)
    assert engine.stats().preemptions
    layouts = dict(device.seen)
    for layout, kept in device.seen:
        assert all(np.array_equal(a, b) for a, b in zip(kept, layouts[layout], strict=True))
    recurrent = any(g.recurrent for g in groups)  # such a state may move at any step
    assert (len(layouts) == len(device.seen)) == recurrent


class Checked(Batches):
    """Compares each batch with one that is made from nothing; `kept`: how many were the last one, brought up to date."""

    before: StepBatch | None = None
    kept = 0

    def of(self, work: Sequence[Work]) -> StepBatch:
        made, anew = super().of(work), Batches(self._limits).of(list(work))
        for name in ("tokens", "positions", "slots", "seq_starts", "kv_lens", "logit_rows", "pages", "sharpness"):
            np.testing.assert_array_equal(getattr(made, name), getattr(anew, name), name)  # type: ignore[call-overload]
        self.kept += made is self.before
        self.before = made
        return made


@pytest.mark.parametrize("groups", [ALL_KEYS, (Group(), Group(2, 6)), (Group(), Group(1, recurrent=True))])
def test_a_batch_that_is_brought_up_to_date_is_what_it_would_be_anew(groups: tuple[Group, ...]) -> None:
    rng = np.random.default_rng(1)
    engine = make_engine(groups=groups, device=FakeDevice(24, 4, groups))
    engine._batches = checked = Checked(engine.limits)
    for i in range(12):
        prompt = rng.integers(1, 9, rng.integers(1, 12)).tolist()
        engine.add_request(str(i), prompt, SamplingParams(temperature=i % 2 * 0.7, max_tokens=10 + i, ignore_eos=True))
    finish(engine)
    assert engine.stats().preemptions
    assert (checked.kept > 0) == (not any(g.recurrent for g in groups))
