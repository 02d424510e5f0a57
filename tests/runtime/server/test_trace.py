"""`serve --trace`: what the engine process has done, in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from inferloom.runtime.trace import PHASES
from tests.runtime.server.conftest import Server

ASK = {"prompt": "import os\n", "max_tokens": 20, "ignore_eos": True}


def steps(file: Path) -> set[int]:
    events = json.loads(file.read_text())["traceEvents"]
    assert set(PHASES) <= {e["name"] for e in events} and any(e.get("tid") == 1 and e["ph"] == "X" for e in events)
    return {e["args"]["step"] for e in events if e["ph"] == "X"}


def test_the_first_steps_are_written_while_it_runs(start: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    server = start("--trace", str(file), "--trace-steps", "5")
    assert file.read_bytes() == b""
    httpx.post(server.url + "/v1/completions", json=ASK).raise_for_status()
    assert steps(file) == {1, 2, 3, 4, 5}
    httpx.post(server.url + "/v1/completions", json=ASK).raise_for_status()
    assert steps(file) == {1, 2, 3, 4, 5}


def test_what_there_is_is_written_at_the_end(start: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    server = start("--trace", str(file))
    httpx.post(server.url + "/v1/completions", json=ASK).raise_for_status()
    time.sleep(0.1)
    assert file.read_bytes() == b"" and server.close() == 0
    assert steps(file) == set(range(1, 21))


def test_a_file_that_cannot_be_written_is_said_at_once(start: Callable[..., Server], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the trace cannot be written to .*trace.json: No such file or directory"):
        start("--trace", str(tmp_path / "no" / "trace.json"))
