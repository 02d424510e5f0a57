"""Chat templates run in a sandbox and refuse what is malformed."""

from __future__ import annotations

import pytest

from inferloom.runtime.chat import ChatTemplate
from inferloom.runtime.errors import RequestError

USER = [{"role": "user", "content": "hi"}]


def test_renders_messages_and_special_tokens() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(USER) == "<s>[user]hi"


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no') }}",
    "{{ 1 // 0 }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% if %}",
])
def test_what_escapes_or_fails_is_refused(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source, {}).render(USER)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"]])
def test_malformed_messages_are_refused(messages: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(RequestError):
        ChatTemplate("x", {}).render(messages)
