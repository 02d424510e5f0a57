"""What answers have in common: lengths, usage, events, log-probabilities."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.model import Model
from inferloom.runtime.server.wire import Scored

DONE = b"data: [DONE]\n\n"


def new_id(kind: str) -> str:
    """An id such as `chatcmpl-...`."""
    return kind + secrets.token_hex(12)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def room(model: Model, prompt: list[int], wanted: int | None) -> int:
    """How many tokens the answer may have: what is wanted, or what fits. HttpError 400 when that is none or too many."""
    left = model.longest - len(prompt)
    if not prompt:
        raise bad_request("the prompt is empty")
    if left < 1 or (wanted is not None and wanted > left):
        asked = "an answer" if wanted is None else f"{wanted} tokens of answer"
        raise bad_request(f"the prompt has {len(prompt)} tokens, and with {asked} that is more than the "
                          f"{model.longest} that fit: make either shorter", "max_tokens")
    return left if wanted is None else wanted


def usage(prompt: int, made: int, cached: int = 0) -> dict[str, Any]:
    """Counts of tokens, as OpenAI says them."""
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached}}


def scored(model: Model, token: int, logprob: float) -> dict[str, Any]:
    """A token with its log-probability and bytes, as chats have it."""
    return {"token": model.texts.text(token), "logprob": logprob, "bytes": list(model.texts.data(token))}


def chat_logprobs(model: Model, tokens: list[int], steps: list[list[Scored]], top: int) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat: each token, and the `top` most likely ones."""
    made = []
    for token, entries in zip(tokens, steps, strict=True):
        own = next(p for t, p, _ in entries if t == token)
        best = sorted(entries, key=lambda e: e[2])[:top]
        made.append(scored(model, token, own) | {"top_logprobs": [scored(model, t, p) for t, p, _ in best]})
    return made
