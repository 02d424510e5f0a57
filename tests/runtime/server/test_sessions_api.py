"""Sessions over HTTP: named, held, paused, resumed, closed, seen by nobody else, and there after a SIGKILL."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from inferloom.runtime.owners import owner_of
from inferloom.runtime.server import engine as processes
from inferloom.runtime.server import wire
from inferloom.runtime.server.api.fields import salted
from inferloom.runtime.server.api.wishes import MAX_ID, owner
from inferloom.runtime.server.errors import HttpError
from inferloom.runtime.server.guard import KEYED
from inferloom.runtime.server.settings import ModelSettings, Settings
from inferloom.runtime.sessions import MAX_NAME
from tests.runtime.server.conftest import Server
from tests.runtime.server.test_lifecycle import metric, until

KEYS = "key-of-one-tenant", "key-of-another"
SYSTEM = "You write Python. " + "Say what each function is for. " * 12
TURN: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Read a file."}]
OUTCOME = {"status", "why", "blocks", "place", "seconds"}


@pytest.fixture(scope="module")
def server(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With tiers, drafts and two tenants."""
    made = Server(str(chat_artifact), "--threads", "1", "--ram-bytes", "64MiB", "--state-dir",
                  str(tmp_path_factory.mktemp("state")), "--speculative", "ngram", "--num-speculative-tokens", "2",
                  env={"INFERLOOM_API_KEY": " ".join(KEYS), "INFERLOOM_DISK_BYTES": "1GiB"})
    yield made
    assert made.close() == 0


@pytest.fixture(scope="module")
def clients(server: Server) -> list[openai.OpenAI]:
    return [openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=60) for key in KEYS]


@pytest.fixture(scope="module")
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=KEYS[0], max_retries=0, timeout=60)


