"""The page's files as they are served, and the numbers that it shows."""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from inferloom.runtime.server.page.files import PATHS
from tests.runtime.server.conftest import Server

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as made:
        yield made


@pytest.mark.parametrize("path", PATHS)
def test_files_are_typed_guarded_and_asked_for_again(client: httpx.Client, path: str) -> None:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    answer = client.get(path)
    assert answer.status_code == 200 and answer.content == PATHS[path].read_bytes()
    assert answer.headers["content-type"].startswith(kinds[PATHS[path].suffix])
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-cache"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    again = client.get(path, headers={"if-none-match": f'"other", W/{answer.headers["etag"]}'})
    assert again.status_code == 304 and not again.content and again.headers["etag"] == answer.headers["etag"]
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    head = client.head(path)
    assert head.status_code == 200 and not head.content and head.headers["etag"] == answer.headers["etag"]
    assert int(head.headers["content-length"]) == len(answer.content)
    assert client.post(path).status_code == 405


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(client: httpx.Client) -> None:
    for path, file in PATHS.items():
        text = file.read_text().replace('"http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|\burl\(", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), path
    html = client.get("/").text
    assert not re.search(r"<style|style=|\son[a-z]+=|javascript:", html)
    asked = set(re.findall(r'(?:src|href)="([^"#]+)"', html))
    for file in PATHS.values():
        asked |= set(re.findall(r'from "([^"]+)"', file.read_text()))
    assert asked | {"/"} == set(PATHS)
    assert all(not body for body in re.findall(r"<script[^>]*>(.*?)</script>", html, re.S))


def test_other_files_of_the_folder_are_not_served(client: httpx.Client) -> None:
    for path in ("/page/files.py", "/page/", "/page/index.html", "/page/../wire.py", "/page/%2e%2e/wire.py"):
        assert client.get(path).status_code == 404, path


def test_files_are_package_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert {f"*{file.suffix}" for file in PATHS.values()} <= set(patterns)


def test_the_engine_view(client: httpx.Client) -> None:
    def view() -> dict:  # type: ignore[type-arg]
        answer = client.get("/v1/engine")
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
        (one,) = answer.json()["data"]
        blocks = one["blocks"]
        assert blocks["total"] == sum(blocks[name] for name in ("in_use", "leased", "cached", "free")) > 0
        assert all(blocks[name] >= 0 for name in blocks)
        return dict(one)

    def settled() -> dict:  # type: ignore[type-arg]
        """What two signs of life later is known of all that has been answered."""
        made = view()
        for _ in range(2):
            end, last = time.monotonic() + 10, made["time"]
            while (made := view())["time"] == last:
                assert time.monotonic() < end, made
                time.sleep(0.02)
        return made

    before = settled()
    assert before["name"] == "demo" and before["state"] == "ready" and before["chat_template"]
    assert before["max_num_seqs"] >= 1 and before["tiers"]["disk"] == {"bytes": 0, "capacity": 0}
    ask = {"prompt": "class View:  # of engines\n" * 20, "max_tokens": 5, "ignore_eos": True}
    usage = client.post("/v1/completions", json=ask).json()["usage"]
    after = settled()
    assert after["running"] == 0 and after["tokens"]["generated"] - before["tokens"]["generated"] == 5
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert after["tokens"]["prompt"] - before["tokens"]["prompt"] == computed
    assert after["prefix_cache"]["queries"] - before["prefix_cache"]["queries"] == usage["prompt_tokens"]
    assert after["steps"] - before["steps"] >= 5 and after["batch"] == {"sequences": 1, "tokens": 1}
    assert after["blocks"]["cached"] >= usage["prompt_tokens"] // after["blocks"]["tokens"] and after["blocks"]["in_use"] == 0
    assert after["time"] > before["time"]


def test_the_engine_view_is_described(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "get" in paths["/v1/engine"] and "/" not in paths
