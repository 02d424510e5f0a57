"""The machine's ceilings as ceilings.c prints them. Imports nothing but the standard library."""

from __future__ import annotations

import json
import subprocess


def probed(program: str, threads: int) -> dict[str, float]:
    """About a second of probes: read bandwidth in GB/s (median of passes), arithmetic peaks in GFLOP/s (best of a few).

    CalledProcessError when the program fails.
    """
    done = subprocess.run([program, "quick", str(threads)], capture_output=True, text=True, check=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What is held to be true of the time between two probes: their means."""
    return {name: (before[name] + after[name]) / 2 for name in before}