def ask(server: Server, method: str, path: str, key: int = 0, **more: Any) -> Any:
    answer = httpx.request(method, server.url + "/v1/sessions" + path, headers={"authorization": f"Bearer {KEYS[key]}"},
                           timeout=30, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def status(server: Server, method: str, path: str, key: int = 0, **more: Any) -> int:
    return httpx.request(method, server.url + "/v1/sessions" + path, headers={"authorization": f"Bearer {KEYS[key]}"},
                         timeout=30, **more).status_code


def saved(server: Server, name: str) -> dict[str, Any]:
    """The session, once it is on disk: that is written while others are answered."""
    end = time.monotonic() + 20
    while not (info := ask(server, "GET", name))["saved"]:
        assert time.monotonic() < end, info
        time.sleep(0.02)
    return dict(info)


def chat(client: openai.OpenAI, messages: list[Any] = TURN, **body: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0, extra_body=body)


def said(answer: Any) -> dict[str, Any]:
    """What an answer says of its session."""
    found: dict[str, Any] = answer.model_extra["inferloom"]["session"]
    assert found.keys() == OUTCOME | {"id"}
    return found


def test_it_starts_with_what_it_was_told(server: Server) -> None:
    loaded = server.wait_for("model loaded")
    assert (loaded["ram_bytes"], loaded["disk_bytes"], loaded["speculative"], loaded["num_speculative_tokens"]) == (
        64 << 20, 1 << 30, "ngram", 2)
    folder = Path(loaded["state_dir"])
    assert (folder / "index.sqlite").exists() and len(folder.name) == 32


def test_a_life(server: Server, clients: list[openai.OpenAI]) -> None:
    first = chat(clients[0], session_id="a/life", session_hold=60)
    outcome = said(first)
    assert (outcome["id"], outcome["status"], outcome["why"]) == ("a/life", "accepted", "") and outcome["blocks"] > 0
    (info,) = [s for s in ask(server, "GET", "")["data"] if s["id"] == "a/life"]
    assert info.keys() == {"object", "id", "model", "tokens", "blocks", "pooled", "in_ram", "on_disk", "leased_seconds",
                           "saved"}
    assert info["object"] == "session" and info["model"] == "demo" and info["blocks"] == info["pooled"] == outcome["blocks"]
    assert first.usage.prompt_tokens < info["tokens"] <= first.usage.prompt_tokens + 8

    paused = ask(server, "POST", "/a/life/pause", json={"seconds": 50, "place": "keep"})
    assert paused == {"status": "accepted", "why": "", "blocks": info["blocks"], "place": "keep", "seconds": 50}
    assert 49 < ask(server, "GET", "/a/life")["leased_seconds"] <= 50
    paused = ask(server, "POST", "/a/life/pause", json={"seconds": 50, "place": "disk", "returns_in": 1, "model": "demo"})
    assert (paused["status"], paused["place"]) == ("deferred", "disk")
    assert saved(server, "/a/life?model=demo") | {"leased_seconds": 0} == info | {"leased_seconds": 0, "saved": True}
    assert ask(server, "POST", "/a/life/resume", json={}) == {"status": "accepted", "why": "", "blocks": 0, "place": "keep",
                                                             "seconds": 0}

    reply = {"role": "assistant", "content": first.choices[0].message.content}
    again = chat(clients[0], [*TURN, reply, {"role": "user", "content": "And now?"}], session_id="a/life")
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 16
    assert said(again) == {"id": "a/life", "status": "accepted", "why": "", "blocks": 0, "place": "", "seconds": 0}
    assert ask(server, "GET", "/a/life")["tokens"] > info["tokens"]

    assert ask(server, "DELETE", "/a/life") == {"id": "a/life", "object": "session.deleted", "deleted": True}
    assert status(server, "GET", "/a/life") == status(server, "DELETE", "/a/life") == 404
    assert not [s for s in ask(server, "GET", "")["data"] if s["id"] == "a/life"]


def test_nobody_reaches_anothers(server: Server, clients: list[openai.OpenAI]) -> None:
    for client, messages in zip(clients, (TURN, [*TURN[:1], {"role": "user", "content": "Write a file, line by line."}])):
        chat(client, messages, session_id="same name")
    chat(clients[0], session_id="salted", cache_salt="of one user")
    mine, theirs = (ask(server, "GET", "/same name", key) for key in (0, 1))
    assert mine["tokens"] != theirs["tokens"]
    assert [s["id"] for s in ask(server, "GET", "", 1)["data"]] == ["same name"]
    chat(clients[0], session_id="mine")
    for method, path in (("GET", "/mine"), ("DELETE", "/mine"), ("POST", "/mine/pause"), ("POST", "/mine/resume")):
        assert status(server, method, path, 1, **({"json": {}} if method == "POST" else {})) == 404
    ask(server, "DELETE", "/same name", 1)
    assert ask(server, "GET", "/same name") == mine
    # A salt of the request's own is a tenant of its own, too.
    assert status(server, "GET", "/salted") == status(server, "GET", "/salted?cache_salt=of+another") == 404
    assert ask(server, "GET", "/salted?cache_salt=of+one+user")["id"] == "salted"
    assert status(server, "POST", "/salted/resume", json={}) == 404
    assert ask(server, "POST", "/salted/resume", json={"cache_salt": "of one user"})["status"] == "accepted"
    assert httpx.get(server.url + "/v1/sessions").status_code == 401


def test_lists_are_bounded_and_start_with_the_last_used(server: Server, clients: list[openai.OpenAI]) -> None:
    for name in ("b", "c", "d"):
        clients[0].completions.create(model="demo", prompt=SYSTEM, max_tokens=1, extra_body={"session_id": name})
    page = ask(server, "GET", "?limit=2")
    assert [s["id"] for s in page["data"]] == ["d", "c"] and page["has_more"] and page["object"] == "list"
    for limit in ("0", "1001", "x", "-1", "9" * 30):
        assert status(server, "GET", f"?limit={limit}") == 400


@pytest.mark.parametrize(("hint", "seconds", "places"), [
    ({"prompt_cache_key": "k"}, 0, {""}),
    ({"prompt_cache_key": "k", "prompt_cache_retention": "in_memory"}, 600, {"keep", "ram", "discard"}),
    ({"prompt_cache_key": "k", "prompt_cache_retention": "24h"}, 86400, {"disk"}),
    ({"prompt_cache_retention": "24h"}, 86400, {"disk"}),
])
def test_openai_says_it_with_hints(server: Server, clients: list[openai.OpenAI], hint: dict[str, str], seconds: float,
                                   places: set[str]) -> None:
    plain = clients[0].chat.completions.create(model="demo", messages=TURN, max_tokens=8, temperature=0)
    assert "inferloom" not in (plain.model_extra or {})
    made = chat(clients[0], **hint)
    stream = clients[0].chat.completions.create(model="demo", messages=TURN, max_tokens=8, temperature=0, stream=True,
                                                extra_body=hint)
    response = clients[0].responses.create(model="demo", instructions=SYSTEM, input="Read a file.", max_output_tokens=8,
                                           temperature=0, extra_body=hint)
    completion = clients[0].completions.create(model="demo", prompt=SYSTEM, max_tokens=8, temperature=0, extra_body=hint)
    chunks = list(stream)
    (last,) = [c for c in chunks if "inferloom" in (c.model_extra or {})]
    assert last.choices[0].finish_reason == "length" and made.choices == plain.choices
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == made.choices[0].message.content == response.output_text
    for answer in (made, last, response, completion):
        outcome = said(answer)
        assert outcome["status"] == ("deferred" if outcome["place"] == "disk" else "accepted") and outcome["place"] in places
        assert outcome["seconds"] in (seconds, 0) and (outcome["place"] == "discard" or outcome["seconds"] == seconds)
        assert outcome["id"] == "k" if "prompt_cache_key" in hint else outcome["id"].startswith("auto-")
        if outcome["place"] == "disk":
            saved(server, "/" + outcome["id"])
    if "prompt_cache_key" not in hint:  # all turns of a conversation have one name, whatever is said in them
        more = chat(clients[0], [*TURN, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Yes."}], **hint)
        assert said(more)["id"] == said(made)["id"] == said(response)["id"] != said(completion)["id"]
    ask(server, "DELETE", "/" + said(made)["id"])


@pytest.mark.parametrize(("ttl", "seconds"), [(None, 300), ("5m", 300), ("1h", 3600)])
def test_anthropic_says_it_with_marks(claude: anthropic.Anthropic, ttl: str | None, seconds: float) -> None:
    mark: Any = {"type": "ephemeral"} | ({} if ttl is None else {"ttl": ttl})
    bodies: list[Any] = [
        {"system": [{"type": "text", "text": SYSTEM, "cache_control": mark}], "messages": TURN[1:]},
        {"system": SYSTEM, "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [
            {"type": "text", "text": "Read a file.", "cache_control": mark}]}]}]},
        {"system": SYSTEM, "messages": TURN[1:], "tools": [{"name": "f", "input_schema": {}, "cache_control": mark}],
         "tool_choice": {"type": "none"}},
        {"system": SYSTEM, "messages": TURN[1:], "extra_body": {"cache_control": mark}}]
    for body in bodies:
        outcome = said(claude.messages.create(model="demo", max_tokens=4, **body))
        assert outcome["status"] == "accepted" and outcome["id"].startswith("auto-")
        assert outcome["place"] == "discard" or outcome["seconds"] == seconds
    named = claude.messages.create(model="demo", max_tokens=4, metadata={"user_id": "user 7"}, **bodies[0])
    assert said(named)["id"] == "user 7" and (named.usage.cache_read_input_tokens or 0) > 0
    with claude.messages.stream(model="demo", max_tokens=4, **bodies[0]) as stream:
        (last,) = [e for e in stream if e.type == "message_delta"]
    assert said(last)["status"] == "accepted"
    own = claude.messages.create(model="demo", max_tokens=4, system=SYSTEM, messages=TURN[1:],
                                 extra_body={"session_id": "own", "session_hold": 5})
    assert said(own)["id"] == "own" and said(own)["seconds"] in (0, 5)
    plain = claude.messages.create(model="demo", max_tokens=4, metadata={"user_id": "u"}, system=SYSTEM, messages=TURN[1:])
    assert "inferloom" not in (plain.model_extra or {})


