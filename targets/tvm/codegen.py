"""The CPU target: kernels become TIR, TIR an object, and the object with the stepper a shared library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from inferloom.ir.errors import UnsupportedError
from inferloom.targets.base import CompiledModule, KernelInfo, KernelSource
from inferloom.targets.chips import Chip
from inferloom.targets.tvm import attention, matmul, rows
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.toolchain import compile_object, link_shared

STEPPER = Path(__file__).with_name("stepper.c")


def compile_kernels(sources: Sequence[KernelSource], chip: Chip) -> CompiledModule:
    """Generate, compile and link all kernels of an artifact for a chip."""
    isa = CpuIsa(chip.matmul_rows, chip.matmul_vectors, chip.matmul_k_slice, chip.bf16_dot)
    functions, infos = {}, []
    for source in sources:
        kind = str(source.node.attrs["kind"])
        if kind == "row":
            fn, grid, args = rows.lower(source)
        elif kind == "matmul":
            fn, grid, args = matmul.lower(source, isa)
        elif kind == "attention":
            fn, grid, args = attention.lower(source, isa)
        else:
            raise UnsupportedError(f"the CPU target has no kernels of kind {kind!r}")
        functions[source.symbol] = fn
        infos.append(KernelInfo(source.symbol, kind, grid, args))
    data = link_shared([compile_object(functions, chip.tvm_target)], [STEPPER], chip.triple)
    return CompiledModule("kernels.so", data, tuple(infos))
