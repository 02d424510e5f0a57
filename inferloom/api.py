"""`compile`: a model and a chip become an artifact."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inferloom.cache import (
    CompileOptions,
    Progress,
    compile_cached,
    is_artifact,
    is_checkpoint,
    require_compiler,
    require_front_end,
)
from inferloom.errors import UsageError


def compile(model_or_path: Any, chip: str = "cpu", dtype: str = "bf16", out: str | os.PathLike[str] | None = None, *,
            max_model_len: int | None = None, vocab_size: int | None = None, max_tokens: int = 2048,
            max_seqs: int = 64, block_tokens: int = 32, batch_invariant: bool = False, passes: Sequence[str] = (),
            quant: str | None = None, quant_head: str | None = None, quant_embedding: str | None = None,
            quant_activations: str | None = None, kv_dtype: str | None = None, task: str = "generate",
            pooling: str | None = None, normalize: bool | None = None, force: bool = False,
            progress: Progress | None = None) -> Path:
    """Compile a checkpoint folder, a GGUF or ONNX file or a module into an artifact; returns the artifact's folder.

    `model_or_path` is a checkpoint, a GGUF or ONNX file (or its folder), a `TracedModel` of one of the front ends, or
    an `nn.Module` that maps (tokens, positions), both i64[tokens], to logits [tokens, vocab_size]; a module needs
    `vocab_size`, `max_model_len` and `out`. `chip` is a name from `inferloom chips` (`cpu`: this machine), `dtype` is `fp32`,
    `bf16` or, for a GPU, `fp16`. With `batch_invariant` a GPU gives a sequence the same bits in any batch, as CPUs
    always do. `passes` are files with passes of your own, or names that installed packages offer under the entry point
    `inferloom.passes`; they run in this process. `quant` stores the weights of linear layers in few bits: int8, int4,
    int4-g128 and so on (docs/quantization.md); LM head and embedding follow, unless `quant_head` and `quant_embedding` give
    a name of their own or "none". `quant_activations` is `int8` or `none` for all quantised weights, also those that the
    checkpoint stores so. `kv_dtype` keeps keys and values in `bf16`, `int8` or `fp8` (half the memory, and bytes
    to read, of bf16) instead of in `dtype`. With the `task` "embed" the artifact has no LM head, and gives the final hidden
    states: `LLM.embed` makes vectors of them, as `pooling` ("last", "mean") and `normalize` say, or the checkpoint's
    `modules.json` (its GGUF metadata), or else of length 1 from the last token's.
    Without `out` a checkpoint goes into the cache, keyed by content. An artifact that is already at `out`
    is replaced only if `force`, and only once the new one is complete. `progress` is called with a line of text for
    each stage. Raises `UsageError`, `MissingExtraError`, or `UnsupportedError` for what cannot be compiled.
    """
    options = CompileOptions(chip, dtype, max_model_len, max_tokens, max_seqs, block_tokens, batch_invariant,
                             tuple(passes), quant, quant_head, quant_embedding, quant_activations, kv_dtype, task, pooling,
                             normalize)
    from_path = isinstance(model_or_path, str | os.PathLike)
    if from_path:
        model_or_path = Path(model_or_path).expanduser()
        if not is_checkpoint(model_or_path):
            raise UsageError(f"{model_or_path} is not a checkpoint: it needs config.json and *.safetensors, or a "
                             "GGUF or ONNX file"
                             + (" (it is an artifact, already compiled)" if is_artifact(model_or_path) else ""))
        if out is None:
            return compile_cached(model_or_path, options, progress)
    elif out is None:
        raise UsageError("out= is needed to compile a module: the cache holds checkpoints only")
    target = Path(out).expanduser()
    require_compiler("compiling")
    if from_path:
        require_front_end(model_or_path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not is_artifact(target):
            raise UsageError(f"{target} exists and is not an artifact; give another folder")
        if not force:
            raise UsageError(f"{target} holds an artifact already; replace it with --force (force=True), or give "
                             "another folder")
    if progress is not None:
        progress("loading the compiler")
    from inferloom.compiler.build import compile_model

    if not from_path:
        model_or_path = _traced(model_or_path, vocab_size, max_model_len)
    return compile_model(model_or_path, target, **asdict(options), progress=progress)


def _traced(module: Any, vocab_size: int | None, max_model_len: int | None) -> Any:
    from inferloom.compiler.frontends.huggingface import TracedModel
    from inferloom.compiler.frontends.module import trace_module

    if isinstance(module, TracedModel):
        return module
    if vocab_size is None or max_model_len is None:
        raise UsageError("compiling a module needs vocab_size= and max_model_len=")
    return trace_module(module, vocab_size=vocab_size, max_model_len=max_model_len)
