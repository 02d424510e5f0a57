"""What this machine is, and what it can do at most right now."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inferloom.benchmarks.probe import probed
from inferloom.cache import cache_dir
from inferloom.errors import InferloomError, MissingExtraError

SOURCE = Path(__file__).with_name("ceilings.c")


def ceilings(threads: int) -> dict[str, float]:
    """What `probed` gives of the compiled probe. InferloomError when it fails."""
    try:
        return probed(str(probe()), threads)
    except subprocess.CalledProcessError as error:
        raise InferloomError(f"the ceilings probe failed ({error.returncode}): {error.stderr.strip()}") from None


def probe() -> Path:
    """The compiled probe, a program that takes `quick THREADS` and prints a JSON object.

    It is built once for each version of its source and kept in the cache.
    """
    if not SOURCE.is_file():
        raise InferloomError(f"{SOURCE} is missing, so the ceilings cannot be measured; use --no-ceilings")
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = cache_dir() / f"ceilings-{platform.machine()}-{key}"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        temporary = built.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*_c_compiler(), "-O2", "-march=native", "-pthread", str(SOURCE), "-o", str(temporary)],
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InferloomError(f"compiling {SOURCE} failed:\n{done.stderr.strip()}")
        temporary.replace(built)
    return built


def _c_compiler() -> list[str]:
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise MissingExtraError("measuring ceilings needs a C compiler; run: pip install 'inferloom[compile]', or use "
                            "--no-ceilings")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system and Python."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    total = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
                 if line.startswith("MemTotal"))
    return {"cpu": model, "cores": os.cpu_count(), "memory": total, "system": platform.platform(),
            "python": platform.python_version()}
