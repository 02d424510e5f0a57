"""The Hugging Face front end: a checkpoint folder becomes a model-level graph and a source of weights.

Only `config.json` and safetensors are read, never code of the checkpoint. Tracing holds no weight in memory.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from inferloom.compiler.frontends import hooks, layers
from inferloom.compiler.frontends.aten import Imported, import_program
from inferloom.compiler.frontends.conversion import named
from inferloom.compiler.frontends.hf_config import fix_rope, model_length, position_limit, read_config, special_ids
from inferloom.compiler.frontends.paths import TOKENIZER_FILES
from inferloom.compiler.frontends.pooling import CheckpointPooling, read_pooling
from inferloom.compiler.frontends.quantized.formats import config_beside, decode
from inferloom.compiler.frontends.quantized.weight import QuantizedWeight
from inferloom.compiler.frontends.skeleton import Stored, build_skeleton
from inferloom.compiler.frontends.weights import (
    CheckpointSource,
    Tensor,
    WeightSource,
    read_checkpoint,
    resolve,
)
from inferloom.compiler.quantization.rows import StoredWeights
from inferloom.compiler.task import Task, for_task
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph
from inferloom.ir.types import Sym

#: Bounds while tracing; the compiler sets its own.
MOST = 65536
TOKENS, ROWS = Sym("tokens", MOST), Sym("rows", MOST)


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """What a front end hands to the compiler.

    `weights` loads every source of `graph.params`; `max_model_len` is in tokens; `tokenizer_files` maps file
    names to paths or contents; `notes` say what a user should know (fallbacks, choices made while tracing). `quantized` are the
    weights that are stored quantised; `weights` gives them, too, as the floats that they stand for. `embedding` is what the
    checkpoint says of how its hidden states become a vector.
    """

    graph: Graph
    weights: WeightSource
    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tokenizer_files: Mapping[str, Path | bytes]
    notes: tuple[str, ...] = ()
    quantized: StoredWeights | None = None
    embedding: CheckpointPooling | None = None


def load(checkpoint_dir: str | Path, max_model_len: int | None = None, task: Task = "generate") -> TracedModel:
    """Trace the checkpoint in a folder; see the module's docstring.

    Raises UnsupportedError for what cannot be compiled: an unknown architecture or operator, pickled weights,
    missing or misshapen tensors, a `max_model_len` past what the model was made for.
    """
    folder = Path(checkpoint_dir)
    config, quantization = read_config(folder)
    held = dict[str, Tensor](read_checkpoint(folder))
    notes: tuple[str, ...] = ()
    if quantization := quantization or config_beside(folder) or {}:
        held, notes = decode(quantization, held, folder)
    eos, bos = special_ids(config, folder)
    files = {n: folder / n for n in TOKENIZER_FILES if (folder / n).is_file()}
    embedding = read_pooling(folder) if task == "embed" else None
    return trace_checkpoint(Checkpoint(config, held, folder.resolve().name, str(folder), eos, bos, files, notes, embedding),
                            max_model_len, task)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint holds, read but for the tensors: a transformers config, tensors by transformers' names, tokenizer.

    `where` is for messages.
    """

    config: Any
    tensors: Mapping[str, Tensor]
    name: str
    where: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tokenizer_files: Mapping[str, Path | bytes]
    notes: tuple[str, ...] = ()
    embedding: CheckpointPooling | None = None


def trace_checkpoint(checkpoint: Checkpoint, max_model_len: int | None = None, task: Task = "generate") -> TracedModel:
    """Trace the model of a checkpoint, and find each of its parameters: to embed, the checkpoint needs no LM head."""
    c, config = checkpoint, checkpoint.config
    length = model_length(config, max_model_len)
    notes = fix_rope(config, length)
    traced, model = trace_config(config, stored=lambda model: stored_buffers(model, c.tensors))
    graph = for_task(traced.imported.graph, task)
    wanted = {p.source: tuple(int(str(d)) for d in p.value.type.shape)  # type: ignore[union-attr]
              for p in graph.params if not p.source.startswith("buffer:")}
    where = resolve(named(model, c.tensors), wanted, tied_names(model), c.where)
    return TracedModel(graph, CheckpointSource(where, traced.imported.buffers), c.name, type(model).__name__,
                       int(config.vocab_size), length, c.eos_token_ids, c.bos_token_id, dict(c.tokenizer_files),
                       (*c.notes, *notes, *traced.notes), stored_weights(where), c.embedding)


