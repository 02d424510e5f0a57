"""The kernels of other CPUs, as they are shipped, under qemu's user mode: a whole model's steps against this machine's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.manifest import KERNELS_FILE, Grid
from inferloom.targets.chips import CpuChip, chips, find
from inferloom.targets.link import link_shared
from inferloom.targets.tvm.codegen import STEPPER, isa_of
from inferloom.targets.tvm.emit import kernel
from inferloom.targets.tvm.isa import CpuIsa
from inferloom.targets.tvm.toolchain import compile_object
from tests.targets.cross.conftest import missing, steps
from tests.targets.cross.job import model_job, pack, read_output, run_here

DRIVER = Path(__file__).with_name("driver.c")
CPUS = {
    "aarch64": "cortex-a57",  # nothing beyond ARMv8.0
    "aarch64-dot": "max,sve=off", "aarch64-bf16": "max,sve=off", "aarch64-sve512": "max,sve512=on",
    "riscv64gc": "rv64,v=false", "riscv64": "rv64,v=true,vlen=128",
}
#: Chip, type, weights, keys and values. Without dot products, aarch64-dot has aarch64's kernels, and fp32 has the same
#: everywhere.
STEPS = [("aarch64", "fp32", None, None), ("aarch64", "bf16", None, None), ("aarch64-bf16", "bf16", None, None),
         ("aarch64-sve512", "fp32", None, None), ("aarch64-sve512", "bf16", None, None), ("riscv64gc", "fp32", None, None),
         ("riscv64", "fp32", None, None), ("riscv64", "bf16", None, None),
         ("aarch64", "bf16", "int8", "int8"), ("aarch64", "fp32", "fp8", None), ("aarch64-dot", "bf16", "int4-g64-asym", None),
         ("aarch64-bf16", "bf16", "int8", "fp8"), ("aarch64-bf16", "bf16", "int4", None),
         ("aarch64-sve512", "bf16", "int8", None),
         ("riscv64gc", "fp32", "int4", None), ("riscv64", "bf16", "int8", "int8"), ("riscv64", "fp32", "int4-asym-wo", None)]
#: Error of logits relative to their spread; where activations or keys are rounded to integers, one that falls to the other
#: side moves some by a step of it.
TOLERANCE, ROUNDED = {"fp32": 1e-5, "bf16": 0.05}, 0.15


@cache
def emulator(machine: str) -> tuple[str, ...]:
    """The command that runs a program for `machine`, less its CPU."""
    program, root = shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}"), Path(f"/usr/{machine}-linux-gnu")
    if program is None:
        missing(f"qemu-{machine}")
    if not (root / "lib" / "libc.so.6").exists():
        missing(f"a C library for {machine} in {root}")
    return str(program), "-L", str(root)


@pytest.fixture(scope="session")
def replay(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """`replay(chip, library, job, threads)`: what the driver writes."""
    folder = tmp_path_factory.mktemp("driver")

    @cache
    def driver(triple: str) -> Path:
        out = folder / triple
        subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", triple, "-O1", "-std=gnu11", "-Wall", "-o", out, DRIVER,
                        "-ldl"], check=True)
        return out

    def run(name: str, library: bytes, job: bytes, threads: int) -> bytes:
        chip = chips()[name]
        assert isinstance(chip, CpuChip)
        command = [*emulator(chip.machine), "-cpu", CPUS[name]] if name in CPUS else []
        (folder / "kernels.so").write_bytes(library)
        (folder / "job").write_bytes(job)
        done = subprocess.run([*command, driver(chip.triple), folder / "kernels.so", folder / "job", str(threads)],
                              capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name,dtype,quant,kv_dtype", STEPS)
def test_step(name: str, dtype: str, quant: str | None, kv_dtype: str | None, compiled, replay) -> None:  # type: ignore[no-untyped-def]
    emulator(chips()[name].triple.split("-")[0])
    here, there = compiled("cpu", dtype, quant, kv_dtype), compiled(name, dtype, quant, kv_dtype)
    tolerance = TOLERANCE[dtype] if quant is None or dtype == "fp32" else ROUNDED
    batches = steps(there.manifest)
    library, job = there.read(KERNELS_FILE), model_job(there, batches)
    outputs = [replay(name, library, job, threads) for threads in (1, 2)]
    assert outputs[0] == outputs[1]
    got = read_output(outputs[0], there.manifest, batches)
    for g, w in zip(got, run_here(here.path, batches), strict=True):
        assert np.abs(g - w).max() <= tolerance * w.std(), np.abs(g - w).max() / w.std()
    # A sequence's last logits, of chunks and beside another one, and of one prompt alone.
    assert np.array_equal(got[2][1], got[3][0])


def dot_kernels(isa: CpuIsa) -> dict[str, Any]:
    """c = dot(c, a, b) of 16 vectors of 16 lanes."""
    def of(name: str, dtype: str, dot: Callable[[Any, Any, Any], Any]) -> Any:
        def body(views: list[Any], dims: Any, chunk: Any) -> None:
            a, b, c = (view[T.ramp(chunk * 16, 1, 16)] for view in views[:3])
            T.buffer_store(views[3], dot(c, a, b), [T.ramp(chunk * 16, 1, 16)])

        return kernel(name, [(0, "int32"), (1, "int32"), (2, dtype), (3, dtype)], body, isa.llvm)

    return {"pairs": of("pairs", "float32", isa.dot_pair), "quads": of("quads", "int32", isa.dot_quad)}


@pytest.mark.parametrize("name", ["cpu", *(pytest.param(n, marks=pytest.mark.slow) for n in CPUS)])
def test_dot_products(name: str, replay) -> None:  # type: ignore[no-untyped-def]
    chip = find(name)
    assert isinstance(chip, CpuChip)
    if name in CPUS:
        emulator(chip.machine)
    code = compile_object(dot_kernels(isa_of(chip)), chip.tvm_target)
    library = link_shared([code], [STEPPER], chip.triple)
    rng = np.random.default_rng(0)
    u, s = rng.integers(0, 256, (256, 4)).astype(np.uint8), rng.integers(-128, 128, (256, 4)).astype(np.int8)
    u[:2], s[:2] = 255, [[-128] * 4, [127] * 4]
    x, y = (rng.standard_normal((256, 2)).astype(ml_dtypes.bfloat16) for _ in range(2))
    i, f = rng.integers(-2**30, 2**30, 256).astype(np.int32), rng.standard_normal(256).astype(np.float32)
    weights = b"".join(a.tobytes() for a in (u, s, i, x, y, f))
    calls = [(symbol, Grid(-1, 1, 16), [*(("weights", at + 1024 * j) for j in range(3)), ("workspace", out)])
             for symbol, at, out in (("quads", 0, 0), ("pairs", 3072, 1024))]
    out = replay(chip.name, library, pack((6144, 2048, 0, 0), (0, 2048), weights, calls, [((), b"")]), 1)
    assert np.array_equal(np.frombuffer(out[:1024], np.int32), i + (u.astype(np.int32) * s).sum(1))
    want = f + (x.astype(np.float64) * y.astype(np.float64)).sum(1)
    assert np.abs(np.frombuffer(out[1024:], np.float32) - want).max() < 1e-5


#: Instructions by what their bits are under a mask.
ENCODINGS = {"bfdot": (0xFFE0FC00, 0x6E40FC00), "sdot": (0xFFE0FC00, 0x4E809400), "usdot": (0xFFE0FC00, 0x4E809C00)}


@pytest.mark.parametrize("name,wanted", [("aarch64", set()), ("aarch64-dot", {"sdot"}), ("aarch64-bf16", {"bfdot", "usdot"})])
def test_dot_products_are_instructions(name: str, wanted: set[str]) -> None:
    chip = chips()[name]
    assert isinstance(chip, CpuChip)
    code = compile_object(dot_kernels(isa_of(chip)), chip.tvm_target)
    words = np.frombuffer(code[:len(code) // 4 * 4], "<u4")
    assert {i for i, (mask, bits) in ENCODINGS.items() if ((words & mask) == bits).any()} == wanted


def test_unknown_dot_products_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="bf16_dot = 'vfpv4'.*neon"):
        CpuIsa(6, 1, 256, bf16_dot="vfpv4")
