"""The CPU target: kernels become TIR, TIR an object, and the object with the stepper a shared library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType
from inferloom.runtime.manifest import KERNELS_FILE, WASM_FILE
from inferloom.targets.base import (
    CompiledModule,
    KernelInfo,
    KernelSource,
    Logits,
    Lowering,
    Progress,
    expert_counts,
    expert_linear_of,
    matmul_counts,
    matmul_of,
)
from inferloom.targets.chips import CpuChip
from inferloom.targets.link import link_shared, link_wasm
from inferloom.targets.tvm import attention, blocks, experts, matmul, quantized, rows, scan, weight_only
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.sampling import Sampling
from inferloom.targets.tvm.toolchain import compile_object
from inferloom.targets.tvm.vmath import Dialect, dialect

STEPPER, WASM_STEPPER = (Path(__file__).with_name(name) for name in ("stepper.c", "stepper_wasm.c"))


def isa_of(chip: CpuChip) -> CpuIsa:
    """What of a chip kernels are written for."""
    return CpuIsa(chip.matmul_rows, chip.matmul_vectors, chip.matmul_k_slice, chip.bf16_dot, chip.i8_dot)


class CpuTarget:
    """Code for one CPU."""

    tools = ("apache-tvm", "ziglang")
    # Rows a multiple of 4 KiB apart would all fall into the same sets of the L1 cache. Without an instruction for
    # products of bf16, activations are multiplied as the floats that they are.
    lowering = Lowering(dtypes=("fp32", "bf16"), weight_tile=64, weight_pair={DType.F32: 1, DType.BF16: 2},
                        weight_k_multiple=32, gate_columns=32, prologue=False, row_align=64, avoid=4096,
                        inputs={DType.BF16: DType.F32}, quantized=frozenset({
                            ("int8", "int8"), ("int4", "int8"), ("int8", "none"), ("int4", "none"), ("fp8", "none")}),
                        kv_dtypes=("bf16", "int8", "fp8"))

    def __init__(self, chip: CpuChip) -> None:
        self.chip = chip
        if chip.bf16_dot:
            self.lowering = replace(self.lowering, inputs={})

    def numerics(self) -> dict[str, Any]:
        return {"accumulate": "f32", "reduction_order": "sequential over k, independent of the batch",
                "bf16_dot": self.chip.bf16_dot, "i8_dot": self.chip.i8_dot}

    def compile_kernels(self, sources: Sequence[KernelSource], logits: Logits | None, say: Progress) -> CompiledModule:
        """Generate, compile and link all kernels of an artifact."""
        with dialect(Dialect.LLVM if self.chip.fused else Dialect.LLVM_UNFUSED, self.chip.f16):
            return self._compile(sources, logits)

    def _compile(self, sources: Sequence[KernelSource], logits: Logits | None) -> CompiledModule:
        chip, isa = self.chip, isa_of(self.chip)
        functions, infos = {}, list[KernelInfo]()
        for number, source in enumerate(sources):
            kind, facts = str(source.node.attrs["kind"]), dict[str, int | str]()
            if kind == "row":
                fn, grid, args = rows.lower(source)
            elif kind == "matmul":
                node = matmul_of(source)
                integers = node.op == quantized.OP and node.operands[1] is not None
                template = matmul if node.op != quantized.OP else quantized if integers else weight_only
                fn, grid, args = template.lower(source, isa)
                facts = matmul_counts(node, bool(isa.bf16_dot))
            elif kind == "scan":
                fn, grid, args = scan.lower(source)
            elif kind == "blocks":
                fn, grid, args = blocks.lower(source)
            elif kind == "experts":
                fn, grid, args = experts.lower(source, isa)
                facts = {**matmul_counts(expert_linear_of(source)[1], bool(isa.bf16_dot)), **expert_counts(source)}
            elif kind == "attention":
                fn, grid, args = attention.lower(source, isa)
            else:
                raise UnsupportedError(f"the CPU target has no kernels of kind {kind!r}")
            functions[source.symbol] = fn
            infos.append(KernelInfo(source.symbol, kind, number, grid, args, resources=facts))
        sampling = None if logits is None else Sampling(logits)
        if sampling is not None:
            functions |= sampling.functions
            infos += sampling.infos
        code = compile_object(functions, chip.tvm_target)
        file = WASM_FILE if chip.driver == "wasm" else KERNELS_FILE
        return CompiledModule({file: link(chip, code, [*functions])}, tuple(infos), (attention.Q_TILE, 0),
                              *((sampling.scratch, sampling.top) if sampling is not None else ()))


def link(chip: CpuChip, code: bytes, symbols: Sequence[str]) -> bytes:
    """What the object of kernels and the stepper make: a shared library, or a WebAssembly module."""
    if chip.driver == "wasm":
        return link_wasm([code], [WASM_STEPPER], chip.triple, [*symbols, "il_abi", "il_step"])
    return link_shared([code], [STEPPER], chip.triple)
