"""`/v1/completions` with OpenAI's own client, against the engine in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.runtime.server.conftest import Server

PROMPT = "def read_lines(path):"


@pytest.fixture(scope="module")
def llm(chat_artifact: Path) -> Iterator[LLM]:
    with LLM(chat_artifact, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_answers_are_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    for params in (dict(temperature=0), dict(temperature=0.8, seed=7, top_p=0.9), dict(temperature=1, seed=-3),
                   dict(temperature=0, presence_penalty=1.5, frequency_penalty=0.5)):
        got = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, **params)  # type: ignore[call-overload]
        seed = params.get("seed")
        mine = llm.generate(PROMPT, SamplingParams(**params | {  # type: ignore[arg-type]
            "max_tokens": 24, "seed": None if seed is None else int(seed) % 2**64}))[0]
        assert got.choices[0].text == mine.outputs[0].text
        assert got.choices[0].finish_reason == mine.outputs[0].finish_reason
        assert got.usage is not None and got.usage.prompt_tokens == len(mine.prompt_token_ids)
        assert got.usage.completion_tokens == len(mine.outputs[0].token_ids)


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=32, temperature=0, n=2)
    texts, reasons, usage = ["", ""], {}, None
    for chunk in client.completions.create(model="demo", prompt=PROMPT, max_tokens=32, temperature=0, n=2, stream=True,
                                           stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == [c.text for c in whole.choices] and reasons == {0: "length", 1: "length"}
    assert usage is not None and whole.usage is not None and usage.completion_tokens == whole.usage.completion_tokens == 64


def test_cached_tokens_are_counted_once(client: openai.OpenAI) -> None:
    """However many pieces a stream has, and for each of several prompts."""
    prompt = "import os\n" * 30
    first = client.completions.create(model="demo", prompt=prompt, max_tokens=1).usage
    assert first is not None
    usages = [chunk.usage for chunk in client.completions.create(
        model="demo", prompt=[prompt, prompt], max_tokens=24, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True})]
    last = usages[-1]
    assert last is not None and last.prompt_tokens_details is not None and last.prompt_tokens == 2 * first.prompt_tokens
    whole = (first.prompt_tokens - 1) // 32 * 32
    assert whole and last.prompt_tokens_details.cached_tokens == 2 * whole


def test_many_prompts_as_text_and_as_tokens(client: openai.OpenAI, llm: LLM) -> None:
    prompts = [PROMPT, "import os\n", "class A"]
    ids = [llm.encode(p) for p in prompts]
    texts = client.completions.create(model="demo", prompt=prompts, max_tokens=8, temperature=0, n=2)
    tokens = client.completions.create(model="demo", prompt=ids, max_tokens=8, temperature=0, n=2)
    one = client.completions.create(model="demo", prompt=ids[1], max_tokens=8, temperature=0)
    assert [c.index for c in texts.choices] == list(range(6))
    assert [c.text for c in texts.choices] == [c.text for c in tokens.choices]
    assert one.choices[0].text == texts.choices[2].text == texts.choices[3].text


def test_echo_with_logprobs_of_the_prompt(client: openai.OpenAI, llm: LLM) -> None:
    """What evaluation harnesses ask for: how likely each token of the prompt is."""
    ids = llm.encode(PROMPT + "\n    with open(path) as f:\n        return f.read().splitlines()")
    for more in ({"max_tokens": 1}, {"max_tokens": 0}):
        got = client.completions.create(model="demo", prompt=ids, echo=True, logprobs=3, temperature=0, **more)  # type: ignore[call-overload]
        found = got.choices[0].logprobs
        logits = llm.logits(ids).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert found.token_logprobs[0] is None and len(found.tokens) == len(ids) + more["max_tokens"]
        assert found.token_logprobs[1:len(ids)] == pytest.approx([table[i, t] for i, t in enumerate(ids[1:])], abs=1e-9)
        greedy = [int(row.argmax()) for row in table]
        best = [max(top, key=top.get) for top in found.top_logprobs[1:len(ids)]]
        assert best == [llm.tokenizer.decode([t], skip_special_tokens=False) for t in greedy[:-1]]  # type: ignore[union-attr]
        assert got.choices[0].text.startswith(PROMPT) or got.choices[0].text.startswith("<|bos|>" + PROMPT)
        assert "".join(found.tokens) == got.choices[0].text


def test_stop_strings_bias_and_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    got = client.completions.create(model="demo", prompt=PROMPT, max_tokens=64, temperature=0, stop=["\n"],
                                    extra_body={"include_stop_str_in_output": True}, logprobs=2)
    choice = got.choices[0]
    assert choice.finish_reason == "stop" and choice.text.endswith("\n") and choice.text.count("\n") == 1
    assert choice.logprobs is not None and all(len(t) in (2, 3) for t in choice.logprobs.top_logprobs or [])
    token = llm.encode("x", add_special_tokens=False)[0]
    forced = client.completions.create(model="demo", prompt=PROMPT, max_tokens=3, temperature=0,
                                       logit_bias={str(token): 100})
    assert forced.choices[0].text == "xxx"


@pytest.mark.parametrize("body, param", [
    ({}, "prompt"), ({"prompt": "x", "temperature": -1}, "temperature"), ({"prompt": "x", "n": 10**6}, "n"),
    ({"prompt": "x", "max_tokens": "many"}, "max_tokens"), ({"prompt": "x", "suffix": "y"}, None),
    ({"prompt": "x", "best_of": 3}, "best_of"), ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
    ({"prompt": [[]]}, None), ({"prompt": [5000]}, None), ({"prompt": "x" * 5000}, None), ({"prompt": ["x"] * 300}, None),
    ({"prompt": "x", "logprobs": 100}, "logprobs"), ({"prompt": "x", "use_beam_search": True}, None),
    ({"prompt": "x", "logit_bias": {"9999": 1}}, None), ({"prompt": "x", "cache_salt": "x" * 500}, "cache_salt"),
    ({"prompt": ["x"] * 200, "n": 128}, "n"), ({"prompt": "x", "stop": [""]}, None), ({"prompt": "x", "max_tokens": 0}, None),
])
def test_what_cannot_be_served_is_refused(server: Server, body: dict[str, object], param: str | None) -> None:
    answer = httpx.post(server.url + "/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or error["param"] == param


def test_harmless_fields_are_ignored(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 1, "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto",
            "anything": [1], "stop": None, "seed": None, "logit_bias": None, "best_of": 1, "suffix": None}
    assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="more than the 1024 that fit"):
        client.completions.create(model="demo", prompt="x " * 2000)
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        list(client.completions.create(model="demo", prompt=[4999], stream=True))


def test_models_and_tokens(client: openai.OpenAI, server: Server, llm: LLM) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    got = httpx.post(server.url + "/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert got["tokens"] == llm.encode(PROMPT) and got["count"] == len(got["tokens"]) == len(got["token_strs"])
    back = httpx.post(server.url + "/detokenize", json={"tokens": got["tokens"]}).json()
    assert back["prompt"] == "<|bos|>" + PROMPT
    chat = httpx.post(server.url + "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"] == llm.chat_prompt([{"role": "user", "content": "hi"}])
