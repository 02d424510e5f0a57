"""The table of chips, and which of them the host is."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from inferloom.ir.errors import UnsupportedError
from inferloom.runtime import artifact
from inferloom.targets import chips

X86 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def host_with(monkeypatch: pytest.MonkeyPatch, machine: str, features: set[str]) -> str:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(chips, "host_features", lambda: frozenset(features))
    return chips.host().name


def test_host_is_the_most_capable_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_with(monkeypatch, "x86_64", X86 | {"sse2"}) == "x86-64-v3"
    assert host_with(monkeypatch, "x86_64", X86 | AVX512) == "x86-64-v4"
    assert host_with(monkeypatch, "x86_64", X86 | AVX512 - {"avx512cd"}) == "x86-64-v3"
    assert host_with(monkeypatch, "aarch64", {"fp", "asimd"}) == "aarch64"
    assert host_with(monkeypatch, "aarch64", {"asimd", "asimddp", "sve"}) == "aarch64-dot"
    assert host_with(monkeypatch, "aarch64", {"asimd", "asimddp", "bf16", "i8mm", "sve"}) == "aarch64-bf16"
    assert host_with(monkeypatch, "aarch64", {"asimd", "sve", "sve512"}) == "aarch64-sve512"
    assert host_with(monkeypatch, "riscv64", set("imafdc")) == "riscv64gc"
    assert host_with(monkeypatch, "riscv64", set("imafdcv")) == "riscv64"
    assert host_with(monkeypatch, "x86_64", set(chips.chips()["avx512-bf16"].requires)) == "avx512-bf16"


def test_bf16_needs_all_that_its_code_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cooper Lake has AVX512-BF16 but not the byte permutes that code for later chips uses."""
    cooper_lake = X86 | AVX512 | {"avx512_bf16", "avx512_vnni"}
    assert host_with(monkeypatch, "x86_64", cooper_lake) == "x86-64-v4"


@pytest.mark.parametrize("machine,features", [("x86_64", {"sse2"}), ("s390x", X86)])
def test_unknown_hosts_are_refused(monkeypatch: pytest.MonkeyPatch, machine: str, features: set[str]) -> None:
    with pytest.raises(UnsupportedError, match=f"{machine} machine"):
        host_with(monkeypatch, machine, features)


@pytest.mark.parametrize("line,found", [
    ("flags\t\t: fpu avx2 fma", {"fpu", "avx2", "fma"}), ("Features\t: fp asimd", {"fp", "asimd"}),
    ("isa\t\t: rv64imafdcv_zicsr_zvfh", {"i", "m", "a", "f", "d", "c", "v", "zicsr", "zvfh"})])
def test_cpuinfo_is_read(line: str, found: set[str]) -> None:
    assert chips.parse_cpuinfo(f"processor\t: 0\n{line}\nbogomips\t: 1\n") == found


def test_long_vectors_are_a_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((chips, "SVE_BYTES"), (artifact, "_SVE_BYTES")):
        monkeypatch.setattr(module, name, tmp_path / "length")
        for length, found in (("64", True), ("32", False)):
            (tmp_path / "length").write_text(length + "\n")
            assert ("sve512" in module.host_features()) is found


def test_names() -> None:
    assert chips.find("cpu") == chips.host()
    assert chips.find("riscv64").tvm_target["mattr"] and chips.find("riscv64").machine == "riscv64"
    with pytest.raises(UnsupportedError, match="'z80'.*x86-64-v3"):
        chips.find("z80")


def test_unknown_keys_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chips.toml").write_text('[toaster]\nslots = 2\n')
    monkeypatch.setattr(chips, "TABLE", tmp_path / "chips.toml")
    with pytest.raises(UnsupportedError, match="toaster.*slots"):
        chips.chips.__wrapped__()


CPUS = [name for name, chip in chips.chips().items() if isinstance(chip, chips.CpuChip)]


@pytest.mark.parametrize("name", CPUS)
def test_llvm_knows_it(name: str) -> None:
    tvm = pytest.importorskip("tvm")
    assert tvm.target.Target(chips.find(name).tvm_target).kind.name == "llvm"


def test_gpus() -> None:
    gpus = {name: chip for name, chip in chips.chips().items() if isinstance(chip, chips.GpuChip)}
    arches = {"a100": "sm_80", "rtx4090": "sm_89", "h100": "sm_90", "h200": "sm_90", "b200": "sm_100", "mi250x": "gfx90a",
              "mi300x": "gfx942", "mi355x": "gfx950", "rx7900xtx": "gfx1100"}
    assert {name: chip.arch for name, chip in gpus.items()} == arches
    for chip in gpus.values():
        assert (chip.driver == "cuda") == chip.arch.startswith("sm_") and chip.capability in (0, 80, 89, 90, 100)
        assert chip.warp == (64 if chip.matrix == "mfma" else 32) and chip.units > 60 and chip.shared >= 65_536
    assert chips.host().name not in gpus
