"""`inferloom compile`: a checkpoint, a GGUF or an ONNX file becomes an artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferloom.cache import CompileOptions, compile_cached, size_on_disk
from inferloom.cli import options
from inferloom.cli.console import emit, human_bytes, out, progress, quantized, set_json
from inferloom.errors import UsageError

if TYPE_CHECKING:
    from inferloom.loss import Loss


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
    quant: options.Quant = None,
    quant_head: options.QuantHead = None,
    quant_embedding: options.QuantEmbedding = None,
    quant_activations: options.QuantActivations = None,
    kv_dtype: options.KvDtype = None,
    task: options.Task = "generate",
    pooling: options.Pooling = None,
    normalize: options.Normalize = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
    report_loss: Annotated[bool, typer.Option(
        "--report-loss", help="Compile the checkpoint in fp32 too, let both predict a text, and say what is lost.")] = False,
    loss_text: Annotated[Path | None, typer.Option("--loss-text", show_default=False, metavar="FILE",
                                                   help="The text for --report-loss; Python source if not given.")] = None,
    json_: options.Json = False,
) -> None:
    """Compile CHECKPOINT for a chip. No device is needed; the same inputs give the same bytes."""
    set_json(json_)
    import inferloom.api

    options.compile_options(chip, dtype, max_model_len, task=task, pooling=pooling, normalize=normalize)
    if task != "generate" and (report_loss or loss_text):
        raise UsageError("--report-loss needs a model that predicts: leave it or --task out")
    start = time.perf_counter()
    with progress(f"compiling {checkpoint}") as report:
        path = inferloom.api.compile(checkpoint, chip=chip, dtype=dtype, out=output, max_model_len=max_model_len,
                                     max_tokens=max_tokens, max_seqs=max_seqs, block_tokens=block_tokens,
                                     batch_invariant=batch_invariant, passes=passes or (), quant=quant,
                                     quant_head=quant_head, quant_embedding=quant_embedding,
                                     quant_activations=quant_activations, kv_dtype=kv_dtype, task=task, pooling=pooling,
                                     normalize=normalize, force=force, progress=report)
    seconds = time.perf_counter() - start
    loss = _loss(path, checkpoint, max_model_len, passes, loss_text) if report_loss or loss_text else None
    manifest = json.loads((path / "manifest.json").read_text())
    size = size_on_disk(path)
    if json_:
        emit({"path": str(path), "seconds": round(seconds, 3), "bytes": size, "kernels": len(manifest["kernels"]),
              "chip": manifest["chip"], "model": manifest["model"], "memory": manifest["memory"],
              **({"loss": loss.to_json()} if loss is not None else {})})
    else:
        out.print(f"{path}: {manifest['model']['architecture']} for {manifest['chip']['name']}, "
                  f"{manifest['model']['dtype']}{quantized(manifest)}, {len(manifest['kernels'])} kernels, {human_bytes(size)}, "
                  f"{seconds:.1f} s")
        if loss is not None:
            out.print(f"loss: {loss}")


def _loss(artifact: Path, checkpoint: Path, max_model_len: int | None, passes: Sequence[str] | None,
          text: Path | None) -> Loss:
    """What the artifact loses against the same weights in fp32, compiled into the cache."""
    from inferloom.loss import report_loss

    with progress("measuring the loss") as report:
        report("compiling the reference in fp32")
        wanted = CompileOptions(dtype="fp32", max_model_len=max_model_len, passes=tuple(passes or ()), quant="none")
        reference = compile_cached(checkpoint, wanted, report)
        report("reading the text with both")
        return report_loss(artifact, reference, text)
