"""Chips as data (chips.toml), and which of them the host is."""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from inferloom.ir.errors import UnsupportedError

TABLE = Path(__file__).with_name("chips.toml")
CPUINFO = Path("/proc/cpuinfo")
SVE_BYTES = Path("/proc/sys/abi/sve_default_vector_length")


@dataclass(frozen=True, slots=True)
class CpuChip:
    """One CPU of chips.toml; see the comments there."""

    name: str
    description: str
    mcpu: str
    triple: str
    llvm_triple: str
    requires: tuple[str, ...]
    matmul_rows: int
    matmul_vectors: int
    matmul_k_slice: int
    bf16_dot: str = ""
    i8_dot: str = ""
    sve_bits: int = 0
    fused: bool = True
    f16: bool = True
    mattr: tuple[str, ...] = ()
    mabi: str = ""
    driver: str = "none"
    arch: str = ""

    @property
    def machine(self) -> str:
        """Machine name as `platform.machine()` says it."""
        return self.triple.split("-")[0]

    @property
    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM's LLVM backend takes it."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.llvm_triple, "mcpu": self.mcpu}
        if self.mattr:
            target["mattr"] = list(self.mattr)
        if self.mabi:
            target["mabi"] = self.mabi
        if self.driver == "wasm":
            target["vector-width"] = 128  # a guess that TVM would make too, with a warning
        if self.sve_bits:
            target["cl-opt"] = [f"-aarch64-sve-vector-bits-min:uint={self.sve_bits}"]
        return target


@dataclass(frozen=True, slots=True)
class GpuChip:
    """One GPU of chips.toml.

    `arch`: sm_NN or gfxNNN. `warp`: threads that run in step. `shared`: bytes of shared memory that one block may
    take. `registers`: 32-bit registers a thread may use. `units`: streaming multiprocessors or compute units.
    `matrix`: its matrix instruction. `bandwidth`: bytes per second. `peak`: operations per second with f16 and bf16
    inputs, dense.
    """

    name: str
    description: str
    driver: str
    arch: str
    warp: int
    shared: int
    registers: int
    units: int
    matrix: str
    tma: bool
    memory: int
    bandwidth: float
    peak: float
    triple: str = "x86_64-linux-gnu.2.28"
    requires: tuple[str, ...] = ()

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability times ten; 0 for others."""
        return int(self.arch.removeprefix("sm_")) if self.driver == "cuda" else 0


@dataclass(frozen=True, slots=True)
class SourceChip:
    """Devices of chips.toml that take source code. `shared`: bytes of memory that every one has for a work-group."""

    name: str
    description: str
    driver: str
    shared: int
    triple: str = ""
    arch: str = ""
    requires: tuple[str, ...] = ()


Chip = CpuChip | GpuChip | SourceChip


@cache
def chips() -> dict[str, Chip]:
    """Every known chip by name, from the most general of a family to the most capable."""
    data = tomllib.loads(TABLE.read_text())
    table: dict[str, Chip] = {}
    for name, entry in data.items():
        kind = CpuChip if "mcpu" in entry else GpuChip if "arch" in entry else SourceChip
        unknown = set(entry) - {f.name for f in fields(kind)}
        if unknown:
            raise UnsupportedError(f"chips.toml: chip {name} has unknown keys {sorted(unknown)}")
        entry = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        table[name] = kind(name=name, **entry)
    return table


def host_features() -> frozenset[str]:
    """CPU flags of this machine, as Linux names them (none where Linux does not), and sve512 where SVE is as long."""
    flags = parse_cpuinfo(CPUINFO.read_text()) if CPUINFO.exists() else frozenset()
    long = SVE_BYTES.exists() and int(SVE_BYTES.read_text()) >= 64
    return flags | {"sve512"} if long else flags


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The flags that /proc/cpuinfo lists; a RISC-V `isa` string is taken apart into its extensions."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
        if key.strip() == "isa":
            base, *extensions = value.strip().lower().split("_")
            return frozenset([*base.removeprefix("rv64").removeprefix("rv32"), *extensions])
    return frozenset()


def host() -> CpuChip:
    """The most capable known CPU that this machine satisfies."""
    machine, features = platform.machine(), host_features()
    cpus = [c for c in chips().values() if isinstance(c, CpuChip)]
    fitting = [c for c in cpus if c.machine == machine and features.issuperset(c.requires)]
    if not fitting:
        raise UnsupportedError(f"no known chip describes this {machine} machine; `inferloom chips` lists them")
    return fitting[-1]


def find(name: str) -> Chip:
    """The chip called `name`; "cpu" is this machine. UnsupportedError lists the choices."""
    if name == "cpu":
        return host()
    if name not in chips():
        raise UnsupportedError(f"no chip is called {name!r}; choose from: cpu, {', '.join(chips())}")
    return chips()[name]
