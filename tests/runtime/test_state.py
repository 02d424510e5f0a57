"""Groups of state: windows that forget, recurrent states that are cached where steps end, all in one pool."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.runtime.params import SamplingParams
from inferloom.runtime.state import Group, Held, Tables, longest
from tests.runtime.fake import VOCAB, finish, make_engine

ALL, WINDOW, TWO, RECURRENT = Group(), Group(2, window=7), Group(2), Group(1, recurrent=True)
GROUPS = {"window": (WINDOW,), "both": (ALL, WINDOW), "recurrent": (RECURRENT,), "hybrid": (TWO, RECURRENT),
          "all": (ALL, Group(3, window=5), Group(1, window=16), Group(2, recurrent=True)), "none": ()}
PARAMS = SamplingParams(max_tokens=30, temperature=0)


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % VOCAB for i in range(length)]


@pytest.mark.parametrize("name", GROUPS)
def test_answers_do_not_depend_on_chunks_batches_caches_or_preemption(name: str) -> None:
    groups = GROUPS[name]

    def answers(**options: object) -> list[tuple[int, ...]]:
        engine = make_engine(groups=groups, length=80, **options)  # type: ignore[arg-type]
        for i, (length, start) in enumerate(((50, 0), (50, 0), (41, 0), (13, 5), (3, 9))):
            engine.add_request(str(i), prompt(length, start), PARAMS)
        done = finish(engine)
        assert engine.pool.available == engine.pool.size
        return [done[str(i)].outputs[0].token_ids for i in range(5)]

    want = answers(blocks=1000, prefix_caching=False, tokens=200)
    assert len({tuple(w) for w in want}) > 2 or name == "none"
    least = sum(g.most(80, 9, 4) for g in groups)
    for options in ({"tokens": 9}, {"seqs": 1}, {"tokens": 9, "blocks": max(least + 8, 4)}, {"tokens": 200}):
        assert answers(**{"blocks": 1000, **options}) == want, options


@pytest.mark.parametrize("name", [n for n in GROUPS if n != "none"])
def test_a_conversation_goes_on_from_the_cache(name: str) -> None:
    engine = make_engine(groups=GROUPS[name], blocks=400, length=128, tokens=128)
    cold = make_engine(groups=GROUPS[name], blocks=400, length=128, tokens=128, prefix_caching=False)
    history, cached = prompt(37), 0
    for turn in range(3):
        outputs = []
        for each in (engine, cold):
            each.add_request(str(turn), history, SamplingParams(max_tokens=6, temperature=0))
            outputs.append(finish(each)[str(turn)])
        warm = outputs[0]
        assert warm.outputs[0].token_ids == outputs[1].outputs[0].token_ids
        assert warm.num_cached_tokens == cached
        history += warm.outputs[0].token_ids
        cached = (len(history) - 1) // 4 * 4  # the last token of an answer is never computed
        history += [1, 2, 3]


def test_windows_hold_few_blocks() -> None:
    engine = make_engine(groups=(WINDOW,), blocks=40, tokens=8, length=200, prefix_caching=False)
    engine.add_request("a", prompt(90), SamplingParams(max_tokens=60, temperature=0))
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.pool.size - engine.pool.available)
        if engine.scheduler.running:
            (sequence,) = engine.scheduler.running
            held = [b for b in sequence.held[0].blocks if b is not None]
            assert len(held) <= -(-(7 + 8) // 4) + 1
    assert most <= WINDOW.most(150, 8, 4) < 2 * 150 // 4


def test_samples_share_what_they_can() -> None:
    for name, groups in GROUPS.items():
        engine, alone = (make_engine(groups=groups, blocks=400, length=128, tokens=128) for _ in range(2))
        params = SamplingParams(n=4, max_tokens=9, seed=5)
        engine.add_request("a", prompt(42), params)
        alone.add_request("a", prompt(42), params)
        got = [o.token_ids for o in finish(engine)["a"].outputs]
        assert len(set(got)) > 1
        assert got == [o.token_ids for o in finish(alone)["a"].outputs]
        if name != "none":
            assert engine.device.computed < 2 * 42 + 4 * 10, name  # type: ignore[attr-defined]


def test_a_state_that_others_may_find_is_never_written() -> None:
    engine = make_engine(groups=(RECURRENT,), blocks=30, length=100, tokens=100)
    engine.add_request("a", prompt(40), SamplingParams(max_tokens=20, temperature=0))
    seen: dict[bytes, tuple[int, ...]] = {}
    while engine.has_unfinished:
        engine.step()
        for key, blocks in engine.pool._by_key.items():
            assert seen.setdefault(key[1], blocks) == blocks
            assert engine.device.chains[blocks[0]][1] % 4 == 0  # type: ignore[attr-defined]
    assert len(seen) == 5


def test_longest_sequence_that_fits() -> None:
    assert longest((ALL,), 10, 8, 4, 100) == 40 and longest((ALL,), 10, 8, 4, 33) == 33
    assert longest((RECURRENT,), 1, 8, 4, 100) == 0 and longest((RECURRENT,), 2, 8, 4, 100) == 100
    assert longest((ALL, RECURRENT), 10, 8, 4, 100) == 32
    assert longest((WINDOW,), 12, 8, 4, 1000) == 1000 and longest((WINDOW,), 11, 8, 4, 1000) == 20


def test_tables_of_a_step() -> None:
    held = [[Held([(1,), (2,)]), Held([None, (3, 4)]), Held([(5,)], next=(6,))],
            [Held([(7,)]), Held([(8, 9)]), Held([(10,)])]]
    tables, pages = Tables((ALL, WINDOW, RECURRENT), 3).of(held)
    assert tables.tolist() == [[[1, 2, 0], [7, 0, 0]], [[0, 3, 0], [8, 0, 0]], [[0, 4, 0], [9, 0, 0]]]
    assert pages.tolist() == [[[5, 6], [10, 10]]] and tables.dtype == pages.dtype == np.int32
