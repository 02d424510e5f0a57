"""Checkpoints, an environment for each peer, and the checkpoint in each peer's formats, all below one root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from pathlib import Path

from inferloom.benchmarks.cpu import checkpoints
from inferloom.benchmarks.cpu.systems import HERE, OURS, SYSTEMS, Format, System
from inferloom.errors import InferloomError

Progress = Callable[[str], None]
#: Longest sequence of our artifacts: the long context and what is decoded after it.
MAX_MODEL_LEN = 8448


def prepare(root: Path, models: Iterable[str], systems: Iterable[str], precisions: Iterable[str],
            progress: Progress = print) -> list[str]:
    """Make what is missing; what is there is kept. Returns a line for each thing that could not be made."""
    failed: list[str] = []
    sources = {model: checkpoints.make(model, root / "models") for model in models}
    for system in (SYSTEMS[name] for name in systems if name != OURS):
        try:
            install(root, system, progress)
            for model, source in sources.items():
                for precision in precisions:
                    if precision in system.formats:
                        convert(root, system, system.formats[precision], model, source, progress)
        except InferloomError as error:
            failed.append(f"{system.name}: {error}")
            progress(failed[-1])
    return failed


def environment_of(root: Path, system: System) -> Path:
    return root / "venv" / system.name


def installed(root: Path, system: System) -> bool:
    """Whether the system's environment holds the requirements of the table."""
    stamp = environment_of(root, system) / "installed.json"
    return stamp.is_file() and json.loads(stamp.read_text()) == list(system.requirements)


def install(root: Path, system: System, progress: Progress = print) -> None:
    """An environment with the system's requirements, anew where they have changed. InferloomError when pip fails."""
    if installed(root, system):
        return
    folder = environment_of(root, system)
    progress(f"{system.name}: installing {' '.join(system.requirements)}")
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
          *system.requirements], root, f"install-{system.name}", system.install)
    if system.unwanted:
        _run([str(folder / "bin" / "python"), "-m", "pip", "uninstall", "--quiet", "--yes", *system.unwanted], root,
             f"uninstall-{system.name}", {})
    (folder / "installed.json").write_text(json.dumps(list(system.requirements)))


def place(root: Path, form: Format, model: str) -> Path:
    return root / form.path.format(model=model)


def convert(root: Path, system: System, form: Format, model: str, source: Path, progress: Progress = print) -> None:
    """The checkpoint in a format, moved into place when it is whole. InferloomError when the command fails."""
    target = place(root, form, model)
    if target.exists():
        return
    progress(f"{system.name}: {model} as {form.name}")
    part = target.with_name(f"part-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    words = {"bin": environment_of(root, system) / "bin", "source": source, "target": part, "root": root, "here": HERE,
             "model": model}
    _run([word.format(**words) for word in form.command], root, f"convert-{system.name}-{target.name}", system.environment)
    part.rename(target)


def _run(command: list[str], root: Path, name: str, environment: dict[str, str]) -> None:
    log = root / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)
    if done.returncode != 0:
        raise InferloomError(f"{' '.join(command[:3])} ... ended with {done.returncode}; its output is in {log}")


def ours(root: Path, model: str, precision: str, progress: Progress = print) -> Path:
    """The artifact of a checkpoint, compiled by the command line of this installation where its cache has none.

    An artifact of an earlier compiler is removed. InferloomError when the checkpoint does not compile.
    """
    progress(f"{OURS}: {model} in {precision}")
    environment = os.environ | {"XDG_CACHE_HOME": str(root / "ours")}
    command = [sys.executable, "-c", "from inferloom.cli import main; main()", "compile", str(root / "models" / model),
               "--chip", "cpu", "--dtype", "bf16", "--max-model-len", str(MAX_MODEL_LEN), "--json",
               *SYSTEMS[OURS].formats[precision].command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise InferloomError(f"{model} in {precision} does not compile: {done.stderr.strip()[-1500:]}")
    made = Path(json.loads(done.stdout)["path"])
    memo = root / "ours" / "current.json"
    current: dict[str, str] = json.loads(memo.read_text()) if memo.is_file() else {}
    before = current.get(f"{model} {precision}")
    if before and before != str(made):
        shutil.rmtree(before, ignore_errors=True)
    memo.write_text(json.dumps(current | {f"{model} {precision}": str(made)}, indent=1))
    return made
