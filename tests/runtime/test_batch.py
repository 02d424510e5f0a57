import numpy as np
import pytest

from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.params import SamplingParams
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