def test_metrics_count_them(server: Server, clients: list[openai.OpenAI]) -> None:
    def value(name: str) -> float:
        lines = httpx.get(server.url + "/metrics", headers={"x-api-key": KEYS[0]}).text.splitlines()
        (line,) = [line for line in lines if line.startswith(f"inferloom_{name}{{")]
        return float(line.rpartition(" ")[2])

    chat(clients[0], session_id="counted")
    blocks = ask(server, "POST", "/counted/pause", json={"place": "keep"})["blocks"]
    until(lambda: value("session_leases") >= 1 and value("session_leased_blocks") >= blocks > 0)
    assert value("sessions") >= 1 and value("session_save_failures_total") == 0
    assert value("spec_decode_num_draft_tokens_total") >= value("spec_decode_num_accepted_tokens_total") >= 0


def test_hints_never_fail_a_request(clients: list[openai.OpenAI], claude: anthropic.Anthropic) -> None:
    want = clients[0].chat.completions.create(model="demo", messages=TURN, max_tokens=8, temperature=0).choices
    for body, status in (({"prompt_cache_key": "x" * 1000, "prompt_cache_retention": "24h"}, "deferred"),
                         ({"prompt_cache_key": "line\nline"}, "accepted"), ({"prompt_cache_key": ""}, None),
                         ({"prompt_cache_retention": "forever"}, "rejected"),
                         ({"prompt_cache_key": "k", "prompt_cache_retention": "forever"}, "accepted")):
        answer = chat(clients[0], **body)
        assert answer.choices == want
        assert said(answer)["status"] == status if status else "inferloom" not in answer.model_extra
    many = clients[0].completions.create(model="demo", prompt=[SYSTEM, SYSTEM], max_tokens=2, extra_body={
        "prompt_cache_key": "k"})
    assert said(many) == {"id": "k", "status": "rejected", "why": "a session is of one prompt", "blocks": 0, "place": "",
                          "seconds": 0}
    several = chat(clients[0], prompt_cache_key="k", n=2)
    assert said(several)["status"] == "accepted" and len(several.choices) == 2
    for mark in ("x", 1, [], {}, {"type": "ephemeral", "ttl": "2y"}):
        odd = claude.messages.create(model="demo", max_tokens=1, messages=TURN[1:], extra_body={"cache_control": mark})
        assert said(odd)["status"] == "rejected" and "5m or 1h" in said(odd)["why"]


