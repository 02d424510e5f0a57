"""Speculative decoding changes how long answers take, and nothing of what they are."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferloom.cli import main
from inferloom.runtime.draft_model import DraftModel
from inferloom.runtime.engine import Engine
from inferloom.runtime.errors import RequestError
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.request import Sequence
from inferloom.runtime.scheduler import Limits
from inferloom.runtime.speculative import NgramProposer, SpeculativeConfig, check_speculation
from inferloom.runtime.state import ALL_KEYS, Group
from tests.runtime.fake import VOCAB, FakeDevice, finish, make_engine
from tests.runtime.toy import write_toy

ENDS = (3,)


class Oracle:
    """Drafts that are right with probability `right`, from an engine that knows the answers."""

    def __init__(self, right: float, count: int, seed: int = 0) -> None:
        self.right, self.count, self.random = right, count, random.Random(seed)
        self.answers: dict[tuple[str, int], Seq[int]] = {}

    def propose(self, sequences: Seq[Sequence]) -> None:
        for s in sequences:
            rest = list(self.answers[s.request.id, s.index][s.generated:][:self.count])
            s.draft = [t if self.random.random() < self.right else self.random.randrange(VOCAB) for t in rest]
            s.draft += [self.random.randrange(VOCAB) for _ in range(self.count - len(rest))]

    def close(self) -> None:
        pass


def draft_model(blocks: int = 40, tokens: int = 32, seqs: int = 8, count: int = 3, length: int = 64,
                groups: tuple[Group, ...] = ALL_KEYS, block_tokens: int = 4) -> DraftModel:
    """The model itself, as its own draft."""
    limits = Limits(tokens, seqs, -(-length // block_tokens), block_tokens, length, groups)
    return DraftModel(FakeDevice(blocks, block_tokens, groups), limits, VOCAB, VOCAB, count)


def requests_of(r: random.Random) -> list[tuple[str, list[int], SamplingParams, int, int]]:
    shared = [[r.randrange(VOCAB) for _ in range(r.randrange(1, 30))] for _ in range(3)]
    made = []
    for i in range(r.randrange(3, 12)):
        prompt = r.choice(shared)[:r.randrange(1, 30)] + [r.randrange(VOCAB) for _ in range(r.randrange(8))]
        params = SamplingParams(n=r.choice([1, 1, 2]), temperature=r.choice([0, 0, 1]), seed=r.randrange(100),
                                max_tokens=r.randrange(1, 14), min_tokens=0 if r.random() < 0.7 else 1,
                                top_k=r.choice([0, 5]), repetition_penalty=r.choice([1, 1.2]),
                                presence_penalty=r.choice([0, 0.5]), logprobs=r.choice([None, None, 2]),
                                prompt_logprobs=r.choice([None, None, None, 1]), stop_token_ids=r.choice([(), (7, 9)]),
                                ignore_eos=r.random() < 0.5)
        made.append((str(i), prompt, params, r.randrange(3), r.randrange(12)))
    return made


def shown(output: Any) -> Any:
    return [(o.token_ids, o.logprobs, o.finish_reason, o.stop_reason) for o in output.outputs], output.prompt_logprobs


@pytest.mark.parametrize("kind", ["ngram", "oracle", "model", "window"])
@pytest.mark.parametrize("seed", [s if s < 10 else pytest.param(s, marks=pytest.mark.slow) for s in range(25)])
def test_answers_are_those_without_speculation(seed: int, kind: str) -> None:
    """Random arrivals, chunks, prefix hits, samples, penalties, stops, preemptions and aborts."""
    r = random.Random(seed)
    groups = (Group(), Group(2, window=6)) if kind == "window" else ALL_KEYS
    requests, count = requests_of(r), r.randrange(1, 6)
    want = {}
    for name, prompt, params, _, _ in requests:
        alone = make_engine(blocks=200, tokens=1000, eos_token_ids=ENDS, prefix_caching=False, groups=groups)
        alone.add_request(name, prompt, params)
        want[name] = finish(alone)[name]
    proposer: Any
    if kind == "ngram":
        proposer = NgramProposer(SpeculativeConfig(num_speculative_tokens=count, prompt_lookup_min=1, prompt_lookup_max=2))
    elif kind == "oracle":
        proposer = Oracle(r.choice([0.3, 0.8, 1.0]), count, seed)
        proposer.answers = {(n, o.index): o.token_ids for n, out in want.items() for o in out.outputs}
    else:
        proposer = draft_model(r.randrange(60, 120), r.randrange(3, 40), r.randrange(1, 9), count, groups=groups)
    seqs = r.randrange(1, 9)
    engine = make_engine(blocks=r.randrange(16, 40) * (1 if kind != "window" else 4), tokens=r.randrange(3, 40), seqs=seqs,
                         eos_token_ids=ENDS, prefix_caching=r.random() < 0.7, groups=groups, proposer=proposer,
                         rows=r.choice([None, seqs, seqs + 3]))
    done, aborted, waiting = {}, set(), list(requests)
    for step in range(3000):
        for item in [w for w in waiting if w[4] <= step]:
            waiting.remove(item)
            engine.add_request(item[0], item[1], item[2], priority=item[3])
        if not waiting and not engine.has_unfinished:
            break
        done.update({o.request_id: o for o in engine.step() if o.finished})
        engine.check_integrity()
        if isinstance(proposer, DraftModel):
            proposer.scheduler.check_integrity()
        if r.random() < 0.03:
            name = r.choice(requests)[0]
            if engine.abort(name) is not None:
                aborted.add(name)
    assert engine.pool.available == engine.pool.size and set(done) | aborted == {q[0] for q in requests}
    for name in done:
        assert shown(done[name]) == shown(want[name]), name
    stats = engine.stats()
    assert 0 <= stats.accepted <= stats.drafted
    if isinstance(proposer, DraftModel):
        proposer.propose([])
        assert proposer.pool.available == proposer.pool.size


def test_right_drafts_are_taken_in_one_step() -> None:
    params = SamplingParams(temperature=0, max_tokens=13, ignore_eos=True)
    plain = make_engine()
    plain.add_request("a", [1, 2, 3], params)
    answer = finish(plain)["a"].outputs[0].token_ids
    oracle = Oracle(1.0, 3)
    oracle.answers = {("a", 0): answer}
    engine = make_engine(proposer=oracle)
    engine.add_request("a", [1, 2, 3], params)
    assert finish(engine)["a"].outputs[0].token_ids == answer
    stats = engine.stats()
    assert (stats.steps, stats.drafted, stats.accepted) == (4, 9, 9)  # 1 token, then 4 each


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    for temperature in (0, 1):
        engine = make_engine(proposer=draft_model(count=3), blocks=80)
        for i in range(4):
            engine.add_request(str(i), [i, 2, 3, 4, 5], SamplingParams(temperature=temperature, seed=i, max_tokens=21,
                                                                       ignore_eos=True))
        finish(engine)
        assert engine.stats().accepted == engine.stats().drafted > 50


def test_rejected_tokens_never_reach_the_prefix_cache() -> None:
    """What is cached is what a fresh computation of the same tokens gives."""
    oracle = Oracle(0.5, 5)
    params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
    plain = make_engine()
    plain.add_request("a", [1, 2, 3], params)
    answer = finish(plain)["a"].outputs[0].token_ids
    oracle.answers = {("a", 0): answer}
    engine = make_engine(proposer=oracle)
    engine.add_request("a", [1, 2, 3], params)
    finish(engine)
    engine._proposer = None
    engine.add_request("b", [1, 2, 3, *answer], params)
    plain.add_request("b", [1, 2, 3, *answer], params)
    again = finish(engine)["b"]
    assert again.num_cached_tokens >= 24 and again.outputs == finish(plain)["b"].outputs
    assert engine.stats().accepted < engine.stats().drafted


def test_rows_of_logits_are_respected() -> None:
    engine = make_engine(seqs=3, rows=4, proposer=draft_model(count=5))
    rows: list[int] = []
    step = engine.device.step
    engine.device.step = lambda batch: (rows.append(len(batch.logit_rows)), step(batch))[1]  # type: ignore[method-assign]
    for i in range(3):
        engine.add_request(str(i), [i, 2], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    finish(engine)
    assert max(rows) == 4 and engine.stats().accepted > 0


def test_ngrams_find_the_newest_place_and_the_longest_match() -> None:
    def drafts(tokens: list[int], **options: int) -> list[int]:
        engine = make_engine()
        engine.add_request("x", tokens, SamplingParams())
        (sequence,) = engine.scheduler.waiting
        proposer = NgramProposer(SpeculativeConfig("ngram", 3, **options))  # type: ignore[arg-type]
        proposer.propose([sequence])
        first = sequence.draft
        sequence.tokens += [50, *tokens[-2:]]
        proposer.propose([sequence])  # goes on from what it knows
        assert sequence.draft == [50, *tokens[-2:]]
        return first

    assert drafts([1, 2, 3, 4, 5, 1, 2, 9, 8, 7, 1, 2]) == [9, 8, 7]
    assert drafts([6, 1, 2, 3, 4, 5, 1, 2, 9, 6, 1, 2], prompt_lookup_max=3) == [3, 4, 5]
    assert drafts([1, 2, 3]) == [] and drafts([7, 7, 7]) == [7, 7, 7]


@pytest.mark.parametrize("bad,match", [({"method": "oracle"}, "not known"), ({"method": "draft_model"}, "needs a model"),
                                       ({"model": "x"}, "takes none"), ({"num_speculative_tokens": 0}, "1 to 64"),
                                       ({"prompt_lookup_min": 5}, "in this order"), ({"prompt_lookup_max": 65}, "1 to 64")])
def test_bad_configs_are_refused(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        SpeculativeConfig(**bad)


def test_of_what_users_write() -> None:
    assert SpeculativeConfig.of("ngram", 7) == SpeculativeConfig("ngram", 7)
    assert SpeculativeConfig.of("some/path") == SpeculativeConfig("draft_model", 4, "some/path")
    config = SpeculativeConfig(prompt_lookup_min=1)
    assert SpeculativeConfig.of(config) is config


@pytest.mark.parametrize("limits,match", [(Limits(8, 2, 8, 4, 32, (Group(), Group(recurrent=True))), "recurrent state"),
                                          (Limits(8, 2, 8, 4, 32, facts=("prefix_len",)), "prefix_len")])
def test_models_whose_tokens_cannot_be_taken_back(limits: Limits, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        check_speculation(limits, "it")
    with pytest.raises(RequestError, match=match):
        Engine(FakeDevice(8, 4, limits.groups), limits, VOCAB, proposer=NgramProposer(SpeculativeConfig()))


def test_a_failing_draft_device_ends_what_runs() -> None:
    model = draft_model()
    model.device.fail_at = 2  # type: ignore[attr-defined]
    engine = make_engine(proposer=model)
    for name in "ab":
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=9))
    done = finish(engine)
    assert all(done[n].error == "the device failed" for n in "ab") and engine.pool.available == engine.pool.size


def test_vocabularies_may_differ_where_tokens_do_not() -> None:
    """Drafts that the model has no token for are cut; sequences with tokens that the draft model lacks get none."""
    for mine, theirs, drafted in ((VOCAB, 8, False), (8, VOCAB, False), (VOCAB, VOCAB, True)):
        model = draft_model()
        model.vocab_size, model._valid = mine, theirs
        engine = make_engine(proposer=model)
        engine.add_request("a", [60, 61, 62], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        answer = finish(engine)["a"].outputs[0].token_ids
        assert len(answer) == 12 and (engine.stats().drafted == engine.stats().accepted) and (
            not drafted or engine.stats().drafted > 0)
        if mine == 8:
            assert engine.stats().drafted == 0


def test_on_a_compiled_model(tiny_artifact: Path, tmp_path: Path) -> None:
    params = [SamplingParams(temperature=t, max_tokens=24, seed=3, ignore_eos=True, logprobs=2) for t in (0.0, 0.8)]
    prompts = [[1, 2, 3, 1, 2], [9, 8]]
    with LLM(tiny_artifact, threads=1) as llm:
        want = [llm.generate(prompts, p) for p in params]
    for speculative in ("ngram", tiny_artifact, SpeculativeConfig("draft_model", 2, tiny_artifact)):
        with LLM(tiny_artifact, threads=1, speculative=speculative, memory_bytes=64 << 20) as llm:
            for p, each in zip(params, want, strict=True):
                assert [o.outputs for o in llm.generate(prompts, p)] == [o.outputs for o in each]
            stats = llm.stats
            assert stats.accepted == stats.drafted > 0 if speculative != "ngram" else stats.drafted >= stats.accepted


def test_draft_models_of_other_tokenizers_are_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    with pytest.raises(RequestError, match="another tokenizer"):
        LLM(tiny_artifact, speculative=toy.path)


def test_command_line(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["inferloom", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    wanted = ["run", str(tiny_artifact), "abcabcabc", "--max-tokens", "20", "--stats"]
    plain = run(*wanted)
    drafted = run(*wanted, "--speculative", str(tiny_artifact), "--num-speculative-tokens", "3")
    assert plain[:2] == drafted[:2] and plain[0] == 0 and "drafts accepted" in drafted[2]
    assert "needs --speculative" in run(*wanted, "--num-speculative-tokens", "3")[2]


# -- distribution

def _chi_square(seen: Counter[tuple[int, ...]], want: dict[tuple[int, ...], float], total: int) -> float:
    """Pearson's statistic over outcomes that are expected at least 8 times, and the rest, in standard deviations."""
    common = {k: p for k, p in want.items() if p * total >= 8}
    rest = 1 - sum(common.values())
    parts = [(seen[k] - p * total) ** 2 / (p * total) for k, p in common.items()]
    parts.append((total - sum(seen[k] for k in common) - rest * total) ** 2 / (rest * total))
    freedom = len(parts) - 1
    return float((sum(parts) - freedom) / np.sqrt(2 * freedom))