def stored_weights(where: Mapping[str, Tensor]) -> StoredWeights | None:
    """Those of the parameters that the checkpoint holds quantised; None when there are none."""
    held = {source: tensor for source, tensor in where.items() if isinstance(tensor, QuantizedWeight)}
    return StoredWeights({source: weight.scheme for source, weight in held.items()}, lambda source: held[source].quantized(),
                         {source: weight.stored_as for source, weight in held.items()},
                         frozenset(source for source, weight in held.items() if not weight.exact)) if held else None


@dataclass(frozen=True, slots=True, eq=False)
class ConfigTrace:
    """The imported graph of a config and notes for the user."""

    imported: Imported
    notes: tuple[str, ...] = ()


def trace_config(config: Any, whole: bool = False, stored: Stored | None = None) -> tuple[ConfigTrace, Any]:
    """Trace the causal LM of a config; also returns its skeleton (a model without weights).

    Each distinct layer is traced a few times and repeated, unless `whole` or the structure does not allow it.
    `stored(model)` gives the buffers that the checkpoint holds, by name.
    """
    model = build_skeleton(config, stored)
    with hooks.installed(model):
        if whole:
            return ConfigTrace(trace_model(model)), model
        return trace_repeated(model), model


def trace_repeated(model: Any) -> ConfigTrace:
    """Trace distinct layers only and repeat them; traces the whole model, with a note, when that cannot be done."""
    found = layers.find_layers(model)
    if found is None:
        return ConfigTrace(trace_model(model), ("the model has no list of layers: traced as a whole",))
    if len(found.traced()) == len(found.kinds):
        return ConfigTrace(trace_model(model))
    sources = sources_of(model)
    try:
        with layers.skipping(found):
            traced = trace_model(model)
        graph = layers.repeat(traced, found, sources)
    except layers.NotRepeated as why:
        return ConfigTrace(trace_model(model), (f"the layers cannot be repeated ({why}): traced as a whole",))
    return ConfigTrace(Imported(graph, traced.buffers, {}))


class _Step(nn.Module):
    """One step over ids and positions [1, tokens] with the rows wanted; returns logits [1, rows, vocab]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows).logits


def trace_model(model: Any) -> Imported:
    """Trace a transformers model whose hooks are installed."""
    ids = torch.zeros(1, 7, dtype=torch.int64)
    longest = min(max(position_limit(model.config) or MOST, 8), MOST)
    program = export(_Step(model).eval(), (ids, torch.arange(7)[None], torch.zeros(3, dtype=torch.int64)), 1, longest)
    return import_program(program, name=model.config.model_type, tokens=TOKENS, rows=ROWS, sources=sources_of(model),
                          prefix="model.")


def export(step: nn.Module, inputs: tuple[torch.Tensor, ...], token_axis: int, longest: int = MOST) -> Any:
    """torch.export with a dynamic number of tokens and of rows; UnsupportedError with torch's reason if it fails.

    While traced, the tokens are one sequence of up to `longest`, so that models may compare it with their limit.
    """
    tokens, rows = torch.export.Dim("T", min=1, max=longest), torch.export.Dim("R", min=1, max=MOST - 1)
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(step, inputs, dynamic_shapes=({token_axis: tokens}, {token_axis: tokens},
                                                                        {0: rows}), strict=False)
            return program.run_decompositions({})
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"torch.export cannot trace {type(getattr(step, 'model', step)).__name__}: "
                               f"{str(error).strip()[:2000]}") from error
    finally:
        logger.setLevel(level)


def sources_of(model: nn.Module) -> dict[str, str]:
    """Every parameter name to its source: the first name of a tied parameter."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Source -> the other names of the same parameter."""
    table: dict[str, tuple[str, ...]] = {}
    for name, source in sources_of(model).items():
        if name != source:
            table[source] = (*table.get(source, ()), name)
    return table


def stored_buffers(model: Any, stored: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Persistent buffers that a checkpoint holds, by the name that they have in the model."""
    wanted = set(model.state_dict()) & {name for name, _ in model.named_buffers()}
    if not wanted:
        return {}
    return {name: tensor.read() for name, tensor in named(model, stored).items() if name in wanted}