@pytest.mark.parametrize("body", [
    {"session_id": "a", "n": 2}, {"session_id": "a", "prompt": ["x", "y"]}, {"session_hold": 5}, {"session_id": ""},
    {"session_id": "a\n"}, {"session_id": "x" * 257}, {"session_id": "a", "session_hold": 0}, {"session_id": 7},
    {"session_id": "a", "session_hold": 1e9}])
def test_what_makes_no_sense_is_refused(clients: list[openai.OpenAI], server: Server, body: dict[str, Any]) -> None:
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1} | body,
                        headers={"x-api-key": KEYS[0]})
    assert answer.status_code == 400 and "session" in answer.text, answer.text


def test_what_cannot_be_asked(server: Server, clients: list[openai.OpenAI]) -> None:
    chat(clients[0], session_id="here")
    for body in ({"place": "attic"}, {"place": "memory"}, {"seconds": 0}, {"seconds": 1e9}, {"returns_in": -1}):
        assert status(server, "POST", "/here/pause", json=body) == 400
    for path in ("/" + "x" * 300, "/nobody", "/here?model=nothing", "/"):
        assert status(server, "GET", path) == 404
    assert status(server, "PUT", "/here") == 405 and status(server, "DELETE", "/here?model=nothing") == 404


def test_without_a_cache_there_are_none(start: Callable[..., Server]) -> None:
    server = start("--no-enable-prefix-caching")
    url, body = server.url + "/v1/completions", {"prompt": SYSTEM, "max_tokens": 1}
    assert "prefix cache" in httpx.post(url, json=body | {"session_id": "a"}).json()["error"]["message"]
    assert httpx.post(url, json=body | {"prompt_cache_key": "a"}).json()["inferloom"]["session"]["status"] == "rejected"
    assert httpx.get(server.url + "/v1/sessions").json()["data"] == []
    assert httpx.get(server.url + "/v1/sessions/a").status_code == 404


def test_what_is_not_there_is_said(start: Callable[..., Server]) -> None:
    """Without a folder of state, a day becomes what memory and leases give."""
    server = start()
    answer = httpx.post(server.url + "/v1/completions", json={
        "prompt": SYSTEM, "max_tokens": 1, "prompt_cache_key": "a", "prompt_cache_retention": "24h"}).json()
    outcome = answer["inferloom"]["session"]
    assert outcome["status"] == "clipped" and outcome["why"].startswith("disk: there is no disk tier")
    assert outcome["place"] in ("keep", "discard")


def test_sessions_outlive_a_sigkill(start: Callable[..., Server], tmp_path: Path) -> None:
    """Killed while others are answered: what was saved is listed by the next process, and read instead of computed."""
    state = ("--state-dir", str(tmp_path))
    first = start(*state)

    def turn(server: Server, messages: list[Any], **body: Any) -> dict[str, Any]:
        answer = httpx.post(server.url + "/v1/chat/completions", timeout=60, json={
            "messages": messages, "max_tokens": 24, "temperature": 0} | body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    talks, nexts = {}, {}
    for i in range(3):
        messages = [*TURN[:1], {"role": "user", "content": f"Read file {i}."}]
        answer = turn(first, messages, session_id=f"agent {i}", prompt_cache_retention="24h")
        assert answer["inferloom"]["session"]["place"] == "disk"
        talks[f"agent {i}"] = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "And now?"}]
    until(lambda: all(s["saved"] for s in httpx.get(first.url + "/v1/sessions").json()["data"]))
    with httpx.stream("POST", first.url + "/v1/completions", timeout=30, json={
            "prompt": SYSTEM, "max_tokens": 900, "ignore_eos": True, "stream": True, "session_id": "lost",
            "session_hold": 60}) as load:
        assert next(load.iter_lines()).startswith("data: ")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    second = start(*state)
    listed = {s["id"]: s for s in httpx.get(second.url + "/v1/sessions").json()["data"]}
    listed.pop("lost", None)  # on a busy machine its answer may have ended before the kill
    assert listed.keys() == talks.keys()
    assert all(s["saved"] and s["on_disk"] == s["blocks"] > 0 and s["pooled"] == 0 for s in listed.values())
    assert httpx.post(second.url + "/v1/sessions/agent 0/resume", json={}).json()["status"] == "accepted"
    for name, messages in talks.items():
        nexts[name] = turn(second, messages, session_id=name)
        assert nexts[name]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16 * (listed[name]["blocks"] - 1)
    until(lambda: metric(second, "tier_fetches_total") >= 3)
    never = start()
    for name, messages in talks.items():
        # Another salt: nothing of what the others computed is read.
        fresh = turn(never, messages, cache_salt=name)
        assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert fresh["choices"] == nexts[name]["choices"]


