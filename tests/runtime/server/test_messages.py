"""`/v1/messages` with Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

from tests.runtime.server.conftest import Server

MESSAGES: Any = [{"role": "user", "content": "Read a file."}]
TOOL: Any = {"name": "add", "description": "Adds.", "input_schema": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "op": {"enum": ["plus", "minus"]}},
    "required": ["a", "op"], "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def test_a_message_is_the_same_as_a_chat(client: anthropic.Anthropic, server: Server) -> None:
    got = client.messages.create(model="demo", system="You write Python.", messages=MESSAGES, max_tokens=20,
                                 extra_body={"temperature": 0})
    chat = httpx.post(server.url + "/v1/chat/completions", json={
        "messages": [{"role": "system", "content": "You write Python."}, *MESSAGES], "max_tokens": 20,
        "temperature": 0}).json()
    assert got.content[0].type == "text" and got.content[0].text == chat["choices"][0]["message"]["content"]
    assert got.stop_reason == "max_tokens" and got.role == "assistant" and got.model == "demo"
    assert got.usage.output_tokens == 20
    assert got.usage.input_tokens + (got.usage.cache_read_input_tokens or 0) == chat["usage"]["prompt_tokens"]


def test_streams_say_the_same(client: anthropic.Anthropic) -> None:
    ask: Any = dict(model="demo", messages=MESSAGES, max_tokens=24, extra_body={"temperature": 0})
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason  # type: ignore[union-attr]
    assert final.usage.output_tokens == 24
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_stop_sequences(client: anthropic.Anthropic) -> None:
    got = client.messages.create(model="demo", messages=MESSAGES, max_tokens=200, stop_sequences=["\n"],
                                 extra_body={"temperature": 0})
    assert got.stop_reason == "stop_sequence" and got.stop_sequence == "\n"


@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "add"}])
def test_forced_calls(client: anthropic.Anthropic, choice: Any) -> None:
    ask: Any = dict(model="demo", messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=300,
                    extra_body={"temperature": 0.9})
    for made in (client.messages.create(**ask), client.messages.stream(**ask).__enter__().get_final_message()):
        (block,) = made.content
        assert made.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "add" and block.id
        assert block.input.keys() == {"a", "op"} and block.input["a"] in range(10)  # type: ignore[attr-defined,index]


def test_calls_and_results_go_back_into_the_prompt(client: anthropic.Anthropic) -> None:
    messages: Any = [*MESSAGES, {"role": "assistant", "content": [
        {"type": "text", "text": "Adding."}, {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": [
            {"type": "text", "text": "three"}]}, {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}}]}]
    got = client.messages.create(model="demo", messages=messages, tools=[TOOL], max_tokens=3)
    assert got.usage.output_tokens == 3
    short = client.messages.count_tokens(model="demo", messages=MESSAGES).input_tokens
    long = client.messages.count_tokens(model="demo", messages=messages).input_tokens
    tools = client.messages.count_tokens(model="demo", messages=messages, tools=[TOOL]).input_tokens
    assert 0 < short < long < tools == got.usage.input_tokens + (got.usage.cache_read_input_tokens or 0)


def test_structured_output(client: anthropic.Anthropic) -> None:
    got = client.messages.create(model="demo", messages=MESSAGES, max_tokens=300, extra_body={
        "output_config": {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}})
    assert json.loads(got.content[0].text).keys() == {"a", "op"}  # type: ignore[union-attr]


def test_errors_reach_the_client_as_its_own(client: anthropic.Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(model="nope", messages=MESSAGES, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        client.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}]}])
    with pytest.raises(anthropic.BadRequestError, match="that fit"):
        client.messages.create(model="demo", messages=MESSAGES, max_tokens=100_000)
    body = httpx.post(server.url + "/v1/messages", json={"model": "demo", "messages": MESSAGES}).json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in body["error"]["message"]
    for more in ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {"mcp_servers": [{"url": "x"}]},
                 {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "tool"}, "tools": [TOOL]}):
        answer = httpx.post(server.url + "/v1/messages", json={"model": "demo", "messages": MESSAGES, "max_tokens": 1} | more)
        assert answer.status_code == 400, more