class Careless(Engine):
    """Takes any draft that is not unlikely: what must not be done."""

    def _next(self, item: Any, logits: Any, at: int, best: Any, finite: Any) -> tuple[int, Any]:
        token, logprobs = super()._next(item, logits, at, best, finite)
        j = len(item.sequence.tokens) - item.sequence.computed - 1
        draft = item.sequence.draft[j] if j < len(item.sequence.draft) else None
        p = np.exp(logits[at] - logits[at].max())
        return (draft, logprobs) if draft is not None and p[draft] / p.sum() > 0.02 else (token, logprobs)


@pytest.mark.parametrize("kind", ["none", "favourite", "model", "careless"])
def test_sampled_tokens_follow_the_model(kind: str) -> None:
    """The first three tokens after a prompt, over many seeds, against the exact probabilities."""
    prompt, total, temperature = [5, 6], 6000, 0.5

    def row(tokens: list[int]) -> np.ndarray:
        device, engine = FakeDevice(8, 4), make_engine()
        engine.device = device
        engine.add_request("x", tokens, SamplingParams(max_tokens=1))
        work = engine.scheduler.schedule()
        logits = np.asarray(device.step(engine._batches.of(work)))[0].astype(np.float64) / temperature
        p = np.exp(logits - logits.max())
        return p / p.sum()

    first = row(prompt)
    want = {}
    for a in np.argsort(-first)[:12].tolist():
        second = row([*prompt, a])
        want |= {(a, b): float(first[a] * second[b]) for b in range(VOCAB)}

    class Favourite:
        """Always drafts the likeliest tokens."""

        def propose(self, sequences: Seq[Sequence]) -> None:
            for s in sequences:
                s.draft = [int(np.argmax(first)), 1] if s.generated == 0 else [int(np.argmax(row(s.tokens))), 1]

        def close(self) -> None:
            pass

    proposer: Any = {"none": None, "favourite": Favourite(), "careless": Favourite(),
                     "model": draft_model(blocks=200, count=2, seqs=8)}[kind]
    limits = Limits(64, 8, 16, 4, 64)
    engine = (Careless if kind == "careless" else Engine)(FakeDevice(200, 4), limits, VOCAB, seed=0, proposer=proposer)
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(0, total, 8):
        for i in range(start, start + 8):
            engine.add_request(str(i), prompt, SamplingParams(temperature=temperature, max_tokens=3, seed=i, ignore_eos=True))
        for output in finish(engine).values():
            seen[tuple(output.outputs[0].token_ids[:2])] += 1
    assert sum(seen.values()) == total
    deviations = _chi_square(seen, want, total)
    if kind == "careless":
        assert deviations > 10
    else:
        assert abs(deviations) < 4, deviations
