"""`/v1/responses` with OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.runtime.server.conftest import Server

TOOL: Any = {"type": "function", "name": "add", "description": "Adds.", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "op": {"enum": ["plus", "minus"]}},
    "required": ["a", "op"], "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_a_response_is_the_same_as_a_chat(client: openai.OpenAI, server: Server) -> None:
    got = client.responses.create(model="demo", instructions="You write Python.", input="Read a file.",
                                  max_output_tokens=20, temperature=0)
    chat = httpx.post(server.url + "/v1/chat/completions", json={"messages": [
        {"role": "system", "content": "You write Python."}, {"role": "user", "content": "Read a file."}],
        "max_tokens": 20, "temperature": 0}).json()
    assert got.output_text == chat["choices"][0]["message"]["content"]
    assert got.status == "incomplete" and got.incomplete_details.reason == "max_output_tokens"  # type: ignore[union-attr]
    assert got.usage is not None and got.usage.input_tokens == chat["usage"]["prompt_tokens"] and got.usage.output_tokens == 20


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    ask: Any = dict(model="demo", input=[{"role": "user", "content": [{"type": "input_text", "text": "Read a file."}]}],
                    max_output_tokens=24, temperature=0)
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        events = list(stream)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
def test_forced_calls(client: openai.OpenAI, choice: Any) -> None:
    ask: Any = dict(model="demo", input="Add.", tools=[TOOL], tool_choice=choice, max_output_tokens=300, temperature=0.9,
                    parallel_tool_calls=False)
    with client.responses.stream(**ask) as stream:
        streamed = stream.get_final_response()
    for made in (client.responses.create(**ask), streamed):
        (item,) = made.output
        assert made.status == "completed" and item.type == "function_call" and item.name == "add" and item.call_id
        assert json.loads(item.arguments).keys() == {"a", "op"}


def test_calls_and_results_go_back_into_the_prompt(client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": "Add."}, {"type": "reasoning", "id": "r", "summary": []},
                  {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
                  {"type": "function_call_output", "call_id": "c", "output": "3"}]
    short = client.responses.create(model="demo", input=items[:1], max_output_tokens=1)
    long = client.responses.create(model="demo", input=items, max_output_tokens=1)
    assert short.usage is not None and long.usage is not None and long.usage.input_tokens > short.usage.input_tokens + 5


def test_structured_output(client: openai.OpenAI) -> None:
    got = client.responses.create(model="demo", input="Add.", max_output_tokens=300, temperature=0.9, text={"format": {
        "type": "json_schema", "name": "x", "schema": TOOL["parameters"], "strict": True}})
    assert json.loads(got.output_text).keys() == {"a", "op"} and got.status == "completed"


@pytest.mark.parametrize("more", [
    {"previous_response_id": "resp_1"}, {"background": True}, {"tools": [{"type": "web_search"}]}, {"input": []},
    {"input": [{"type": "image_generation_call"}]}, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    {"text": {"format": {"type": "json_schema"}}}, {"tool_choice": {"type": "function"}, "tools": [TOOL]}, {"conversation": "c"},
    {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, {"max_output_tokens": 10**6},
])
def test_what_cannot_be_served_is_refused(server: Server, more: dict[str, object]) -> None:
    answer = httpx.post(server.url + "/v1/responses", json={"input": "x"} | more)
    assert answer.status_code == 400, answer.text
