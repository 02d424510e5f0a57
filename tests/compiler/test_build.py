"""Artifacts as a whole: reproducible, never half written, refused when anything in them changed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import inferloom
from inferloom.errors import ArtifactError
from inferloom.runtime.llm import LLM
from tests.conftest import DEMO


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_compiling_twice_gives_the_same_bytes(demo_fp32: Path, tmp_path: Path) -> None:
    again = inferloom.compile(DEMO, dtype="fp32", out=tmp_path / "elsewhere" / "again")
    assert contents(again) == contents(demo_fp32)


def test_a_killed_compile_leaves_no_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"import inferloom; inferloom.compile({str(DEMO)!r}, out={str(out)!r})"
    # Killed once the staging folder is being filled: after the compiler's work, before the rename.
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not any(tmp_path.glob(".out.staging-*/*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    inferloom.compile(DEMO, out=out)
    assert [p.name for p in tmp_path.iterdir() if "staging" in p.name] == []
    LLM(out).close()


def test_every_flipped_bit_is_refused(demo_fp32: Path, tmp_path: Path) -> None:
    damaged, r = tmp_path / "damaged", random.Random(0)
    shutil.copytree(demo_fp32, damaged)
    files = [p for p in sorted(damaged.rglob("*")) if p.is_file()]
    for path in files * 3:
        at, bit = r.randrange(path.stat().st_size), 1 << r.randrange(8)
        data = bytearray(path.read_bytes())
        data[at] ^= bit
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            LLM(damaged)
        data[at] ^= bit
        path.write_bytes(data)
    LLM(damaged).close()
