"""`/v1/embeddings`, asked by OpenAI's client, on a server that generates and embeds."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest

from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.server import engine as processes
from inferloom.runtime.server.api import embeddings
from inferloom.runtime.server.endpoint import Call
from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.settings import ModelSettings, Settings
from tests.runtime.server.conftest import Server

TEXTS = ["def f(x):\n    return x", "a", "import os"]


@pytest.fixture(scope="module")
def both(tiny_artifact: Path, tiny_embed: Path) -> Iterator[Server]:
    made = Server(str(tiny_embed), str(tiny_artifact), "--served-model-name", "embedder", "--served-model-name", "writer",
                  "--threads", "1")
    yield made
    assert made.close() == 0


@pytest.fixture(scope="module")
def client(both: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=both.url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def llm(tiny_embed: Path) -> Iterator[LLM]:
    with LLM(tiny_embed, threads=1) as made:
        yield made


def numbers(made: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [d.index for d in made.data] == list(range(len(made.data))) and made.model == "embedder" and made.object == "list"
    return np.array([d.embedding for d in made.data], np.float32)


def test_answers_are_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    """Texts and tokens, one and many; the client asks for base64 by itself, and decodes it."""
    want, ids = llm.embed(TEXTS), [llm.encode(text) for text in TEXTS]
    for given, rows in ((TEXTS[0], want[:1]), (TEXTS, want), (ids[0], want[:1]), (ids, want)):
        made = client.embeddings.create(model="embedder", input=given)
        assert np.array_equal(numbers(made), rows)
        count = sum(map(len, ids[:len(rows)]))
        assert made.usage.prompt_tokens == made.usage.total_tokens == count
        floats = client.embeddings.create(model="embedder", input=given, encoding_format="float")
        assert np.array_equal(numbers(floats), rows)


def test_base64_is_little_endian_f32(both: Server, llm: LLM) -> None:
    body = {"model": "embedder", "input": TEXTS[0], "encoding_format": "base64"}
    made = httpx.post(both.url + "/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(made), "<f4"), llm.embed(TEXTS[0])[0])


def test_pooling_dimensions_and_length(client: openai.OpenAI, llm: LLM) -> None:
    mean = client.embeddings.create(model="embedder", input=TEXTS, extra_body={"pooling": "mean"})
    assert np.array_equal(numbers(mean), llm.embed(TEXTS, "mean"))
    plain = client.embeddings.create(model="embedder", input=TEXTS, extra_body={"normalize": False})
    assert np.array_equal(numbers(plain), llm.embed(TEXTS, normalize=False))
    short = numbers(client.embeddings.create(model="embedder", input=TEXTS, dimensions=16))
    full = llm.embed(TEXTS)[:, :16]
    assert short.shape == (3, 16) and np.allclose(short, full / np.linalg.norm(full, axis=1, keepdims=True), atol=1e-6)
    assert all(math.isclose(float(np.linalg.norm(row)), 1, rel_tol=1e-6) for row in short)


def test_more_inputs_than_run_at_once(client: openai.OpenAI, llm: LLM) -> None:
    """A batch of this artifact has 8 sequences."""
    prompts = [[i % 256, *range(i % 60)] for i in range(150)]
    assert np.array_equal(numbers(client.embeddings.create(model="embedder", input=prompts)), llm.embed(prompts))


@pytest.mark.parametrize(("body", "message"), [
    ({"input": []}, "at least 1"), ({"input": [[]]}, "at least 1"), ({"input": ""}, "input 0 has 0 tokens"),
    ({"input": ["a", [1] * 3]}, "valid"), ({"input": "a" * 257}, "257 tokens; it may have 1 to 256"),
    ({"input": ["a", "b" * 300]}, "input 1 has 300 tokens"), ({"input": ["a"] * 2049}, "at most 2048"),
    ({"input": [[258]]}, "outside the vocabulary"), ({"input": 5}, "valid array"),
    ({"input": [[-1]]}, "greater than or equal to 0"),
    ({"input": "a", "dimensions": 65}, "dimensions is at most 64"), ({"input": "a", "dimensions": 0}, "greater than"),
    ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'"), ({"input": "a", "pooling": "max"}, "'last' or 'mean'"),
    ({"input": "a", "truncate_prompt_tokens": 4}, "not supported")])
def test_wrong_requests_say_what_is_wrong(both: Server, body: dict[str, object], message: str) -> None:
    answer = httpx.post(both.url + "/v1/embeddings", json={"model": "embedder"} | body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_one_bad_input_ends_the_whole_request(both: Server, llm: LLM) -> None:
    answer = httpx.post(both.url + "/v1/embeddings", json={"model": "embedder", "input": [[1, 2]] * 20 + [[999]]})
    assert answer.status_code == 400 and "999 is outside the vocabulary" in answer.json()["error"]["message"]
    answer = httpx.post(both.url + "/v1/embeddings", json={"model": "embedder", "input": TEXTS, "encoding_format": "float"})
    assert np.array_equal(np.float32([d["embedding"] for d in answer.json()["data"]]), llm.embed(TEXTS))


def test_answers_are_bounded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model all inputs fit into an answer, of a large one they do not."""
    model = SimpleNamespace(name="embedder", manifest=llm.manifest)
    models = SimpleNamespace(of=lambda name, task: model)
    monkeypatch.setattr(embeddings, "MAX_NUMBERS", 100)
    body = embeddings.EmbeddingBody(input=["a", "b"])
    with pytest.raises(HttpError, match="2 embeddings of 64 numbers are more than 100 numbers"):
        asyncio.run(embeddings.Embeddings(models)(body, Call("", b"")))  # type: ignore[arg-type]


