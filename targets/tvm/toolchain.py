"""From TIR functions to an object. TVM is used as an LLVM front end: a short pass list, no schedules, no calling
convention of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

_PIPELINE = "inferloom"
#: tvm::CallingConv::kDeviceKernelLaunch: leaves the signature alone, so that it is a plain C function.
_PLAIN_C = 2


def _pipeline() -> Any:
    @tvm.transform.module_pass(opt_level=0)
    def run(module: Any, _context: Any) -> Any:
        t = tirx.transform
        return tvm.ir.transform.Sequential([
            t.FlattenBuffer(), t.NarrowDataType(32), t.VectorizeLoop(True), t.UnrollLoop(), t.StmtSimplify(),
            t.CommonSubexprElim(), t.AnnotateEntryFunc(), t.SplitHostDevice(), t.MakePackedAPI(),
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
