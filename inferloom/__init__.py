"""inferloom: weave any model onto any chip.

`compile` turns a checkpoint into an artifact (needs the `compile` extra); `LLM`, `AsyncLLM` and `load`
turn an artifact into tokens (the base install). Names are imported on first use, so that a process that
serves never imports a compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferloom.api import compile
    from inferloom.async_llm import AsyncLLM
    from inferloom.errors import InferloomError
    from inferloom.llm import LLM, SamplingParams, SpeculativeConfig, load

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "InferloomError", "SamplingParams", "SpeculativeConfig", "__version__", "compile",
           "load"]

_HOME = {"InferloomError": "inferloom.errors", "compile": "inferloom.api", "LLM": "inferloom.llm",
         "AsyncLLM": "inferloom.async_llm", "SamplingParams": "inferloom.llm", "SpeculativeConfig": "inferloom.llm",
         "load": "inferloom.llm"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'inferloom' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
