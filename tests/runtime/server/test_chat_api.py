"""`/v1/chat/completions` with OpenAI's own client."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import openai
import pytest

from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.runtime.server.conftest import Server

MESSAGES = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Read a file."}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "op": {"enum": ["plus", "minus"]}},
    "required": ["a", "op"], "additionalProperties": False}}}
CALL = r'<tool_call>\{"name": "add", "arguments": \{"a": [0-9]\}\}</tool_call>'


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_a_chat_is_the_engines_answer(client: openai.OpenAI, chat_artifact: Path) -> None:
    got = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=20, temperature=0)  # type: ignore[call-overload]
    with LLM(chat_artifact, threads=1) as llm:
        mine = llm.chat(MESSAGES, SamplingParams(max_tokens=20, temperature=0))
    assert got.choices[0].message.content == mine.outputs[0].text and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "length" and got.usage.prompt_tokens == len(mine.prompt_token_ids)


def test_parts_and_developers_read_the_same(client: openai.OpenAI) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "You write "}, {"type": "text", "text": "Python."}]},
             {"role": "user", "content": "Read a file."}]
    answers = [client.chat.completions.create(model="demo", messages=m, max_completion_tokens=9, temperature=0)  # type: ignore[call-overload]
               for m in (MESSAGES, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    ask = dict(model="demo", messages=MESSAGES, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    text, logprobs, reason, usage, roles = "", [], None, None, []
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            logprobs += choice.logprobs.content if choice.logprobs else []
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    assert roles == ["assistant"] and reason == "length"
    assert text == whole.choices[0].message.content and usage.completion_tokens == whole.usage.completion_tokens
    assert logprobs == whole.choices[0].logprobs.content and len(logprobs) == 24
    for step in logprobs:
        assert len(step.top_logprobs) == 3 and step.top_logprobs[0].logprob == step.logprob  # greedy takes the first
        assert bytes(step.bytes).decode() == step.token


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_fits_its_schema(client: openai.OpenAI, choice: object, stream: bool) -> None:
    ask = dict(model="demo", messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=300, temperature=0.7, seed=3,
               parallel_tool_calls=False)
    if stream:
        name, arguments, reason = "", "", None
        for chunk in client.chat.completions.create(**ask, stream=True):  # type: ignore[call-overload]
            for each in chunk.choices[0].delta.tool_calls or []:
                name, arguments = name + (each.function.name or ""), arguments + (each.function.arguments or "")
            reason = chunk.choices[0].finish_reason or reason
    else:
        got = client.chat.completions.create(**ask)  # type: ignore[call-overload]
        (call,) = got.choices[0].message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, got.choices[0].finish_reason
        assert got.choices[0].message.content is None
    assert name == "add" and reason == "tool_calls"
    made = json.loads(arguments)
    assert made.keys() == {"a", "op"} and made["a"] in range(10) and made["op"] in ("plus", "minus")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_the_models_words_is_read(client: openai.OpenAI, stream: bool) -> None:
    ask = dict(model="demo", messages=MESSAGES, tools=[TOOL], max_tokens=200, temperature=0,
               extra_body={"structured_outputs": {"regex": f"Sure[.] {CALL}\n{CALL}"}})
    if stream:
        text, calls = "", {}
        for chunk in client.chat.completions.create(**ask, stream=True):  # type: ignore[call-overload]
            text += chunk.choices[0].delta.content or ""
            for each in chunk.choices[0].delta.tool_calls or []:
                calls[each.index] = calls.get(each.index, "") + (each.function.name or "") + each.function.arguments
            reason = chunk.choices[0].finish_reason
    else:
        got = client.chat.completions.create(**ask).choices[0]  # type: ignore[call-overload]
        text, reason = got.message.content, got.finish_reason
        calls = {i: c.function.name + c.function.arguments for i, c in enumerate(got.message.tool_calls)}
        assert len({c.id for c in got.message.tool_calls}) == 2
    assert text == "Sure. " and reason == "tool_calls" and calls.keys() == {0, 1}
    assert all(c.startswith('add{"a": ') for c in calls.values())


def test_calls_and_their_results_go_back_into_the_prompt(client: openai.OpenAI, server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "3"}]
    got = client.chat.completions.create(model="demo", messages=messages, tools=[TOOL], max_tokens=4)  # type: ignore[call-overload]
    assert got.choices[0].finish_reason == "length"
    tokens = httpx.post(server.url + "/tokenize", json={"messages": messages}).json()["tokens"]
    text = httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert 'add({"a": 1})' in text and "[tool]\n3" in text


@pytest.mark.parametrize("form, holds", [
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": TOOL["function"]["parameters"]}},  # type: ignore[index]
     lambda text: json.loads(text).keys() == {"a", "op"}),
    ({"type": "text"}, lambda text: len(text) > 0),
])
def test_response_formats(client: openai.OpenAI, form: object, holds) -> None:  # type: ignore[no-untyped-def]
    got = client.chat.completions.create(model="demo", messages=MESSAGES, response_format=form, max_tokens=200, seed=5)  # type: ignore[call-overload]
    assert holds(got.choices[0].message.content)


def test_json_object(client: openai.OpenAI) -> None:
    """Any object: if it ends, it is JSON."""
    for seed in range(3):
        got = client.chat.completions.create(model="demo", messages=MESSAGES, response_format={"type": "json_object"},  # type: ignore[call-overload]
                                             max_tokens=200, seed=seed).choices[0]
        assert got.message.content.lstrip().startswith("{")
        if got.finish_reason == "stop":
            assert isinstance(json.loads(got.message.content), dict)


@pytest.mark.parametrize("wanted, pattern", [
    ({"regex": "(yes|no)[0-9]{3}"}, r"(yes|no)\d{3}"),
    ({"choice": ["red", "dark blue", 'a "quoted" one']}, r"red|dark blue|a \"quoted\" one"),
    ({"grammar": 'start: "a" ("b" | "c")~3'}, "a[bc]{3}"), ({"json": '{"enum": [17]}'}, "17"),
])
def test_structured_outputs(client: openai.OpenAI, wanted: object, pattern: str) -> None:
    for n in (1, 3):
        got = client.chat.completions.create(model="demo", messages=MESSAGES, n=n, max_tokens=60,  # type: ignore[call-overload]
                                             extra_body={"structured_outputs": wanted})
        assert len(got.choices) == n
        for choice in got.choices:
            assert re.fullmatch(pattern, choice.message.content) and choice.finish_reason == "stop"


def _nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("wanted", [
    {"regex": "[[["}, {"grammar": "start: nothing"},
    {"json": "{"}, {"json": {"type": "nope"}}, {"json": {"$ref": "http://127.0.0.1:1/x"}}, {"json": _nested(90)},
    {"regex": "a" * 70_000}, {}, {"regex": "a", "json_object": True}, {"choice": []}, {"structural_tag": "x"},
])
def test_grammar_bombs_fail_alone(server: Server, wanted: object) -> None:
    answer = httpx.post(server.url + "/v1/chat/completions", timeout=20, json={
        "messages": MESSAGES, "max_tokens": 4, "structured_outputs": wanted})
    assert answer.status_code == 400, answer.text
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("wanted", [
    {"regex": "(a{1,9999}){1,9999}(b{1,9999}){1,9999}" * 40}, {"regex": "(((a+)+)+)+$"},
    {"grammar": "start: s\ns: s s | s s s | \"a\" | \"aa\" | \"aaa\"\n"},
    {"json": {"anyOf": [{"type": "string", "pattern": f"^(a{{{i},99999}}b?)*$"} for i in range(1, 400)]}},
])
def test_costly_grammars_take_bounded_time(server: Server, wanted: object) -> None:
    """They are refused, or served; either soon."""
    start = time.monotonic()
    answer = httpx.post(server.url + "/v1/chat/completions", timeout=20, json={
        "messages": MESSAGES, "max_tokens": 8, "structured_outputs": wanted})
    assert answer.status_code in (200, 400), answer.text
    assert time.monotonic() - start < 10
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("body", [
    {"messages": []}, {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}]},
    {"messages": MESSAGES, "tool_choice": "required"}, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": {
        "type": "function", "function": {"name": "other"}}}, {"messages": MESSAGES, "functions": [{"name": "f"}]},
    {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, {"messages": MESSAGES, "chat_template_kwargs": {"evil": True}},
    {"messages": MESSAGES, "top_logprobs": 3}, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 900},
    {"messages": MESSAGES, "audio": {"voice": "x"}}, {"messages": MESSAGES, "continue_final_message": True},
    {"messages": MESSAGES, "response_format": {"type": "xml"}},
    {"messages": MESSAGES, "response_format": {"type": "json_schema"}},
    {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
])
def test_what_cannot_be_served_is_refused(server: Server, body: dict[str, object]) -> None:
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_seeds_and_priorities_are_taken(client: openai.OpenAI) -> None:
    ask = dict(model="demo", messages=MESSAGES, max_tokens=16, temperature=1, seed=11)
    texts = {client.chat.completions.create(**ask, extra_body={"priority": p}).choices[0].message.content  # type: ignore[call-overload]
             for p in (0, 5, -5)}
    assert len(texts) == 1
