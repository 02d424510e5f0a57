"""The target of devices that are reached by source code: kernels become OpenCL C or WGSL.

There is no device of the runtime for them; the artifact holds all that a program needs to run them by the plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph
from inferloom.ir.types import DType
from inferloom.targets.base import CompiledModule, KernelInfo, KernelSource, Launch, Logits, Lowering, Progress
from inferloom.targets.chips import SourceChip
from inferloom.targets.tvm.portable import attention, matmul, rows
from inferloom.targets.tvm.portable.emit import SPACES, THREADS
from inferloom.targets.tvm.vmath import Dialect, dialect

#: Tokens of an attention tile.
Q_TILE = 16
SUFFIX = {"opencl": "cl", "webgpu": "wgsl"}
#: What stands for infinity and for NaN in WGSL, which has neither.
LARGEST = "3.4028234663852886e+38f"
_INT32_MAX = 2**31 - 1
_LOWER = {"row": rows.lower, "matmul": matmul.lower, "attention": attention.lower}


class SourceTarget:
    """Code for devices of one language."""

    tools = ("apache-tvm",)
    lowering = Lowering(dtypes=("fp32",), weight_tile=64, weight_pair={DType.F32: 1}, weight_k_multiple=matmul.SLICE,
                        gate_columns=32, prologue=False, row_align=16, avoid=0)

    def __init__(self, chip: SourceChip) -> None:
        self.chip = chip

    def numerics(self) -> dict[str, Any]:
        return {"accumulate": "f32", "reduction_order": "sequential over k, independent of the batch"}

    def compile_kernels(self, sources: Sequence[KernelSource], logits: Logits | None, say: Progress) -> CompiledModule:
        """Generate the source of all kernels."""
        files, infos = dict[str, bytes](), list[KernelInfo]()
        for number, source in enumerate(sources):
            kind = str(source.node.attrs["kind"])
            if kind not in _LOWER:
                raise UnsupportedError(f"{source.node.loc}: {self.chip.name} has no kernels of kind {kind!r} yet")
            self._check_types(source)
            with dialect(Dialect.PLAIN):
                fn, shared, grid, args = _LOWER[kind](source, self.chip.shared)
            file = f"kernels/{source.symbol}.{SUFFIX[self.chip.driver]}"
            text = source_of(source.symbol, fn, self.chip.driver)
            files[file] = text.encode()
            infos.append(KernelInfo(source.symbol, kind, number, grid, args, Launch(file, THREADS, shared, 0, _INT32_MAX),
                                    {"buffers": list(SPACES), "writes": written(text, source.symbol)}))
        return CompiledModule(files, tuple(infos), (Q_TILE, 0))

    def _check_types(self, source: KernelSource) -> None:
        """UnsupportedError when a kernel computes with or stores what the languages lack or the buffers do not hold."""
        body = source.node.attrs["body"]
        if not isinstance(body, Graph):
            raise TypeError(body)
        made = [(f"{n.loc}: {n.op} makes", v) for n in body.nodes for v in n.results]
        for what, value in [*made, *((f"{source.node.loc}: an operand of", v) for v in body.inputs)]:
            dtype = getattr(value.type, "dtype", DType.F32)
            if dtype not in (DType.F32, DType.I32, DType.BOOL):
                raise UnsupportedError(f"{what} {dtype}; {self.chip.name} has f32 only: compile with --dtype fp32")
        for value in body.outputs:
            if getattr(value.type, "dtype", DType.F32) is not DType.F32:
                raise UnsupportedError(f"{source.node.loc}: {self.chip.name} cannot store {value.type}")


def source_of(symbol: str, fn: Any, kind: str) -> str:
    """The source text of one device kernel."""
    target = tvm.target.Target({"kind": kind})
    # What TVM would split off as the host's part does not exist here: the function is the device's from the start.
    fn = fn.with_attrs({"target": target, "global_symbol": symbol, "calling_conv": 2, "tirx.noalias": True,
                        "tirx.is_global_func": True, "tirx.kernel_launch_params": ["blockIdx.x", "threadIdx.x"]})
    t = tirx.transform
    module = tvm.ir.transform.Sequential([
        t.StmtSimplify(), t.FlattenBuffer(), t.UnrollLoop(), t.StmtSimplify(), t.RemoveNoOp(),
        t.CommonSubexprElim(), compilation_pipeline.finalize_device_passes(),
    ])(tvm.IRModule({tvm.ir.GlobalVar(symbol): fn}))
    text = str(tvm.get_global_func(f"target.build.{kind}")(module, target).inspect_source())
    return re.sub(r"\b(inff|nanf)\b", LARGEST, text) if kind == "webgpu" else text


def written(text: str, symbol: str) -> list[str]:
    """The buffers that a kernel's source writes to."""
    return [space for space in SPACES if re.search(rf"\b{space}\[[^;=]*\] = ", text)]