def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks it for sessions is told so in time, and few may wait."""
    monkeypatch.setattr(processes, "PATIENCE", 0.05)
    monkeypatch.setattr(processes, "MAX_ASKED", 2)
    engine = processes.EngineProcess(ModelSettings("nowhere", ("m",)), Settings())
    said = list[wire.ToEngine]()
    monkeypatch.setattr(engine, "_say", said.append)

    async def asked() -> list[Any]:
        with pytest.raises(HttpError, match="is loading"):
            await engine.ask("list", "me:")
        engine._state, engine.ready = "ready", wire.Ready(1, 1, 1, 0.0)
        late = await asyncio.gather(*(engine.ask("list", "me:") for _ in range(3)), return_exceptions=True)
        waits = asyncio.create_task(engine.ask("info", "me:", "a"))
        await asyncio.sleep(0)
        engine._asked[said[-1].id].set_result(wire.Told(0, error="it broke"))  # type: ignore[union-attr]
        broke = await asyncio.gather(waits, return_exceptions=True)
        waits = asyncio.create_task(engine.ask("info", "me:", "a"))
        await asyncio.sleep(0)
        engine._fail_all("killed")
        return [*late, *broke, *await asyncio.gather(waits, return_exceptions=True)]

    errors = asyncio.run(asked())
    assert [e.status for e in errors] == [503, 503, 429, 500, 503] and all(e.retry_after for e in errors if e.status != 500)
    assert "may still be done" in errors[0].message and "it broke" in errors[3].message and "killed" in errors[4].message
    assert not engine._asked and len(said) == 4


def test_one_artifact_under_two_names_saves_apart(chat_artifact: Path, tmp_path: Path) -> None:
    wanted = (str(chat_artifact), str(chat_artifact), "--served-model-name", "one", "--served-model-name", "two", "--threads",
              "1", "--state-dir", str(tmp_path))
    server = Server(*wanted)
    ask = {"prompt": "def read_lines(path):\n" * 8, "max_tokens": 2, "session_id": "a"}
    httpx.post(server.url + "/v1/completions", json=ask | {"model": "two"}, timeout=60).raise_for_status()
    paused = httpx.post(server.url + "/v1/sessions/a/pause", json={"model": "two", "place": "disk"}).json()
    assert paused["status"] == "deferred" and paused["blocks"]
    assert server.close() == 0 and len(list(tmp_path.iterdir())) == 2
    server = Server(*wanted)
    assert [s["model"] for s in httpx.get(server.url + "/v1/sessions").json()["data"]] == ["two"]
    second = subprocess.run([sys.executable, "-m", "inferloom.cli", "serve", *wanted, "--port", "0"], capture_output=True,
                            text=True, timeout=60)
    assert second.returncode == 1 and "is in use by another process" in " ".join(second.stderr.split()), second.stderr
    assert server.close() == 0


def test_all_salts_of_a_key_are_one_owners() -> None:
    """Or whoever makes up salts would count as many, and take as many shares of what there is."""
    salts = [salted(KEYED + bytes([key]) * 32, more) for key in (0, 1) for more in (None, "a", "b")]
    names = [owner(salt) + "x" for salt in salts]
    assert len(set(names)) == 6 and len({owner_of(name) for name in names[:3]}) == 1
    assert owner_of(names[0]) != owner_of(names[3]) and len(owner(salts[0])) + MAX_ID <= MAX_NAME
    free = [owner_of(owner(salted(b"", more))) for more in (None, "a", "b")]
    assert len(set(free)) == 3, "without keys, salts are all that tells callers apart"
