"""Pooling, and an engine that embeds on a device whose rows depend on exactly the tokens before them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from inferloom.runtime.engine import Engine
from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.pooling import Pool, shortened
from inferloom.runtime.state import ALL_KEYS, Group
from tests.runtime.fake import VOCAB, FakeDevice, finish, make_engine


def test_pools_do_not_depend_on_how_rows_come() -> None:
    rows = np.random.default_rng(0).standard_normal((37, 8)).astype(np.float32)
    for pooling, want in (("mean", rows.astype(np.float64).mean(axis=0)), ("last", rows[-1])):
        whole, pieces = Pool(pooling), Pool(pooling)
        whole.add(rows)
        for begin in range(0, 37, 5):
            pieces.add(rows[begin:begin + 5])
        assert whole.vector().dtype == np.float32 and np.allclose(whole.vector(), want, atol=1e-7)
        assert np.array_equal(whole.vector(), pieces.vector())
    with pytest.raises(RequestError, match="choose from: last, mean"):
        Pool("max")


@pytest.mark.parametrize("rows", [np.zeros((0, 4), np.float32), np.array([[1, np.nan]], np.float32),
                                  np.array([[1, np.inf]], np.float32)])
def test_what_is_no_number_is_an_error(rows: np.ndarray) -> None:
    pool = Pool("mean")
    pool.add(rows)
    with pytest.raises(RequestError, match="not finite"):
        pool.vector()


def test_shortened() -> None:
    vector = np.array([3, 4, 12], np.float32)
    assert np.allclose(shortened(vector), vector / 13)
    assert np.allclose(shortened(vector, 2), [0.6, 0.8])
    assert shortened(vector, 2, normalize=False).tolist() == [3, 4]
    assert shortened(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
    for wrong in (0, 4):
        with pytest.raises(RequestError, match="dimensions must be 1 to 3"):
            shortened(vector, wrong)


def embedder(**options) -> Engine:  # type: ignore[no-untyped-def]
    return make_engine(**{"rows": 32, "task": "embed", **options})


@pytest.mark.parametrize("groups", [ALL_KEYS, (Group(), Group(2, 6))])
def test_vectors_are_those_of_the_prompt_alone(groups: tuple[Group, ...]) -> None:
    """In batches, in chunks, from the cache, after preemptions."""
    hits = preemptions = 0
    for seed in range(30):
        r = random.Random(seed)
        common = [r.randrange(VOCAB) for _ in range(20)]
        prompts = {str(i): (common[:r.randrange(1, 20)] + [r.randrange(VOCAB) for _ in range(r.randrange(1, 30))],
                            r.choice(["last", "mean"])) for i in range(12)}
        engine = embedder(blocks=r.choice([45, 64, 100]), tokens=r.choice([5, 17, 32]), seqs=r.choice([2, 8]), groups=groups)
        done: dict[str, RequestOutput] = {}
        for name, (prompt, pooling) in prompts.items():
            engine.add_embedding(name, prompt, pooling, priority=r.randrange(3))
            done.update({o.request_id: o for o in engine.step()})
            if engine.scheduler.running and r.random() < 0.3:
                engine.scheduler._preempt(engine.scheduler.running[-1])
        done.update(finish(engine))
        stats = engine.stats()
        hits, preemptions = hits + stats.prefix_hits, preemptions + stats.preemptions
        assert stats.tokens_generated == 0
        for name, (prompt, pooling) in prompts.items():
            alone = embedder(blocks=300, tokens=64, rows=64, groups=groups, prefix_caching=False)
            alone.add_embedding("x", prompt, pooling)
            (want,) = finish(alone).values()
            assert want.embedding is not None and want.error is None and want.outputs[0].finish_reason == "stop"
            assert np.array_equal(done[name].embedding, want.embedding)
    assert hits > 0 and preemptions > 0


def test_a_prompt_may_fill_all_there_is() -> None:
    engine = embedder(length=16)
    engine.add_embedding("a", [1] * 16, "mean")
    assert finish(engine)["a"].embedding is not None
    with pytest.raises(RequestError, match="17 tokens, and at most 16 fit"):
        engine.add_embedding("b", [1] * 17)


def test_requests_are_refused_with_what_to_compile() -> None:
    with pytest.raises(RequestError, match="without --task embed"):
        embedder().add_request("a", [1], SamplingParams())
    with pytest.raises(RequestError, match="compile the model with --task embed"):
        make_engine().add_embedding("a", [1])
    engine = embedder()
    engine.add_embedding("a", [1])
    for name, prompt, message in (("a", [1], "in use"), ("b", [], "empty"), ("b", [VOCAB], "outside the vocabulary"),
                                  ("b", ["x"], "integers")):
        with pytest.raises(RequestError, match=message):
            engine.add_embedding(name, prompt)  # type: ignore[arg-type]


def test_a_failing_device_ends_the_request_with_the_reason() -> None:
    device = FakeDevice(64, 4)
    device.fail_at = 2
    engine = embedder(device=device, tokens=8)
    engine.add_embedding("a", list(range(20)), "mean")
    assert finish(engine)["a"].error == "the device failed" and finish(engine) == {}

    class Broken(FakeDevice):
        def step(self, batch):  # type: ignore[no-untyped-def]
            return super().step(batch) * np.nan

    engine = embedder(device=Broken(64, 4))
    engine.add_embedding("a", [1, 2])
    out = finish(engine)["a"]
    assert out.embedding is None and out.error is not None and "not finite" in out.error


def test_aborting_gives_everything_back() -> None:
    engine = embedder(tokens=8)
    engine.add_embedding("a", list(range(30)), "mean")
    engine.step()
    out = engine.abort("a")
    assert out is not None and out.finished and out.embedding is None and not engine.has_unfinished
    engine.check_integrity()
