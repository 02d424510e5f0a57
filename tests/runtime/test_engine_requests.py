"""What a request may ask of the engine beyond tokens: a guide, logprobs of its prompt, a salt of its own."""

from __future__ import annotations

import numpy as np
import pytest

from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.params import SamplingParams
from tests.runtime.fake import VOCAB, finish, make_engine


class _Odd:
    """A guide that allows three odd tokens, and then nothing."""

    def __init__(self, fails: bool = False) -> None:
        self.taken: list[int] = []
        self.fails = fails

    @property
    def finished(self) -> bool:
        return len(self.taken) == 3

    def allowed(self) -> np.ndarray:
        if self.fails and self.taken:
            raise RequestError("the grammar is too complex")
        return np.arange(VOCAB) % 2 == 1

    def accept(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guide_decides_what_comes_and_when_it_ends(temperature: float) -> None:
    engine = make_engine()
    engine.add_request("free", [1, 2, 3], SamplingParams(max_tokens=8, temperature=temperature, seed=1))
    engine.add_request("held", [1, 2, 3], SamplingParams(n=2, max_tokens=8, temperature=temperature, seed=1), guide=_Odd)
    done = finish(engine)
    assert len(done["free"].outputs[0].token_ids) == 8
    for output in done["held"].outputs:
        assert len(output.token_ids) == 3 and all(t % 2 for t in output.token_ids)
        assert output.finish_reason == "stop"


def test_a_guide_that_fails_ends_its_own_request() -> None:
    engine = make_engine()
    engine.add_request("bad", [1], SamplingParams(max_tokens=8), guide=lambda: _Odd(fails=True))
    engine.add_request("good", [1], SamplingParams(max_tokens=8))
    done = finish(engine)
    assert done["bad"].error == "the grammar is too complex" and done["bad"].outputs[0].finish_reason == "abort"
    assert done["good"].error is None and len(done["good"].outputs[0].token_ids) == 8


def test_a_guide_that_leaves_nothing_is_an_error() -> None:
    engine = make_engine(eos_token_ids=[1, 3])

    class Two(_Odd):
        def allowed(self) -> np.ndarray:
            return np.isin(np.arange(VOCAB), [1, 3])

    engine.add_request("r", [1], SamplingParams(max_tokens=8, min_tokens=2, temperature=0), guide=Two)
    assert "no token is left" in (finish(engine)["r"].error or "")


@pytest.mark.parametrize("rows", [8, 9, 20, None])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_logprobs_of_a_prompt_do_not_depend_on_how_it_is_cut(rows: int | None, prefix_caching: bool) -> None:
    prompt = [int(t) for t in np.random.default_rng(3).integers(0, VOCAB, 23)]

    def run(limited: int | None, crowd: int) -> RequestOutput:
        engine = make_engine(rows=limited, prefix_caching=prefix_caching)
        for i in range(crowd):
            engine.add_request(f"c{i}", prompt[:7 + i], SamplingParams(max_tokens=12, ignore_eos=True))
            engine.step()
        engine.add_request("r", prompt, SamplingParams(n=2, max_tokens=2, temperature=0, prompt_logprobs=3))
        return finish(engine)["r"]

    alone, crowded = run(None, 0), run(rows, 6)
    assert alone.prompt_logprobs == crowded.prompt_logprobs
    assert alone.prompt_logprobs is not None and len(alone.prompt_logprobs) == 23 and alone.prompt_logprobs[0] is None
    for token, step in zip(prompt[1:], alone.prompt_logprobs[1:]):
        assert step is not None and token in step and len(step) in (3, 4)
        assert sorted(step.values(), key=lambda p: -p.logprob)[0].rank == 1
    assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in crowded.outputs]


def test_logprobs_of_a_prompt_survive_preemption() -> None:
    prompt = [int(t) for t in np.random.default_rng(3).integers(0, VOCAB, 23)]
    engine = make_engine(blocks=8, rows=2, seqs=2)
    engine.add_request("r", prompt, SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=0), priority=1)
    engine.step()
    engine.add_request("first", prompt[:4], SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    done = finish(engine)
    assert engine.stats().preemptions > 0
    other = make_engine()
    other.add_request("r", prompt, SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=0))
    assert finish(other)["r"].prompt_logprobs == done["r"].prompt_logprobs


def test_only_who_has_the_salt_shares_prefixes() -> None:
    engine = make_engine()
    prompt, cached = list(range(16)), []
    for salt in (b"", b"a", b"a", b"b", b""):
        engine.add_request("r", prompt, SamplingParams(max_tokens=1), salt=salt)
        cached.append(finish(engine)["r"].num_cached_tokens)
    assert cached == [0, 0, 12, 0, 12]
