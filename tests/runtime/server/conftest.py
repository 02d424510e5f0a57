"""A server in processes of its own, on the demo model with a chat template."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# The server's tests need the extra `test`; elsewhere the tree's other tests still run.
collect_ignore_glob = [] if find_spec("starlette") and find_spec("openai") else ["test_*.py"]

TEMPLATE = """{% if tools %}Call with <tool_call>: {{ tools | tojson }}
{% endif %}{% for m in messages %}[{{ m.role }}]
{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}

{% endfor %}{% if add_generation_prompt %}[assistant]
{% endif %}"""


class Server:
    """`inferloom serve` with these arguments."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        import os

        self.process = subprocess.Popen([sys.executable, "-m", "inferloom.cli", "serve", *arguments, "--port", "0"],
                                        stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}))
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_for("listening", 180)["port"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def wait_for(self, event: str, seconds: float = 60) -> dict[str, Any]:
        """The first log line of this event."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.events:
                if line["event"] == event:
                    return line
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} from the server:\n" + "".join(self.lines))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def engines(self) -> list[int]:
        """Process ids of its engines."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    def close(self) -> int:
        """End it in order; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def write_template(artifact: Path, out: Path, template: str = TEMPLATE) -> Path:
    """A copy of an artifact that has this chat template."""
    from inferloom.runtime import manifest
    from inferloom.runtime.artifact import seal

    shutil.copytree(artifact, out)
    (out / "tokenizer" / "chat_template.jinja").write_text(template)
    made = manifest.loads((out / "manifest.json").read_bytes())
    for name in ("manifest.json", "SEAL"):
        (out / name).unlink()
    seal(out, made)
    return out


@pytest.fixture(scope="session")
def chat_artifact(demo_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template."""
    return write_template(demo_bf16, tmp_path_factory.mktemp("chat") / "demo")


@pytest.fixture(scope="session")
def server(chat_artifact: Path) -> Iterator[Server]:
    """One server for all tests that only ask."""
    made = Server(str(chat_artifact), "--threads", "1", "--vllm-metrics")
    yield made
    assert made.close() == 0


@pytest.fixture
def start(chat_artifact: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    made: list[Server] = []

    def new(*arguments: str, artifact: Path = chat_artifact, env: dict[str, str] | None = None) -> Server:
        made.append(Server(str(artifact), "--threads", "1", *arguments, env=env))
        return made[-1]

    yield new
    for each in made:
        each.process.kill()
        each.process.wait()
