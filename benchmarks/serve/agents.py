"""What leases and tiers save agents who pause: the same trace on the same memory, without and with them.

    python -m inferloom.benchmarks.serve.agents build/demo --memory 64MiB --ram 24MiB --out build/agents.json

Without: all of `--memory` is the engine's. With: `--ram` of it is the tier beside the pool, state may go to a folder on
disk, and every agent's session is held while it waits for its tools. `--against URL` asks the same of another server, which
runs already; what it computed again is known if its usage counts cached tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inferloom.benchmarks.machine import describe
from inferloom.benchmarks.serve import report, traces
from inferloom.benchmarks.serve.client import Client
from inferloom.benchmarks.serve.load import run
from inferloom.cli.options import parse_bytes
from inferloom.errors import InferloomError

SLO = report.Slo(2.0, 0.2)


@contextmanager
def serving(artifact: Path, *arguments: str) -> Iterator[str]:
    """`inferloom serve` with these arguments; its address. InferloomError when it does not start."""
    process = subprocess.Popen([sys.executable, "-m", "inferloom.cli", "serve", str(artifact), "--port", "0", *arguments],
                               stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("{") and (event := json.loads(line))["event"] == "listening":
                break
        else:
            raise InferloomError("the server did not start:\n" + "".join(said))
        with tempfile.TemporaryFile("w") as rest:
            follow = subprocess.Popen(["cat"], stdin=process.stderr, stdout=rest)  # its pipe must not fill
            yield f"http://127.0.0.1:{event['port']}"
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            follow.wait(10)
    finally:
        process.kill()


async def ask(url: str, conversations: list[traces.Conversation], seconds: float, hold: float | None) -> dict[str, Any]:
    """The trace, one agent each beside the others, asked of a server."""
    client = Client(url, "", "completions")
    try:
        client.model = (await client.models())[0]
        return report.summary(await run(client, conversations, len(conversations), seconds, hold=hold), SLO)
    finally:
        await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--memory", required=True, help="of the engine, weights included; with tiers, --ram is part of it")
    parser.add_argument("--ram", required=True, help="of the tier in memory")
    parser.add_argument("--disk", default="4GiB", help="of the tier on disk")
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--speed", type=float, default=1.0, help="by which pauses are shortened")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--seconds", type=float, default=3600.0, help="nothing is asked after so long")
    parser.add_argument("--hold", type=float, default=600.0, help="seconds that a session is held for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", metavar="URL", help="a peer's server, asked the same when ours has gone")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    memory, ram = parse_bytes(given.memory), parse_bytes(given.ram)
    conversations = traces.agent(given.agents, given.turns, given.seed, given.speed, given.scale)
    made: dict[str, Any] = {"machine": describe(),
                            "trace": {k: v for k, v in vars(given).items() if k not in ("artifact", "against", "out")}}
    with serving(given.artifact, "--memory", str(memory)) as url:
        made["without"] = asyncio.run(ask(url, conversations, given.seconds, None))
    with tempfile.TemporaryDirectory() as state, serving(
            given.artifact, "--memory", str(memory - ram), "--ram-bytes", str(ram), "--state-dir", state, "--disk-bytes",
            str(parse_bytes(given.disk))) as url:
        made["with"] = asyncio.run(ask(url, conversations, given.seconds, given.hold))
    if given.against:
        made["against"] = asyncio.run(ask(given.against, conversations, given.seconds, None))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(made, indent=1) + "\n")
    for name in [name for name in ("without", "with", "against") if name in made]:
        r = made[name]
        print(f"{name:8}{r['answers']:6} answers, {sum(r['errors'].values())} errors, {r['recomputed_tokens']:8} tokens computed "
              f"again, first token {r['first_token']['p50']:.3f} s (p50) {r['first_token']['p99']:.3f} s (p99)")


if __name__ == "__main__":
    main()
