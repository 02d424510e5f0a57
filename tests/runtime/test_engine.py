"""The engine on a device that notices every wrong block."""

from __future__ import annotations

import random

import pytest

from inferloom.runtime.errors import RequestError
from inferloom.runtime.params import SamplingParams
from tests.runtime.fake import VOCAB, finish, make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("seed", range(60))
def test_streams_do_not_depend_on_the_batch(seed: int) -> None:
    """Random arrivals, chunks, prefix hits, samples, priorities, preemptions and aborts against each request alone."""
    r = random.Random(seed)
    shared = [[r.randrange(VOCAB) for _ in range(r.randrange(1, 30))] for _ in range(3)]
    requests = []
    for i in range(r.randrange(3, 14)):
        prompt = r.choice(shared)[:r.randrange(1, 30)] + [r.randrange(VOCAB) for _ in range(r.randrange(10))]
        params = SamplingParams(n=r.choice([1, 1, 1, 2, 3]), temperature=r.choice([0, 1]), seed=r.randrange(100),
                                max_tokens=r.randrange(1, 12), top_k=r.choice([0, 5]), top_p=r.choice([1, 0.8]),
                                repetition_penalty=r.choice([1, 1.2]), presence_penalty=r.choice([0, 0.5]),
                                logprobs=r.choice([None, 2]), ignore_eos=r.random() < 0.5)
        requests.append((str(i), prompt, params, r.randrange(3), r.randrange(20)))
    engine = make_engine(blocks=r.randrange(16, 40), tokens=r.randrange(3, 40), seqs=r.randrange(1, 9),
                         eos_token_ids=(3,), prefix_caching=r.random() < 0.7)
    done, aborted, waiting = {}, set(), list(requests)
    for step in range(5000):
        for item in [w for w in waiting if w[4] <= step]:
            waiting.remove(item)
            engine.add_request(item[0], item[1], item[2], priority=item[3])
        if not waiting and not engine.has_unfinished:
            break
        done.update({o.request_id: o for o in engine.step() if o.finished})
        engine.check_integrity()
        if r.random() < 0.05:
            name = r.choice(requests)[0]
            if engine.abort(name) is not None:
                aborted.add(name)
    assert engine.pool.available == engine.pool.size and set(done) | aborted == {q[0] for q in requests}
    for name, prompt, params, _, _ in requests:
        if name not in aborted:
            alone = make_engine(tokens=1000, eos_token_ids=(3,), prefix_caching=False)
            alone.add_request("x", prompt, params)
            want = finish(alone)["x"].outputs
            assert [(o.token_ids, o.logprobs, o.finish_reason) for o in done[name].outputs] == \
                   [(o.token_ids, o.logprobs, o.finish_reason) for o in want]


def test_abort_storm_leaks_nothing() -> None:
    """2,000 requests, aborted in every state."""
    r = random.Random(0)
    engine = make_engine(blocks=48, tokens=24, seqs=8)
    alive: list[str] = []
    ended = 0
    for i in range(2000):
        engine.add_request(str(i), [r.randrange(VOCAB) for _ in range(r.randrange(1, 20))],
                           SamplingParams(n=r.choice([1, 1, 2]), max_tokens=r.randrange(1, 6), seed=i))
        alive.append(str(i))
        if r.random() < 0.5 and alive:
            ended += engine.abort(alive.pop(r.randrange(len(alive)))) is not None
        for output in engine.step():
            ended += output.finished
        if i % 50 == 0:
            engine.check_integrity()
    ended += len(finish(engine))
    assert ended == 2000 and engine.pool.available == engine.pool.size


def test_preemption_happens_and_changes_nothing() -> None:
    prompts = [[i] * 20 for i in range(6)]
    streams = []
    for blocks in (16, 200):
        engine = make_engine(blocks=blocks, seqs=6, tokens=64)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        streams.append({k: v.outputs[0].token_ids for k, v in finish(engine).items()})
        assert (engine.stats().preemptions > 0) == (blocks == 16)
    assert streams[0] == streams[1]


def test_prefix_hits_save_work() -> None:
    engine = make_engine()
    prompt = list(range(21))
    for name in ("a", "b"):
        engine.add_request(name, prompt, GREEDY)
        out = finish(engine)[name]
    assert out.num_cached_tokens == 20 and engine.stats().prefix_hits == 20


def test_a_failing_step_ends_its_requests_only() -> None:
    engine = make_engine(seqs=2)
    engine.device.fail_at = 2  # type: ignore[attr-defined]
    for name in "abc":
        engine.add_request(name, [1, 2, 3], GREEDY)
    done = finish(engine)
    assert [done[n].error is not None for n in "abc"] == [True, True, False]
    assert done["c"].outputs[0].finish_reason == "length" and engine.pool.available == engine.pool.size


def test_ends() -> None:
    engine = make_engine(eos_token_ids=range(VOCAB))
    engine.add_request("eos", [1], SamplingParams(temperature=0, max_tokens=9))
    engine.add_request("ignored", [1], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    engine.add_request("long", [1] * 60, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    done = finish(engine)
    assert (done["eos"].outputs[0].finish_reason, len(done["eos"].outputs[0].token_ids)) == ("stop", 1)
    assert (done["ignored"].outputs[0].finish_reason, len(done["ignored"].outputs[0].token_ids)) == ("length", 9)
    assert len(done["long"].outputs[0].token_ids) == 4


@pytest.mark.parametrize("prompt,match", [([], "empty"), ([VOCAB], "vocabulary"), ([1] * 64, "at most 63")])
def test_what_cannot_run_is_refused(prompt: list[int], match: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=match):
        engine.add_request("x", prompt, GREEDY)
    assert not engine.has_unfinished
