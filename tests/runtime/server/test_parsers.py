"""Parsers say the same however the text is cut, lose none of it, and know what is no call."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from inferloom.runtime.errors import RequestError
from inferloom.runtime.server.parsers.base import Arguments, CallStart, Parser, Plain, Text, Thought
from inferloom.runtime.server.parsers.choice import TOOL_PARSERS, reasoning_parser, tool_parser
from inferloom.runtime.server.parsers.forced import ForcedArguments, ForcedList, arguments_schema, list_schema
from inferloom.runtime.server.parsers.reasoning import Reasoning
from inferloom.runtime.server.parsers.tagged import Tagged

Read = tuple[str, str, list[tuple[str, object]]]


def read(make: Callable[[], Parser], text: str) -> Read:
    """Thoughts, answer and calls of a text; the same for every way of cutting it."""
    r, results = random.Random(text), list[Read]()
    cuts = [[text], list(text), *[_cut(text, r) for _ in range(20)]]
    for parts in cuts:
        parser, thoughts, answer, calls = make(), "", "", list[tuple[str, str]]()
        for piece in [*(p for part in parts for p in parser.feed(part)), *parser.finish()]:
            if isinstance(piece, Text):
                answer += piece.text
            elif isinstance(piece, Thought):
                thoughts += piece.text
            elif isinstance(piece, CallStart):
                assert piece.index == len(calls) and piece.id
                calls.append((piece.name, ""))
            elif isinstance(piece, Arguments):
                name, before = calls[piece.index]
                calls[piece.index] = name, before + piece.text
        results.append((thoughts, answer, [(name, _json(arguments)) for name, arguments in calls]))
    assert all(r == results[0] for r in results)
    return results[0]


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _cut(text: str, r: random.Random) -> list[str]:
    places = sorted(r.sample(range(len(text) + 1), min(len(text), 5)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


CALL = '{"name": "f", "arguments": {"x": "<tool_call>"}}'
F = ("f", {"x": "<tool_call>"})


@pytest.mark.parametrize("text, answer, calls", [
    ("Just <b>text</b> < and <tool", "Just <b>text</b> < and <tool", []),
    (f"Ok.<tool_call>\n{CALL}\n</tool_call>", "Ok.", [F]),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}</tool_call>\n", "", [F, F]),
    (f"<tool_call>{CALL}", "", [F]),
    ("<tool_call>{not json}</tool_call> after", "<tool_call>{not json}</tool_call> after", []),
    ("<tool_call>{\"name\": 3}</tool_call>", "<tool_call>{\"name\": 3}</tool_call>", []),
    ("<tool_call>\n<function=g>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\nlines\n</parameter>\n</function>\n"
     "</tool_call>", "", [("g", {"a": 1, "b": "two\nlines"})]),
])
def test_tags(text: str, answer: str, calls: list[tuple[str, object]]) -> None:
    assert read(Tagged, text) == ("", answer, calls)


@pytest.mark.parametrize("text, answer, calls", [
    ("Hello", "Hello", []), ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
    ('<|python_tag|>{"name": "f", "parameters": {}}; '
     '{"name": "g", "parameters": {"y": [1]}}', "", [("f", {}), ("g", {"y": [1]})]),
    ('{"just": "json"}', '{"just": "json"}', []),
    ('{"name": "f", "parameters": {}} and more', '{"name": "f", "parameters": {}} and more', []),
    ("{cut off", "{cut off", []), ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
])
def test_bare_json(text: str, answer: str, calls: list[tuple[str, object]]) -> None:
    assert read(TOOL_PARSERS["llama3_json"], text) == ("", answer, calls)


@pytest.mark.parametrize("text, answer, calls", [
    ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', "", [("f", {"x": 1}), ("g", {})]),
    ('Let me see. [TOOL_CALLS] [{"name": "f", "arguments": {}}]', "Let me see. ", [("f", {})]),
    ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{"y": 2}', "", [("f", {"x": 1}), ("g", {"y": 2})]),
    ("[TOOL", "[TOOL", []), ("[TOOL_CALLS]nonsense", "[TOOL_CALLS]nonsense", []), ("{}", "{}", []),
])
def test_marks(text: str, answer: str, calls: list[tuple[str, object]]) -> None:
    assert read(TOOL_PARSERS["mistral"], text) == ("", answer, calls)


@pytest.mark.parametrize("text, thinking, thoughts, answer", [
    ("<think>\nhm\n</think>\n\nYes", False, "\nhm\n", "Yes"), ("hm</think>Yes", True, "hm", "Yes"), ("Yes", False, "", "Yes"),
    ("<think>for ever", False, "for ever", ""), ("a < b </thin", True, "a < b </thin", ""), (" <thin", False, "", " <thin"),
    ("<think></think>", False, "", ""), ("  Yes <think>no</think>", False, "", "  Yes <think>no</think>"), ("", True, "", ""),
])
def test_thoughts(text: str, thinking: bool, thoughts: str, answer: str) -> None:
    assert read(lambda: Reasoning(Plain(), thinking), text) == (thoughts, answer, [])


def test_calls_after_thoughts() -> None:
    text = f"<think>I will <tool_call>not yet</tool_call></think>\n<tool_call>{CALL}</tool_call>"
    assert read(lambda: Reasoning(Tagged(), False), text) == ("I will <tool_call>not yet</tool_call>", "", [F])


def test_forced_calls() -> None:
    assert read(ForcedList, '[{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {}}]') == (
        "", "", [("f", {"x": 1}), ("g", {})])
    assert read(ForcedList, '[{"name": "f", "par') == ("", '[{"name": "f", "par', [])
    assert read(lambda: ForcedArguments("f"), '{"x": 1}') == ("", "", [("f", {"x": 1})])
    one, many = (list_schema([{"name": "f", "parameters": {"type": "object"}}], p) for p in (False, True))
    assert one["maxItems"] == 1 and "maxItems" not in many and arguments_schema({"name": "g"})["additionalProperties"] is False


def test_parsers_are_chosen_by_name_or_template() -> None:
    assert tool_parser("auto", "... <tool_call> ...") == "hermes" and tool_parser("auto", "plain") is None
    assert tool_parser("auto", "<|python_tag|>") == "llama3_json" and tool_parser("auto", "[TOOL_CALLS]") == "mistral"
    assert tool_parser("none", "<tool_call>") is None and tool_parser("mistral", None) == "mistral"
    assert reasoning_parser("auto", "<think>") == "think" and reasoning_parser("auto", None) is None
    for choose in (tool_parser, reasoning_parser):
        with pytest.raises(RequestError, match="is not known"):
            choose("x", None)