def test_each_model_refuses_the_others_requests(both: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="writer: .*--task embed"):
        client.embeddings.create(model="writer", input="a")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="a")
    messages = [{"role": "user", "content": "a"}]
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": messages}),
                       ("/v1/responses", {"input": "a"}), ("/v1/messages", {"messages": messages, "max_tokens": 4})):
        answer = httpx.post(both.url + path, json={"model": "embedder"} | body)
        assert answer.status_code == 400, answer.text
        assert "embedder: the artifact was compiled to embed" in answer.json()["error"]["message"]
    assert client.completions.create(model="writer", prompt="a", max_tokens=2, temperature=0).choices[0].finish_reason
    for path, body, name in (("/v1/completions", {"prompt": "a", "max_tokens": 1}, "writer"),
                             ("/v1/embeddings", {"input": "a"}, "embedder")):
        assert httpx.post(both.url + path, json=body).json()["model"] == name, "without a name, the first that can"


def test_a_client_that_leaves_ends_its_inputs(both: Server) -> None:
    prompts = [[i % 256] * 250 for i in range(500)]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(both.url + "/v1/embeddings", json={"model": "embedder", "input": prompts}, timeout=0.05)
    made = httpx.post(both.url + "/v1/embeddings", json={"model": "embedder", "input": "a"}, timeout=30)
    assert made.status_code == 200


def test_an_engine_that_embeds_between_its_deaths_is_not_given_up(tiny_embed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_DEATHS", 2)

    async def main() -> None:
        engine = processes.EngineProcess(ModelSettings(str(tiny_embed), ("embedder",), threads=1), Settings())
        await engine.start()

        async def kill(then: str) -> None:
            assert engine._process is not None
            engine._process.kill()
            async with asyncio.timeout(30):
                while engine.deaths <= before or engine.state != then:
                    await asyncio.sleep(0.01)

        before = 0
        for before in range(3):
            async for update in engine.stream([1, 2, 3], SamplingParams(), pooling="last"):
                assert update.embedding is not None
            await kill("ready")
        before = 3  # and now nothing is asked
        await kill("failed")
        await engine.stop()

    asyncio.run(main())
