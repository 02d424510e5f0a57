"""`LLM` as users see it: the runtime's, which here also takes a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferloom.cache import CompileOptions, Progress, is_artifact, resolve
from inferloom.runtime.llm import LLM as _LLM
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.speculative import SpeculativeConfig

__all__ = ["LLM", "SamplingParams", "SpeculativeConfig", "load", "resolve_draft"]


class LLM(_LLM):
    """A model that answers prompts. `model` is an artifact, or a checkpoint.

    A checkpoint is compiled on first use into the cache (for `chip`, in `dtype`, for at most `max_model_len` tokens, with
    weights quantised as `quant`, `quant_head`, `quant_embedding` and `quant_activations` say, keys and values kept in
    `kv_dtype`, for the `task` "generate" or "embed", the latter with `pooling` and `normalize`), which needs the `compile`
    extra; `progress` then gets a line of text for each stage. An artifact must have been compiled as these from `quant` on say,
    where they are given. The draft model of `speculative` may be a checkpoint, too. All other options are the runtime's:
    `memory_bytes`, `threads`, `pin`, `gpu`, `max_num_seqs`, `max_num_batched_tokens`, `enable_prefix_caching`, `seed`.
    """

    def __init__(self, model: str | os.PathLike[str], *, chip: str = "cpu", dtype: str = "bf16",
                 max_model_len: int | None = None, quant: str | None = None, quant_head: str | None = None,
                 quant_embedding: str | None = None, quant_activations: str | None = None, kv_dtype: str | None = None,
                 task: str = "generate", pooling: str | None = None, normalize: bool | None = None,
                 progress: Progress | None = None,
                 speculative: SpeculativeConfig | str | os.PathLike[str] | None = None, **options: Any) -> None:
        wanted = CompileOptions(chip, dtype, max_model_len, quant=quant, quant_head=quant_head, quant_embedding=quant_embedding,
                                quant_activations=quant_activations, kv_dtype=kv_dtype, task=task,
                                pooling=pooling, normalize=normalize)
        super().__init__(resolve(model, wanted, progress), speculative=resolve_draft(speculative, wanted, progress),
                         **options)


def resolve_draft(speculative: SpeculativeConfig | str | os.PathLike[str] | None, options: CompileOptions,
                  progress: Progress | None = None) -> SpeculativeConfig | None:
    """The config with an artifact for its draft model: one that is given, or a checkpoint compiled like the model itself."""
    if speculative is None:
        return None
    config = SpeculativeConfig.of(speculative)
    if config.model is None or is_artifact(Path(config.model).expanduser()):
        return config
    return replace(config, model=resolve(config.model, options, progress))


def load(path: str | os.PathLike[str], **options: Any) -> LLM:
    """`LLM(path, **options)`."""
    return LLM(path, **options)
