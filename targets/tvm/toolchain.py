"""From TIR functions to an object, and from an object to a shared library.

TVM is used as an LLVM front end: a short pass list, no schedules, no calling convention of its own. Linking is
done by Zig's C compiler, which carries a linker and a C library for every target, so that artifacts can be
cross-compiled anywhere and come out the same byte for byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from inferloom.ir.errors import UnsupportedError

_PIPELINE = "inferloom"
#: tvm::CallingConv::kDeviceKernelLaunch: leaves the signature alone, so that it is a plain C function.
_PLAIN_C = 2


def _pipeline() -> Any:
    @tvm.transform.module_pass(opt_level=0)
    def run(module: Any, _context: Any) -> Any:
        t = tirx.transform
        return tvm.ir.transform.Sequential([
            t.FlattenBuffer(), t.NarrowDataType(32), t.VectorizeLoop(True), t.UnrollLoop(), t.StmtSimplify(),
            t.RemoveNoOp(), t.CommonSubexprElim(), t.AnnotateEntryFunc(), t.SplitHostDevice(), t.MakePackedAPI(),
        ])(module)

    return run, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


compilation_pipeline.register_tir_pipeline(_PIPELINE, _pipeline)


def compile_object(functions: Mapping[str, Any], target: Mapping[str, Any]) -> bytes:
    """An ELF object with one C function per entry of `functions` (symbol -> PrimFunc)."""
    module = tvm.IRModule({tvm.ir.GlobalVar(symbol): fn.with_attr("calling_conv", _PLAIN_C)
                           for symbol, fn in functions.items()})
    built = tvm.compile(module, tvm.target.Target(dict(target)), tir_pipeline=_PIPELINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        built.mod.write_to_file(str(path), "o")
        return path.read_bytes()


def link_shared(objects: Sequence[bytes], sources: Sequence[Path], triple: str) -> bytes:
    """A shared library of objects and C sources for `triple` (arch-os-abi, as Zig writes it)."""
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
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, "-shared", "-fPIC", "-O2", "-std=c11",
                   "-g0", "-s", "-pthread", "-Wl,--build-id=none", "-fno-sanitize=all", "-o", "out.so", *names]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "inferloom" / "zig"
        env = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(root / "zig")}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        if done.returncode:
            raise UnsupportedError(f"linking for {triple} failed:\n{done.stderr.strip()[-2000:]}")
        return (root / "out.so").read_bytes()
