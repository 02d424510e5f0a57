"""`inferloom compile`: a checkpoint or an ONNX file becomes an artifact."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from inferloom.cache import size_on_disk
from inferloom.cli import options
from inferloom.cli.console import emit, human_bytes, out, progress, set_json


def compile_(
    checkpoint: options.Checkpoint,
    output: Annotated[Path | None, typer.Option("--out", "-o", show_default=False,
                                                help="Folder to write; the cache if not given.")] = None,
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in one step.")] = 2048,
    max_seqs: Annotated[int, typer.Option(min=1, help="Most sequences in one step.")] = 64,
    block_tokens: Annotated[int, typer.Option(min=16, help="Tokens in a block of the paged state.")] = 32,
    batch_invariant: Annotated[bool, typer.Option(
        "--batch-invariant", help="On a GPU: the same bits whatever else is in the batch. CPUs always do.")] = False,
    passes: options.Passes = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
    json_: options.Json = False,
) -> None:
    """Compile CHECKPOINT for a chip. No device is needed; the same inputs give the same bytes."""
    set_json(json_)
    import inferloom.api

    options.compile_options(chip, dtype, max_model_len)
    start = time.perf_counter()
    with progress(f"compiling {checkpoint}") as report:
        path = inferloom.api.compile(checkpoint, chip=chip, dtype=dtype, out=output, max_model_len=max_model_len,
                                     max_tokens=max_tokens, max_seqs=max_seqs, block_tokens=block_tokens,
                                     batch_invariant=batch_invariant, passes=passes or (), force=force, progress=report)
    seconds = time.perf_counter() - start
    manifest = json.loads((path / "manifest.json").read_text())
    size = size_on_disk(path)
    if json_:
        emit({"path": str(path), "seconds": round(seconds, 3), "bytes": size, "kernels": len(manifest["kernels"]),
              "chip": manifest["chip"], "model": manifest["model"], "memory": manifest["memory"]})
    else:
        out.print(f"{path}: {manifest['model']['architecture']} for {manifest['chip']['name']}, "
                  f"{manifest['model']['dtype']}, {len(manifest['kernels'])} kernels, {human_bytes(size)}, "
                  f"{seconds:.1f} s")
