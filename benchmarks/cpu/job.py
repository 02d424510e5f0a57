"""One measured process between two probes of the machine's ceilings: what one round takes of a system.

    python -m inferloom.benchmarks.cpu.job '{"command": [...], "environment": {...}, "files": [...], "threads": 2}'

Prints one JSON object. `files` are read first, so that weights come from the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inferloom.benchmarks.cpu.process import MARK
from inferloom.benchmarks.machine import ceilings

SECONDS = 280


def job(spec: dict[str, Any]) -> dict[str, Any]:
    """Ceilings before and after, the lines that the process printed, its status, seconds and last words."""
    began = time.monotonic()
    read(spec["files"])
    before = ceilings(spec["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"} | spec["environment"]
    try:
        done = subprocess.run([*apart(), *spec["command"]], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace", timeout=SECONDS, check=False)
        status, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, said = 124, (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        said = f"{said.rstrip()}\nstopped after {SECONDS:g} s"
    lines = [json.loads(line.removeprefix(MARK)) for line in said.splitlines() if line.startswith(MARK)]
    return {"before": before, "after": ceilings(spec["threads"]), "lines": lines, "status": status,
            "seconds": round(time.monotonic() - began, 1), "said": words(said)[-1500:] if status else ""}


def words(said: str) -> str:
    """What a process printed besides its measurements."""
    return "\n".join(line for line in said.splitlines() if not line.startswith(MARK))


def read(files: Iterable[str]) -> None:
    buffer = bytearray(1 << 24)
    for name in files:
        with open(name, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def weights(path: Path) -> list[Path]:
    """The files that hold weights: `path` itself, or the large ones below it."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 1 << 24)


def apart() -> list[str]:
    """A prefix that gives a process no network but the loopback, where the system lets us."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return []
    prefix = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]
    return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else []


if __name__ == "__main__":
    print(json.dumps(job(json.loads(sys.argv[1]))))
