"""One request, timed: when its first token came, the gaps between the others, and how it ended."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(slots=True)
class Timing:
    """Seconds: `start` since the run began, to the first token, between later ones, and in all.

    `tokens` as the server counts them, `cached` of the prompt's `prompt_tokens`, of which it has `seen` so many in the turn
    before; `error` is what went wrong, with the HTTP status where there was one.
    """

    name: str
    start: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    whole: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached: int = 0
    seen: int = 0
    text: str = ""
    error: str | None = None
    status: int = 0


class Client:
    """Asks one server through `/v1/chat/completions` or `/v1/completions`."""

    def __init__(self, base_url: str, model: str, endpoint: str, api_key: str | None = None, seconds: float = 600.0,
                 began: float | None = None, extra: dict[str, Any] | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=base_url.rstrip("/"), headers=headers, timeout=seconds,
                                       limits=httpx.Limits(max_connections=None), trust_env=False)
        self.model, self._chat, self._extra = model, endpoint == "chat", extra or {}
        self.began = time.perf_counter() if began is None else began

    async def ask(self, name: str, messages: list[dict[str, str]], max_tokens: int,
                  extra: dict[str, Any] | None = None) -> Timing:
        """Answer `messages`; whatever happens is in the timing."""
        made = Timing(name, time.perf_counter() - self.began)
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "stream": True,
                                "ignore_eos": True, "stream_options": {"include_usage": True}, **self._extra, **(extra or {})}
        if self._chat:
            body["messages"] = messages
        else:
            body["prompt"] = "\n".join(m["content"] for m in messages) + "\n"
        start = last = time.perf_counter()
        try:
            path = "/v1/chat/completions" if self._chat else "/v1/completions"
            async with self._http.stream("POST", path, json=body) as answer:
                made.status = answer.status_code
                if answer.status_code != 200:
                    made.error = f"{answer.status_code} {(await answer.aread()).decode(errors='replace')[:200]}"
                    return made
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    last = self._take(made, json.loads(line[6:]), start, last)
        except (httpx.HTTPError, ValueError) as error:
            made.error = f"{type(error).__name__}: {error}"
        made.whole = time.perf_counter() - start
        if made.error is None and made.first is None:
            made.error = "the stream ended without a token"
        return made

    def _take(self, made: Timing, chunk: dict[str, Any], start: float, last: float) -> float:
        now = time.perf_counter()
        if chunk.get("error"):
            made.error = str(chunk["error"])[:200]
        usage = chunk.get("usage")
        if usage:
            made.tokens, made.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            made.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            text = (delta.get("content") or delta.get("reasoning") or "") if self._chat else choice.get("text") or ""
            if not text:
                continue
            made.text += text
            if made.first is None:
                made.first = now - start
            else:
                made.gaps.append(now - last)
            last = now
        return last

    async def models(self) -> list[str]:
        """Names of the models that the server has."""
        answer = await self._http.get("/v1/models")
        answer.raise_for_status()
        return [entry["id"] for entry in answer.json()["data"]]

    async def close(self) -> None:
        await self._http.aclose()
