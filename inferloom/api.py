"""`compile`, and the runtime's classes, which here also take a checkpoint and compile it on first use."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inferloom.cache import CompileOptions, Progress, compile_cached, is_artifact, is_checkpoint, require_compiler
from inferloom.cache import resolve as resolve
from inferloom.errors import UsageError


def compile(model_or_path: Any, chip: str = "cpu", dtype: str = "bf16", out: str | os.PathLike[str] | None = None, *,
            max_model_len: int | None = None, max_tokens: int = 2048, max_seqs: int = 64, block_tokens: int = 32,
            force: bool = False, progress: Progress | None = None) -> Path:
    """Compile a checkpoint folder, or an `nn.Module` in memory, into an artifact; returns the artifact's folder.

    `chip` is a name from `inferloom chips` (`cpu`: this machine), `dtype` is `fp32` or `bf16`. Without `out` a
    checkpoint goes into the cache, keyed by content. An artifact that is already at `out` is replaced only if
    `force`, and only once the new one is complete. `progress` is called with a line of text for each stage.
    Raises `UsageError`, `MissingExtraError`, or `UnsupportedError` for a model or chip that cannot be compiled.
    """
    options = CompileOptions(chip, dtype, max_model_len, max_tokens, max_seqs, block_tokens)
    from_path = isinstance(model_or_path, str | os.PathLike)
    if from_path:
        model_or_path = Path(model_or_path).expanduser()
        if not is_checkpoint(model_or_path):
            raise UsageError(f"{model_or_path} is not a checkpoint: it needs config.json and *.safetensors"
                             + (" (it is an artifact, already compiled)" if is_artifact(model_or_path) else ""))
    if out is None:
        if not from_path:
            raise UsageError("out= is needed to compile a module that is not a checkpoint on disk")
        return compile_cached(model_or_path, options, progress)
    target = Path(out).expanduser()
    require_compiler("compiling")
    _check_free(target, force)
    from inferloom.compiler.build import compile_model

    if not target.exists():
        return compile_model(model_or_path, target, **asdict(options), progress=progress)
    fresh, old = (target.with_name(f".{target.name}.{name}.{os.getpid()}") for name in ("new", "old"))
    compile_model(model_or_path, fresh, **asdict(options), progress=progress)
    target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old)
    return target


def _check_free(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_artifact(target):
        raise UsageError(f"{target} exists and is not an artifact; give another folder")
    if not force:
        raise UsageError(f"{target} holds an artifact already; replace it with --force (force=True), or give "
                         "another folder")
