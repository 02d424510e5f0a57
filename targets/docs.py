"""Writes docs/targets.md from the table of chips: `python -m inferloom.targets.docs [--check] PATH`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inferloom.targets.chips import Chip, CpuChip, GpuChip, chips
from inferloom.targets.select import target_for

_HEAD = """# Chips
Made by `python -m inferloom.targets.docs docs/targets.md` from `targets/chips.toml`. An artifact for any of them is compiled on
any machine: `inferloom compile CHECKPOINT --chip NAME`. To add one: [add-a-chip.md](add-a-chip.md).

| Chip | Is | Code | Types | Runs in | Tested on |
| --- | --- | --- | --- | --- | --- |
"""
_TAIL = """
- All kinds of kernels are generated for CPUs, WebAssembly and GPUs. OpenCL and WebGPU have rows (norms, rotary, activations,
  embeddings, writing to the cache), matmuls and attention; mixtures of experts, recurrent layers, latent and block-sparse
  attention are refused by name there. WGSL has no infinities: the largest float stands for them.
- On all of them but GPUs, a sequence's bits do not depend on its batch; on GPUs it is an option (`--batch-invariant`).
- Code for SVE needs vectors of 512 bits: where they are no wider than NEON's, NEON has all that kernels use. RISC-V's vectors
  may have any length from 128 bits on.
- bf16 is multiplied with `bfdot` where a chip has it, else as float32. `bfmmla` would need weights in another order.

## What other programs run
This runtime has no device for WebAssembly, OpenCL and WebGPU: it refuses to load such artifacts. They hold all that a program
needs: the manifest's plan lists a step's calls, each with a kernel, and for each argument its space (`workspace`, `weights`,
`state`, `input`) and where in it it begins ([artifact.md](artifact.md)). The programs that the tests use are
`tests/targets/cross/driver.mjs` (node) and `tests/targets/cross/test_source.py` (pyopencl, wgpu).

**WebAssembly**, `kernels/kernels.wasm`: exports its `memory`, `__heap_base` from which on the program lays out the four spaces
(aligned to 64 bytes), each kernel, `__indirect_function_table` that kernels are put into, `il_abi()` and `il_step(calls, n,
dims)`. A call is 21 words of 32 bits: the kernel's place in the table, 16 pointers, and its grid's dim, tile, mult, and 0.
`dims` are the counts of the step: tokens, seqs, rows, q_tiles. One thread; products and sums round one after the other.

**OpenCL and WebGPU**, `kernels/NAME.cl` and `NAME.wgsl`, one kernel each, called as the manifest's `symbol`. A kernel takes the
four spaces as buffers (`input` int32, `state`, `weights`, `workspace` float32; `resources.writes` names those it writes to), then
for each argument of the call where it begins in its space, as an int32 in elements of four bytes, then the number of chunks as
an int32. A chunk is a work-group of `launch.threads` threads. In WGSL the numbers are members of a uniform, whose last is
`packGridDimX` (any number not below that of groups): more than 65535 groups go into x and z, and groups beyond the last chunk do
no harm. The input `dims` must be filled in.
"""


def render() -> str:
    """The whole page."""
    return _HEAD + "".join(f"| {' | '.join(_row(chip))} |\n" for chip in chips().values()) + _TAIL


def _row(chip: Chip) -> tuple[str, ...]:
    types = ", ".join(target_for(chip).lowering.dtypes)
    if isinstance(chip, GpuChip):
        language = "cubin" if chip.driver == "cuda" else "code object"
        code = f"Triton, {language} for {chip.arch}"
        return f"`{chip.name}`", chip.description, code, types, "this runtime", "see [gpu.md](gpu.md)"
    if isinstance(chip, CpuChip) and chip.driver == "none":
        tested = "itself" if chip.machine == "x86_64" else f"qemu-{chip.machine}"
        return f"`{chip.name}`", chip.description, f"TVM, {chip.triple.split('.')[0]}", types, "this runtime", tested
    code, tested = {"wasm": ("wasm32 with simd128", "node"), "opencl": ("OpenCL C", "PoCL"),
                    "webgpu": ("WGSL", "wgpu on Mesa's lavapipe")}[chip.driver]
    return f"`{chip.name}`", chip.description, f"TVM, {code}", types, "other programs", tested


def main() -> None:
    """Write the page, or with --check compare it; the exit status says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = render()
    if not args.check:
        args.path.write_text(text)
    elif not args.path.exists() or args.path.read_text() != text:
        sys.exit(f"{args.path} is out of date: run `python -m inferloom.targets.docs {args.path}`")


if __name__ == "__main__":
    main()
