"""Keys, hosts, origins, sizes: what does not get past the door."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferloom.runtime.errors import RequestError
from inferloom.runtime.server.endpoint import Bodies
from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.settings import Settings
from tests.runtime.server.conftest import Server

KEYS = ("key-of-alice", "key-of-bob-")
FORBIDDEN = ("torch", "transformers", "triton", "tvm", "tvm_ffi", "ziglang", "onnx", "pickle", "cloudpickle",
             "inferloom.compiler", "inferloom.ir", "inferloom.targets", "inferloom.models")


@pytest.fixture(scope="module")
def locked(chat_artifact: Path) -> Iterator[Server]:
    made = Server(str(chat_artifact), "--threads", "1", "--max-body", "20000",
                  "--allowed-origins", "https://good.example", env={"INFERLOOM_API_KEY": " ".join(KEYS)})
    yield made
    made.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/tokenize", "/version", "/v1/engine", "/nothing",
                                  "/health/../metrics", "//health", "/health/x", "/HEALTH", "/v1/messages", "/%2e/health"])
def test_everything_needs_a_key(locked: Server, path: str) -> None:
    with httpx.Client() as client:
        for headers in ({}, bearer("wrong-key"), {"authorization": "Bearer"}, {"x-api-key": KEYS[0][:-1]},
                        {"authorization": KEYS[0] + "x"}, {"authorization": f"Basic {KEYS[0]}"}):
            answer = client.get(locked.url + path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, answer.text)


def test_health_needs_none_and_each_key_works(locked: Server) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/ping"):
        assert httpx.get(locked.url + path).status_code == 200
    for key in KEYS:
        assert httpx.get(locked.url + "/v1/models", headers=bearer(key)).status_code == 200
        for headers in ({"x-api-key": key}, {"authorization": f"bearer  {key}"}, {"authorization": key}):
            assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200


def test_prefixes_are_not_shared_between_keys(locked: Server) -> None:
    def cached(key: str, **more: str) -> int:
        answer = httpx.post(locked.url + "/v1/completions", headers=bearer(key),
                            json={"prompt": "import os\n" * 40, "max_tokens": 1} | more)
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEYS[0]) == 0 and cached(KEYS[0]) > 0
    assert cached(KEYS[1]) == 0 and cached(KEYS[1]) > 0
    assert cached(KEYS[0], cache_salt="mine") == 0 and cached(KEYS[0], cache_salt="mine") > 0


@pytest.mark.parametrize("host, status", [("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403),
                                          ("localhost", 200), ("localhost:1234", 200), ("127.0.0.1", 200), ("[::1]:8000", 200),
                                          ("LOCALHOST", 200)])
def test_hosts(server: Server, host: str, status: int) -> None:
    """A page that makes its own name point at this machine is still refused."""
    assert httpx.get(server.url + "/v1/models", headers={"host": host}).status_code == status


def test_origins(server: Server, locked: Server) -> None:
    ask = {"origin": "https://evil.example"}
    assert httpx.get(server.url + "/v1/models", headers=ask).status_code == 403
    assert httpx.get(server.url + "/v1/models", headers={"origin": "null"}).status_code == 403
    assert httpx.get(server.url + "/v1/models", headers={"origin": server.url}).status_code == 200
    good = {"origin": "https://good.example"}
    before = httpx.options(locked.url + "/v1/models", headers=good | {"access-control-request-method": "POST"})
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == good["origin"]
    assert httpx.get(locked.url + "/v1/models", headers=good | bearer(KEYS[0])).headers[
        "access-control-allow-origin"] == good["origin"]
    assert httpx.get(locked.url + "/v1/models", headers=ask | bearer(KEYS[0])).status_code == 403
    assert httpx.options(locked.url + "/v1/models", headers=ask).status_code == 403
    # What clients send of their own may be sent, whatever it is called; what is no list of names is not said back.
    wanted = "authorization,x-stainless-os, anthropic-beta"
    for names, allowed in ((wanted, wanted), ("a: b", "authorization, content-type, x-api-key")):
        before = httpx.options(locked.url + "/v1/models", headers=good | {"access-control-request-headers": names})
        assert before.headers["access-control-allow-headers"] == allowed
        assert "retry-after" in before.headers["access-control-expose-headers"]


def test_paths_and_methods_that_are_not_there_are_said(locked: Server) -> None:
    with httpx.Client(base_url=locked.url, headers=bearer(KEYS[0])) as client:
        answer = client.post("/v1/v1/chat/completions", json={})
        assert answer.status_code == 404 and answer.json()["error"]["message"] == (
            "there is no POST /v1/v1/chat/completions here: /openapi.json lists what there is")
        answer = client.get("/v1/chat/completions")
        assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"
        assert "takes POST" in answer.json()["error"]["message"] and answer.headers["allow"] == "POST"
        answer = client.post("/v1/messages/nothing", json={})
        assert answer.status_code == 404 and answer.json()["type"] == "error", "as Anthropic's clients read it"
        assert answer.json()["error"]["type"] == "not_found_error"


def test_bodies_are_bounded_before_they_are_read(locked: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    with httpx.Client(base_url=locked.url, headers=bearer(KEYS[0])) as client:
        assert client.post("/v1/completions", content=b"x" * 30_000).status_code == 413
        assert client.post("/v1/completions", content=chunks()).status_code == 413
        refused = client.post("/v1/messages", content=b"x" * 30_000)
        assert refused.status_code == 413 and refused.json()["error"]["type"] == "request_too_large"


def test_bodies_are_bounded_together() -> None:
    settings = Settings(max_body_bytes=1024, send_timeout=0.3)
    bodies = Bodies(settings)

    async def read(*parts: bytes) -> bytes:
        left = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]

        async def receive() -> Any:
            if len(left) == 1 and left[0]["body"] == b"late":
                await asyncio.sleep(30)
            await asyncio.sleep(0.001)
            return left.pop(0)

        return await bodies.read({"headers": []}, receive)

    async def run() -> None:
        assert await read(b"ab", b"c") == b"abc"
        with pytest.raises(HttpError, match="does not come") as late:
            await read(b"x", b"late")
        assert late.value.status == 408
        many = await asyncio.gather(*(read(b"x" * 1000, b"y" * 20) for _ in range(12)), return_exceptions=True)
        refused = [m for m in many if isinstance(m, HttpError)]
        assert refused and all(r.status == 503 and r.retry_after for r in refused) and len(refused) < 12
        assert bodies.held == 0

    asyncio.run(run())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"a":' * 3_000,
                                  b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}',
                                  b'{"prompt": "\\ud800", "max_tokens": 1}', b'{"prompt": 12345678901234567890123}'])
def test_bodies_that_are_not_json(server: Server, body: bytes) -> None:
    answer = httpx.post(server.url + "/v1/completions", content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there(server: Server) -> None:
    assert httpx.get(server.url + "/v1/nothing").status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    assert httpx.post(server.url + "/health").status_code == 405


def test_request_ids(server: Server) -> None:
    assert httpx.get(server.url + "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = httpx.get(server.url + "/health", headers={"x-request-id": "a b\"<script>"}).headers["x-request-id"]
    assert len(made) == 32
    assert any(e.get("request_id") == "abc-1" and e["event"] == "request" for e in server.events)


def test_logs_hold_no_prompts(server: Server) -> None:
    httpx.post(server.url + "/v1/completions", json={"prompt": "a-secret-in-a-prompt", "max_tokens": 1})
    httpx.post(server.url + "/v1/completions", json={"prompt": ["a-secret-in-a-prompt"], "max_tokens": -1})
    assert not any("a-secret" in line for line in server.lines)


def test_settings_that_are_unsafe_or_senseless() -> None:
    for bad in ({"host": "0.0.0.0"}, {"host": "192.168.1.5"}, {"host": "::"}, {"host": "example.org"}, {"max_queue": -1},
                {"keep_alive": 0.0}, {"api_keys": ("",)}, {"max_body_bytes": 3}, {"drain_timeout": float("nan")}):
        with pytest.raises(RequestError):
            Settings(**bad)  # type: ignore[arg-type]
    assert Settings(host="0.0.0.0", api_keys=("a-long-key",)).host == "0.0.0.0"
    assert Settings(host="::1").local and Settings(host="127.5.5.5").local


def test_metrics_have_own_names_and_vllms(server: Server) -> None:
    httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2})
    text = httpx.get(server.url + "/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
                 "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
                 "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket"):
        assert f"\ninferloom_{name}{{" in text and f"\nvllm:{name}{{" in text, name
    assert "vllm:http" not in text and 'path="/v1/completions"' in text


def test_the_server_imports_no_compiler() -> None:
    program = ("import sys, json; import inferloom.runtime.server.serve, inferloom.runtime.server.worker, inferloom.cli.app;"
               "print(json.dumps(sorted(sys.modules)))")
    modules = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                                        timeout=60).stdout)
    own = [m for m in modules if m.startswith("inferloom.runtime.server.")]
    assert len(own) > 15
    assert [m for m in modules if any(m == f or m.startswith(f + ".") for f in FORBIDDEN if f != "pickle")] == []


def test_no_pickle_anywhere_in_the_runtime() -> None:
    root = Path(__file__).resolve().parents[3] / "runtime"
    found = [str(p) for p in root.rglob("*.py")
             if re.search(r"\b(import|from) +(pickle|cloudpickle|marshal|shelve|dill)\b|torch\.load|\beval\(|\bexec\(",
                          p.read_text())]
    assert found == []


def test_several_models_in_one_server(start: Callable[..., Server], chat_artifact: Path, demo_bf16: Path) -> None:
    server = start(str(demo_bf16), "--served-model-name", "talker", "--served-model-name", "writer")
    assert [m["id"] for m in httpx.get(server.url + "/v1/models").json()["data"]] == ["talker", "writer"]
    assert len(server.engines()) == 2
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert httpx.post(server.url + "/v1/chat/completions", json=chat | {"model": "talker"}).status_code == 200
    refused = httpx.post(server.url + "/v1/chat/completions", json=chat | {"model": "writer"})
    assert refused.status_code == 400 and "no chat template" in refused.text
    assert httpx.post(server.url + "/v1/completions", json={"model": "writer", "prompt": "x"}).status_code == 200
    assert httpx.post(server.url + "/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 404


def test_without_the_extra_it_says_what_to_install(chat_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferloom.cli import serve
    from inferloom.errors import MissingExtraError

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(MissingExtraError, match=r"uvicorn; run: pip install 'inferloom\[serve\]'"):
        serve.serve([chat_artifact])


@pytest.mark.parametrize("wanted", [["a"], ["a", "b", "c"]])
def test_names_must_match_models(wanted: list[str]) -> None:
    from inferloom.cli.serve import _names
    from inferloom.errors import UsageError

    with pytest.raises(UsageError, match="give one each"):
        _names([Path("x"), Path("y")], wanted)
    assert _names([Path("x")], wanted) == [tuple(wanted)] and _names([Path("x"), Path("/y")], []) == [("x",), ("y",)]
