"""A GGUF file as a traced model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.compiler.frontends.gguf.blocks import BLOCKS, PLAIN
from inferloom.compiler.frontends.gguf.config import ROPE_FREQS, Family, family, hf_name, raw_config, row_order
from inferloom.compiler.frontends.gguf.file import GgufFile, GgufTensor, read_gguf
from inferloom.compiler.frontends.gguf.tokenizer import tokenizer_files
from inferloom.compiler.frontends.hf_config import make_config
from inferloom.compiler.frontends.huggingface import Checkpoint, TracedModel, trace_checkpoint
from inferloom.compiler.frontends.paths import gguf_file
from inferloom.compiler.frontends.pooling import gguf_pooling
from inferloom.compiler.frontends.quantized.weight import Integers, quantized_weight
from inferloom.compiler.frontends.weights import Tensor
from inferloom.compiler.task import Task
from inferloom.ir.errors import UnsupportedError


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """A tensor of numbers that is read on demand."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        return self.make()


def load(path: str | Path, max_model_len: int | None = None, task: Task = "generate") -> TracedModel:
    """Trace the model of a GGUF file, or of a folder that holds one.

    Raises UnsupportedError for a damaged file, and for an architecture, a type of tensors or a key that is not known.
    """
    file = read_gguf(gguf_file(Path(path)))
    raw = raw_config(file)
    tokenizer, notes = tokenizer_files(file)
    config = make_config(raw, str(file.path))
    ends = raw["eos_token_id"] or []
    return trace_checkpoint(Checkpoint(config, tensors(file, raw), file.path.stem, str(file.path), tuple(ends),
                                       raw["bos_token_id"], tokenizer, notes,
                                       gguf_pooling(file.metadata, str(file.path))), max_model_len, task)


def tensors(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by transformers' names, in its order of rows and its form of norms. None is left out silently."""
    known = family(file)
    made: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        target = hf_name(known, name)
        if target is not None:
            made[target] = _tensor(known, tensor, config)
        elif name != ROPE_FREQS:
            unknown.append(name)
    if unknown:
        raise UnsupportedError(f"{file.path}: it is not known what these tensors are: {', '.join(unknown[:10])}"
                               + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""))
    return made


def _tensor(known: Family, tensor: GgufTensor, config: Mapping[str, Any]) -> Tensor:
    order = row_order(known, tensor.name, tensor.shape[0], config)
    if tensor.type in PLAIN:
        kind = PLAIN[tensor.type]
        shifted = known.shifted_norms and tensor.name.endswith("norm.weight")

        def read() -> np.ndarray:
            array = tensor.raw().view(kind.dtype).reshape(tensor.shape)
            array = array if order is None else array[order]
            return array.astype(np.float32) - np.float32(1) if shifted else array

        return Plain("F32" if shifted else kind.stored, tensor.shape, read)
    block = BLOCKS[tensor.type]
    if len(tensor.shape) != 2:
        raise UnsupportedError(f"{tensor.path}: {tensor.name} of shape {list(tensor.shape)} is stored as {block.name}; only "
                               "matrices are read so")
    n, k = tensor.shape

    def integers() -> Integers:
        found = block.integers(tensor.raw(), n)
        return found if order is None else found.rows(order)

    return quantized_weight((n, k), block.format, k // block.group, block.symmetric, block.name, integers)
