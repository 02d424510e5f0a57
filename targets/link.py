"""Linking: from objects and C sources to a shared library.

Zig's C compiler does it, which carries a linker and a C library for every target, so that artifacts can be
cross-compiled anywhere and come out the same byte for byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inferloom.ir.errors import UnsupportedError

#: Bytes of a WebAssembly module's stack: kernels keep panels of sums and rows of activations there.
_WASM_STACK = 4 << 20


def link_shared(objects: Sequence[bytes], sources: Sequence[Path], triple: str) -> bytes:
    """A shared library of objects and C sources for `triple` (arch-os-abi, as Zig writes it)."""
    return _link(objects, sources, triple, ["-shared", "-fPIC", "-pthread", "-Wl,--build-id=none"])


def link_wasm(objects: Sequence[bytes], sources: Sequence[Path], triple: str, exports: Sequence[str]) -> bytes:
    """A WebAssembly module of objects and C sources that exports functions, its memory and its table of functions."""
    return _link(objects, sources, triple, ["-nostdlib", "-Wl,--no-entry", "-Wl,--export-table", "-Wl,--growable-table",
                                            f"-Wl,-z,stack-size={_WASM_STACK}",
                                            *(f"-Wl,--export={name}" for name in (*exports, "__heap_base"))])


def _link(objects: Sequence[bytes], sources: Sequence[Path], triple: str, options: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = []
        for i, data in enumerate(objects):
            (root / f"{i}.o").write_bytes(data)
            names.append(f"{i}.o")
        for path in sources:
            (root / path.name).write_bytes(path.read_bytes())
            names.append(path.name)
        # Relative names and a fixed working directory keep paths out of the bytes.
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, "-O2", "-std=gnu11", "-g0", "-s",
                   "-fno-sanitize=all", *options, "-o", "out.so", *names]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "inferloom" / "zig"
        env = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(root / "zig")}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        if done.returncode:
            raise UnsupportedError(f"linking for {triple} failed:\n{done.stderr.strip()[-2000:]}")
        return (root / "out.so").read_bytes()
