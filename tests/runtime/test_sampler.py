"""Sampling against straightforward formulations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from inferloom.runtime.errors import RequestError
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.sampler import best_of, sample
from inferloom.runtime.top import TopRow, TopRows

ROW = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5], np.float32)


def draws(count: int = 4000, **params: object) -> Counter[int]:
    p = SamplingParams(**params)  # type: ignore[arg-type]
    return Counter(sample(ROW, p, [], [], seed, 0)[0] for seed in range(count))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    found = draws(temperature=temperature)
    want = softmax(ROW / np.float32(temperature))
    assert max(abs(found[i] / 4000 - want[i]) for i in range(6)) < 0.03


def test_filters_keep_exactly_what_they_say() -> None:
    assert set(draws(top_k=2)) == {0, 5}
    assert set(draws(top_p=0.6)) == {0, 5}  # 0.44 + 0.27 reach 0.6
    assert set(draws(min_p=0.3)) == {0, 1, 5}  # at least 0.3 of the top probability
    assert set(draws(temperature=0, count=3)) == {0}
    assert set(draws(logit_bias={4: 100.0}, count=50)) == {4}


def test_penalties() -> None:
    def first(generated: list[int], **params: float) -> int:
        return sample(ROW, SamplingParams(temperature=0, **params), [0], generated, 0, 0)[0]  # type: ignore[arg-type]

    assert first([]) == 0
    assert first([], repetition_penalty=2.0) == 5  # the prompt counts: 2.0 / 2 < 1.5
    assert first([0], presence_penalty=0.6) == 5
    assert first([0, 0], frequency_penalty=0.3) == 5 and first([0], frequency_penalty=0.3) == 0


def test_logprobs() -> None:
    token, found = sample(ROW, SamplingParams(temperature=0, logprobs=2), [], [], 0, 0)
    want = np.log(softmax(ROW))
    assert token == 0 and found is not None and list(found) == [0, 5]
    assert [found[t].rank for t in found] == [1, 2]
    assert all(abs(found[t].logprob - want[t]) < 1e-9 for t in found)


def test_seed_and_position_decide() -> None:
    p = SamplingParams(temperature=1.0)
    assert [sample(ROW, p, [], [0] * i, 7, 0)[0] for i in range(20)] == [sample(ROW, p, [1], [0] * i, 7, 0)[0] for i in range(20)]
    assert len({tuple(sample(ROW, p, [], [0] * i, s, 0)[0] for i in range(9)) for s in range(5)}) == 5


@pytest.mark.parametrize("bad", [{"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}, {"min_p": 1.5},
                                 {"repetition_penalty": 0.0}, {"presence_penalty": 3.0}, {"max_tokens": 0},
                                 {"max_tokens": 2, "min_tokens": 3}, {"logprobs": -1}, {"stop": [""]},
                                 {"temperature": float("nan")}])
def test_bad_parameters_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def top_row(row: np.ndarray, params: SamplingParams, count: int) -> tuple[TopRow, list[int]]:
    """What a device gives: the largest `count`, the sum over all; asking for the row is counted."""
    order = np.argsort(-row, kind="stable")[:count]
    bits = row[order].view(np.int32)
    keys = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64) << 32 | (0x7FFFFFFF - order)
    scaled = row.astype(np.float64) / (1.0 if params.greedy else params.temperature)
    stats = np.array([scaled.max(), np.exp(scaled - scaled.max()).sum()], np.float32)

    def whole() -> np.ndarray:
        fetched.append(1)
        return row

    fetched: list[int] = []
    return TopRows(keys[None], stats[None], lambda begin, end: whole()[None])[0], fetched


@pytest.mark.parametrize("params,decided", [
    ({"temperature": 0}, True), ({"top_k": 5}, True), ({"top_k": 40, "temperature": 0.7, "top_p": 0.8}, True),
    ({"top_k": 3, "min_p": 0.2}, True), ({"top_p": 0.3, "temperature": 0.4}, True), ({"min_p": 0.3}, True),
    ({"min_p": 0.3, "top_p": 0.7}, True), ({"top_k": 80}, False), ({}, False), ({"top_p": 0.999, "temperature": 3}, False),
    ({"top_k": 5, "logprobs": 2}, False), ({"temperature": 0, "logit_bias": {3: 5.0}}, False)])
def test_largest_logits_draw_the_same_token(params: dict[str, object], decided: bool) -> None:
    for seed in range(60):
        row = np.round(np.random.default_rng(seed).standard_normal(300) * 3, 1).astype(np.float32)  # with equals
        p = SamplingParams(**params)  # type: ignore[arg-type]
        top, fetched = top_row(row, p, 64)
        assert sample(top, p, [], [], seed, 0) == sample(row, p, [], [], seed, 0)
        assert bool(fetched) != decided


def test_best_of_all_rows() -> None:
    rows = np.round(np.random.default_rng(0).standard_normal((9, 50)) * 3, 1).astype(np.float32)
    rows[2, 7], rows[3, 0], rows[4, 9] = np.nan, np.inf, -np.inf
    rows[5] = -np.inf
    best, finite = best_of(rows)
    assert finite == [True, True, False, False, True, False, True, True, True]
    assert all(best[i] == sample(rows[i], SamplingParams(temperature=0), [], [], 0, 0)[0] for i in range(9) if finite[i])
    good = rows[[0, 1, 6, 7]]
    tops = [top_row(row, SamplingParams(temperature=0), 8)[0] for row in good]
    keys = np.array([[int(v.view(np.int32)) << 32 | (0x7FFFFFFF - int(i)) for v, i in zip(t.values, t.ids)] for t in tops])
    stats = np.stack([good.max(1), np.exp(good - good.max(1, keepdims=True)).sum(1)], axis=1)
    assert best_of(TopRows(keys, stats, lambda begin, end: good[begin:end])) == best_of(good)


def test_a_draw_from_all_tokens_looks_at_one_run() -> None:
    rng, columns = np.random.default_rng(0), 16
    for seed in range(300):
        row = (rng.standard_normal(200) * rng.choice([0.1, 2, 30])).astype(np.float32)
        params = SamplingParams(temperature=float(rng.choice([0.3, 1.0, 4.0])))
        top, fetched = top_row(row, params, 64)
        weights = np.exp((row.astype(np.float64) - row.max()) / params.temperature)
        sums = np.array([weights[i:i + columns].sum() for i in range(0, 240, columns)], np.float32)  # the last are empty
        drawn = sample(replace(top, sums=sums, columns=columns), params, [], [], seed, 0)
        assert drawn == sample(row, params, [], [], seed, 0) and len(fetched) == 1
