"""Variants that ask the runtime about a query: whole prompts that see themselves, and several documents in a sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inferloom.checks.model import VOCAB, attention_model, meaning
from inferloom.compiler.build import compile_model
from inferloom.compiler.plugins import load
from inferloom.ir.interpret import interpret
from inferloom.runtime.errors import RequestError
from inferloom.runtime.facts import Facts
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams

MODEL = replace(attention_model(), eos_token_ids=(0, 1, 2, 3, 4))
NEW = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def prompt(length: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, length)]


@pytest.fixture(scope="module", params=["prefix-lm", "document-mask"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("facts") / "model"
    return request.param, compile_model(MODEL, out, dtype="fp32", max_tokens=64, max_seqs=4, block_tokens=16,
                                        passes=[request.param])


def expected(name: str, ids: list[int]) -> list[int]:
    """Eight tokens by the dense reference, the facts said as plainly as can be."""
    graph, tokens = meaning(MODEL, load([name])), list(ids)
    params = {p.source: MODEL.weights.load(p.source) for p in graph.params}
    for _ in range(8):
        at = np.arange(len(tokens), dtype=np.int32)
        begins = [max([0, *(j + 1 for j in range(i) if tokens[j] < 5)]) for i in range(len(tokens))]
        told = {"prefix_len": np.full(len(tokens), len(ids), np.int32), "document_start": np.array(begins, np.int32)}
        wanted = {v.name for v in graph.inputs} - {"tokens", "positions", "logit_rows"}
        (logits,) = interpret(graph, {"tokens": np.array(tokens, np.int32), "positions": at, "logit_rows": at[-1:],
                                      **{k: told[k] for k in wanted}}, params)
        tokens.append(int(np.argmax(logits[0])))
    return tokens[len(ids):]


def test_batches_chunks_and_the_cache(made: tuple[str, Path]) -> None:
    name, path = made
    prompts = [prompt(50, 1), prompt(33, 2), prompt(20, 3), prompt(50, 1)[:40] + prompt(9, 4)]
    want = [expected(name, p) for p in prompts]
    with LLM(path, seed=0) as llm:
        for _ in range(2):  # together with what is in the cache the second time
            got = llm.generate(prompts, NEW)
            assert [list(r.outputs[0].token_ids) for r in got] == want
        # Blocks of a prompt that sees itself are those of the same prompt only.
        assert [r.num_cached_tokens for r in got] == [48, 32, 16, 48]
        (other,) = llm.generate([prompts[0][:40] + [7, 8, 9]], NEW)
        assert other.num_cached_tokens == (0 if name == "prefix-lm" else 32)
        assert list(other.outputs[0].token_ids) == expected(name, prompts[0][:40] + [7, 8, 9])
        samples = replace(NEW, n=3, temperature=1.0, seed=5)
        assert len({r.token_ids for r in llm.generate([prompts[0]], samples)[0].outputs}) > 1
        llm.engine.check_integrity()


def test_what_a_step_cannot_hold(made: tuple[str, Path]) -> None:
    name, path = made
    with LLM(path, seed=0) as llm:
        if name == "prefix-lm":
            with pytest.raises(RequestError, match="80 tokens, which see each other.*room for 64"):
                llm.generate([prompt(80, 1)], NEW)
            with pytest.raises(RequestError, match="one step: at most 4"):
                llm.logits(prompt(80, 1))
        else:
            ids = prompt(80, 1)
            assert list(llm.generate([ids], NEW)[0].outputs[0].token_ids) == expected(name, ids)
            assert llm.logits(ids)[-1].argmax() == expected(name, ids)[0]


def test_facts() -> None:
    facts = Facts(("document_start", "prefix_len"), 3, {9})
    tokens = [1, 9, 9, 2, 3, 9, 4]
    assert facts.of(tokens, 0, 4).tolist() == [[0, 0, 2, 3], [3] * 4]
    assert facts.of(tokens, 4, 7).tolist() == [[3, 3, 6], [3] * 3]
    assert facts.of(tokens, 1, 3).tolist() == [[0, 2], [3] * 2]  # computed again
