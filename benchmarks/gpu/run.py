"""Measures the kernels of build.py on this machine's GPU; needs the checkout, torch and NumPy, nothing installed.

    python benchmarks/gpu/run.py --built build/gpu/h100 --out build/gpu-results --sections ceilings,kernels,matmul

Each section is a process of its own, started again after a fault of the GPU, that skips what was dealt with before.
A failed case is recorded and the run goes on. Exit status: 0, or 1 when a case failed, 2 when nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script; its own folder must not shadow other modules
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from checkout import bootstrap
    sys.path.pop(0)
    bootstrap()

from inferloom.benchmarks.gpu import report as reports

#: Share of the minutes of each section, in order; what one leaves, the next ones have.
SECTIONS = {"ceilings": 0.5, "kernels": 2.0, "attention": 2.0, "matmul": 2.0, "models": 3.0, "start": 0.7}
RESTARTS = 6
#: Seconds that a process needs to start and to end.
STARTING = 12
TUNED = Path(__file__).resolve().parents[2] / "targets" / "triton" / "tuned"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, default=Path("build/gpu/h100"), help="the chip's folder of build.py")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-results"))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tuned", type=Path, default=TUNED, help="folder for the measured configurations")
    parser.add_argument("--sanitizer", choices=("memcheck", "racecheck", "initcheck"),
                        help="correctness only, under compute-sanitizer")
    parser.add_argument("--quick", action="store_true", help="correctness of small cases only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    wanted = options.sections.split(",")
    problem = refusal(options.built, wanted)
    if problem:
        print(f"run.py: {problem}", file=sys.stderr)
        return 2
    return run(options, [s for s in SECTIONS if s in wanted])


def refusal(built: Path, wanted: list[str]) -> str:
    """Why nothing can be run here; empty when it can."""
    if unknown := [s for s in wanted if s not in SECTIONS]:
        return f"no section is called {unknown[0]!r}; choose from: {', '.join(SECTIONS)}"
    if not (built / "sets.json").is_file():
        return f"{built} holds no kernels: python -m inferloom.benchmarks.gpu.build --chip {built.name} --out {built.parent}"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU here (torch finds no CUDA device)"
    have, arch = "sm_{}{}".format(*torch.cuda.get_device_capability()), json.loads((built / "sets.json").read_text())["arch"]
    return "" if have == arch else f"{built} was built for {arch}, this GPU is {torch.cuda.get_device_name()} ({have})"


def run(options: argparse.Namespace, sections: list[str]) -> int:
    """All sections, then the report; also writes the report after each section."""
    lines = options.out / "lines"
    shutil.rmtree(lines, ignore_errors=True)
    lines.mkdir(parents=True)
    chip = json.loads((options.built / "sets.json").read_text())["chip"]
    end, seconds, died = time.monotonic() + options.minutes * 60 - 15, {}, []
    made: dict[str, Any] = {"schema": 1, "chip": chip, "device": device(), "versions": versions(),
                            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "arguments": sys.argv[1:]}
    for number, section in enumerate(sections):
        share = SECTIONS[section] / sum(SECTIONS[s] for s in sections[number:])
        began = time.monotonic()
        died += _section(options, section, began + (end - began) * share)
        seconds[section] = round(time.monotonic() - began, 1)
        collected = reports.collect(lines / f"{s}.jsonl" for s in sections[:number + 1] if (lines / f"{s}.jsonl").exists())
        collected["failures"] += died
        made |= collected | {"seconds": seconds, "ceilings": reports.rates(collected["cases"]), "device_after": device()}
        reports.write(options.out / "report.json", made)
        print(f"{section}: {seconds[section]} s", flush=True)
    entries = reports.tuned(made["cases"])
    if entries:
        reports.write_tuned(options.tuned / f"{chip}.json", entries, made["device"])
        reports.write_tuned(options.out / f"tuned-{chip}.json", entries, made["device"])
    reports.plot(made, options.out)
    text = reports.summary(made)
    (options.out / "summary.txt").write_text(text + "\n")
    print(text)
    return 1 if made["failures"] or not made["cases"] else 0


def _section(options: argparse.Namespace, section: str, end: float) -> list[dict[str, str]]:
    """Run a section until it ends or its time does; how its processes died."""
    died = []
    for _ in range(RESTARTS):
        left = end - time.monotonic() - STARTING
        if left < 5:
            died.append({"section": section, "name": "(section)", "why": "no time left"})
            break
        command = [sys.executable, str(Path(__file__).resolve()), "--child", section, "--built", str(options.built),
                   "--out", str(options.out), "--minutes", str(left / 60)]
        if options.quick or options.sanitizer:
            command.append("--quick")
        environment = dict(os.environ)
        if options.sanitizer:  # each tensor in an allocation of its own, so that what leaves it shows
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            command = [_sanitizer(), "--tool", options.sanitizer, "--error-exitcode", "9", "--target-processes", "all", *command]
        log = options.out / f"{section}.log"
        with log.open("a") as file:
            try:
                # A case that has begun may take a while longer than the section has.
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=left + 60)
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = -9
        if status == 0:
            break
        tail = log.read_text(errors="replace").strip()[-600:]
        died.append({"section": section, "name": "(process)", "why": f"exit status {status}: {tail}"})
        if options.sanitizer:
            break
    return died


def _sanitizer() -> str:
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def child(options: argparse.Namespace) -> int:
    from inferloom.benchmarks.gpu import attention, endtoend, products
    from inferloom.benchmarks.gpu.session import Gpu, Recorder

    work = {"ceilings": products.ceilings, "kernels": endtoend.kernels, "attention": attention.attention,
            "matmul": products.matmul, "models": endtoend.models, "start": endtoend.start}
    recorder = Recorder(options.out / "lines" / f"{options.child}.jsonl", options.minutes * 60, options.quick)
    work[options.child](Gpu(options.built), recorder, json.loads((options.built / "sets.json").read_text())["sets"])
    return 0


def device() -> dict[str, str]:
    """What nvidia-smi says of the GPU: driver, clocks in MHz, temperature, power."""
    fields = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
              "temperature.gpu", "power.draw", "power.limit", "clocks_event_reasons.active", "mig.mode.current")
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return {"nvidia-smi": str(failure)}
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values)) if len(values) == len(fields) else {"nvidia-smi": (done.stdout + done.stderr).strip()[:300]}


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    made = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas"):
        try:
            made[name] = version(name)
        except PackageNotFoundError:
            made[name] = "none"
    return made


if __name__ == "__main__":
    sys.exit(main())
