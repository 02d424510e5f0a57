"""`AsyncLLM` as users see it: the runtime's, which here also takes a checkpoint."""

from __future__ import annotations

import os
from typing import Any

from inferloom.cache import CompileOptions, Progress, resolve
from inferloom.llm import SpeculativeConfig, resolve_draft
from inferloom.runtime.async_llm import AsyncLLM as _AsyncLLM

__all__ = ["AsyncLLM"]


class AsyncLLM(_AsyncLLM):
    """`LLM` for asyncio: `async for output in llm.generate(prompt, params)`. Takes what `LLM` takes."""

    def __init__(self, model: str | os.PathLike[str], *, chip: str = "cpu", dtype: str = "bf16",
                 max_model_len: int | None = None, quant: str | None = None, progress: Progress | None = None,
                 speculative: SpeculativeConfig | str | os.PathLike[str] | None = None, **options: Any) -> None:
        wanted = CompileOptions(chip, dtype, max_model_len, quant=quant)
        super().__init__(resolve(model, wanted, progress), speculative=resolve_draft(speculative, wanted, progress),
                         **options)
