"""The ONNX front end: a decoder-only ONNX file becomes a model-level graph and a source of weights.

The file is read with the `onnx` package; nothing of it is executed. docs/onnx.md says what is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferloom.compiler.frontends.huggingface import TracedModel
from inferloom.compiler.frontends.onnx.file import FLOATS, OnnxGraph, OnnxInput, read_graph
from inferloom.compiler.frontends.onnx.importer import KEYS, PAST, TOKENS
from inferloom.compiler.frontends.onnx.program import Imported, import_graph, samples
from inferloom.compiler.frontends.onnx.structure import Roles, Structure
from inferloom.compiler.frontends.paths import TOKENIZER_FILES, onnx_facts, onnx_file
from inferloom.compiler.frontends.weights import ArraySource
from inferloom.ir.errors import UnsupportedError

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_INTEGERS = (6, 7)
DEFAULT_LENGTH = 2048


def load(path: str | Path, max_model_len: int | None = None) -> TracedModel:
    """Import the ONNX file, or the folder of one, with the tokenizer and the configuration that lie beside it.

    Raises UnsupportedError for what cannot be compiled: unknown operators and inputs, masks that are not causal, damaged
    or missing tensors, a `max_model_len` past the tables of the model.
    """
    file = onnx_file(Path(path))
    graph, beside = read_graph(file), onnx_facts(file)
    facts = read_facts(beside)
    roles = find_roles(graph)
    wanted = max_model_len or facts["length"] or DEFAULT_LENGTH
    if max_model_len is not None and facts["length"] and not 1 <= max_model_len <= facts["length"]:
        raise UnsupportedError(f"max_model_len={max_model_len} is not within the 1 to {facts['length']} positions of the model")
    structure = Structure(graph, roles, samples(bool(roles.caches), wanted), TOKENS, KEYS, PAST)
    for given in graph.inputs:
        if given.name in roles.caches:
            structure.shapes[given.name] = _cache_shape(given)
        elif given.name == roles.tokens:
            structure.shapes[given.name] = _token_shape(given)
    imported = import_graph(graph, structure, logits_of(graph, roles), facts["architecture"] or graph.name or "onnx", wanted)
    length = _length(imported, wanted, max_model_len)
    name = file.resolve().parent.name if file.name == "model.onnx" else file.stem
    unpacked = sum(op.type == "MatMulNBits" for op in graph.ops)
    notes = (f"the weights of {unpacked} MatMulNBits are unpacked: they take the artifact's own dtype",) if unpacked else ()
    files = {n: p for n, p in beside.items() if n in TOKENIZER_FILES}
    return TracedModel(imported.graph, ArraySource(imported.sources), name, facts["architecture"] or "onnx",
                       imported.vocab_size, length, facts["eos"], facts["bos"], files, notes)


def _length(imported: Imported, wanted: int, asked: int | None) -> int:
    most = imported.most_positions
    if most is None or wanted <= most:
        return wanted
    if asked is not None:
        raise UnsupportedError(f"max_model_len={asked} is more than the {most} positions that the model's tables hold")
    return most


def read_facts(files: Mapping[str, Path]) -> dict[str, Any]:
    """Architecture, length, end and begin tokens of config.json, generation_config.json and genai_config.json."""
    config, genai, generation = (_json(files.get(n)) for n in ("config.json", "genai_config.json", "generation_config.json"))
    genai = genai.get("model", {})
    sources = [s for s in (generation, genai, config) if isinstance(s, dict)]

    def first(*names: str) -> Any:
        return next((s[n] for n in names for s in sources if s.get(n) is not None), None)

    length = first(*_LENGTHS) or first("context_length")
    eos, bos = first("eos_token_id"), first("bos_token_id")
    many = eos if isinstance(eos, list) else [] if eos is None else [eos]
    names = config.get("architectures") or [genai.get("type", "")]
    try:
        return {"length": int(length) if length else None, "eos": tuple(dict.fromkeys(int(e) for e in many)),
                "bos": None if bos is None else int(bos), "architecture": str(names[0])}
    except (TypeError, ValueError, LookupError) as error:
        raise UnsupportedError(f"{', '.join(map(str, files.values()))}: the configuration is damaged: {error!r}") from None


def _json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedError(f"{path} is damaged: it holds no object")
    return found


def find_roles(graph: OnnxGraph) -> Roles:
    """What each input of the graph is, by name, type and rank."""
    integers = {i.name: i for i in graph.inputs if i.data_type in _INTEGERS}

    def named(*names: str) -> str | None:
        return next((n for n in names if n in integers), None)

    tokens = named("input_ids", "tokens", "ids")
    if tokens is None:
        raise UnsupportedError("the graph has no input `input_ids`; only decoders of text that take token ids are supported "
                               f"(its inputs: {', '.join(i.name for i in graph.inputs[:8])})")
    caches = tuple(i.name for i in graph.inputs if i.data_type in FLOATS and len(i.shape) == 4)
    mask = named("attention_mask")
    if mask is not None and len(integers[mask].shape) != 2:
        raise UnsupportedError(f"input {mask!r} has {len(integers[mask].shape)} axes; expected [batch, tokens]")
    return Roles(tokens, mask, named("position_ids", "positions"), caches, named("seqlens_k"),
                 named("total_sequence_length", "total_seq_len"))


def _token_shape(given: OnnxInput) -> tuple[Any, ...]:
    rank = len(given.shape)
    if rank not in (1, 2) or (rank == 2 and given.shape[0] not in (None, 1)):
        raise UnsupportedError(f"input {given.name!r} must be [batch, tokens] with a batch of any size or of one")
    if given.shape[-1] is not None:
        raise UnsupportedError(f"input {given.name!r} has a fixed length of {given.shape[-1]}; export with a dynamic number of "
                               "tokens (dynamic_shapes)")
    return (1, TOKENS) if rank == 2 else (TOKENS,)


def _cache_shape(given: OnnxInput) -> tuple[Any, ...]:
    """[1, heads, past, dim]; the dims that are not fixed are the batch and the number of past tokens."""
    open_ = [i for i, d in enumerate(given.shape) if d is None and i > 0]
    if len(open_) != 1:
        raise UnsupportedError(f"input {given.name!r} of shape {list(given.shape)} is not a cache that grows: one axis "
                               "beside the batch must be dynamic (static caches are not supported; export with a dynamic one)")
    return tuple(1 if i == 0 else PAST if i in open_ else d for i, d in enumerate(given.shape))


def logits_of(graph: OnnxGraph, roles: Roles) -> str:
    """The output that holds the logits: by its name, or the only one that is no cache."""
    if "logits" in graph.outputs:
        return "logits"
    caches = ("present", "past", "cache", ".key", ".value", "_key", "_value")
    found = [o for o in graph.outputs if not any(part in o for part in caches)]
    if len(found) != 1:
        raise UnsupportedError(f"none of the outputs ({', '.join(graph.outputs[:8])}) is called `logits`; name the logits so")
    return found[0]
