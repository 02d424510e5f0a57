"""`inferloom doctor`: what this machine has, what is missing, and what that means."""

from __future__ import annotations

import os
import platform
import sys
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from inferloom import __version__
from inferloom.cache import COMPILE_PACKAGES, cache_dir, free_bytes, missing_compile_packages, size_on_disk
from inferloom.cli import options
from inferloom.cli.console import emit, human_bytes, out, set_json, table

ROLES = {
    "runtime": ("numpy", "blake3", "tokenizers", "jinja2", "typer", "rich"),
    "compile": COMPILE_PACKAGES,
    "onnx": ("onnx",),
    "test": ("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "import-linter"),
}
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni",
            "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "sve", "sve2", "i8mm")


def doctor(json_: options.Json = False) -> None:
    """Check this machine: Python, processor, memory, packages per role, cache. Fails if the runtime cannot run."""
    set_json(json_)
    facts = survey()
    if json_:
        emit(facts)
    else:
        _show(facts)
    if facts["problems"]:
        raise typer.Exit(1)


def survey() -> dict[str, Any]:
    """Everything `doctor` reports; `problems` keep the runtime from running, `notes` do not."""
    packages = {role: {name: _version(name) for name in names} for role, names in ROLES.items()}
    cpu, memory, cache = _cpu(), _meminfo(), cache_dir()
    problems = [f"{name} is missing: run pip install inferloom" for name, v in packages["runtime"].items() if not v]
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        problems.append(f"Python {platform.python_version()} is not supported: use 3.11 or 3.12")
    notes = []
    missing = missing_compile_packages()
    if missing:
        notes.append(f"compiling is off ({', '.join(missing)} missing): run pip install 'inferloom[compile]'")
    if _host_chip() is None:
        notes.append("no known chip describes this processor: `inferloom chips` lists what can be compiled for")
    return {
        "inferloom": __version__, "python": platform.python_version(), "executable": sys.executable,
        "platform": platform.platform(), "libc": " ".join(platform.libc_ver()), "cpu": cpu,
        "chip": _host_chip(), "gpu_drivers": _gpu_drivers(), "memory": memory, "packages": packages,
        "cache": {"path": str(cache), "bytes": size_on_disk(cache), "free": free_bytes(cache)},
        "problems": problems, "notes": notes,
    }


def _show(facts: dict[str, Any]) -> None:
    cpu, memory, cache = facts["cpu"], facts["memory"], facts["cache"]
    out.print(f"inferloom {facts['inferloom']}, Python {facts['python']} ({facts['executable']})")
    out.print(f"system   {facts['platform']}")
    out.print(f"cpu      {cpu['model']}, {cpu['usable']} of {cpu['cores']} cores; {' '.join(cpu['features'])}")
    out.print(f"chip     {facts['chip'] or 'none that is known'}")
    out.print(f"gpu      {', '.join(facts['gpu_drivers']) or 'no driver of NVIDIA or AMD'}")
    out.print(f"memory   {human_bytes(memory['available'])} available of {human_bytes(memory['total'])}")
    out.print(f"cache    {cache['path']}: {human_bytes(cache['bytes'])}, {human_bytes(cache['free'])} free on disk")
    rows = table("Packages", "role", "installed", "missing")
    for role, packages in facts["packages"].items():
        rows.add_row(role, ", ".join(f"{n} {v}" for n, v in packages.items() if v),
                     ", ".join(n for n, v in packages.items() if not v))
    out.print(rows)
    for note in facts["notes"]:
        out.print(f"[yellow]note:[/] {note}")
    for problem in facts["problems"]:
        out.print(f"[red]problem:[/] {problem}")
    if not facts["problems"]:
        out.print("[green]The runtime can run here.[/]")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    return {"model": model, "machine": platform.machine(), "cores": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)), "features": [f for f in FEATURES if f in flags]}


def _meminfo() -> dict[str, int]:
    """Bytes of memory, total and available now; a control group's limit counts where it is lower."""
    sizes = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        sizes[key] = int(value.split()[0]) * 1024
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, max(0, limit - used))
    except (OSError, ValueError):
        pass
    return {"total": total, "available": available}


def _gpu_drivers() -> list[str]:
    """GPU drivers that the system's linker knows, by the names that chips have for them."""
    return [driver for driver, library in (("cuda", "cuda"), ("hip", "amdhip64")) if find_library(library)]


def _host_chip() -> str | None:
    """The chip that `--chip cpu` stands for here; None where no known chip does."""
    from inferloom.errors import UnsupportedError
    from inferloom.targets.chips import host

    try:
        return host().name
    except UnsupportedError:
        return None
