"""Build: a model and a chip become an artifact directory."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.compiler.frontends.huggingface import TracedModel, load
from inferloom.compiler.kernels import Selection, select_kernels
from inferloom.compiler.passes.pack_weights import Packing
from inferloom.compiler.pipeline import Dump, Options, lower
from inferloom.compiler.plan import Placement, Plan, plan_memory, tensor_bytes
from inferloom.compiler.report import Report
from inferloom.compiler.weights import weight_buffers
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.text import print_graph
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.runtime import manifest as m
from inferloom.runtime import safetensors
from inferloom.runtime.artifact import seal
from inferloom.runtime.publish import publish, staging
from inferloom.targets.base import CompiledModule
from inferloom.targets.chips import Chip, find
from inferloom.targets.tvm.codegen import compile_kernels

Progress = Callable[[str], None]
DTYPES = {"fp32": DType.F32, "bf16": DType.BF16}
PACKING = Packing(tile=64, k_multiple=32, pair={DType.F32: 1, DType.BF16: 2})
WEIGHTS_FILE = "weights/model.safetensors"
_STORED = {DType.F32: ("F32", 4), DType.BF16: ("BF16", 2), DType.I32: ("I32", 4)}
_TOOLS = ("torch", "transformers", "apache-tvm", "ziglang")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Limits of an artifact: tokens and sequences of one step, tokens of one sequence and of one block."""

    dtype: str = "bf16"
    max_model_len: int | None = None
    max_tokens: int = 2048
    max_seqs: int = 64
    block_tokens: int = 32

    def check(self) -> None:
        """UnsupportedError on an unknown dtype or a limit that makes no sense."""
        if self.dtype not in DTYPES:
            raise UnsupportedError(f"dtype {self.dtype!r} is not supported; choose from: {', '.join(DTYPES)}")
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise UnsupportedError(f"block_tokens={self.block_tokens} must be a positive multiple of 16")
        for name in ("max_tokens", "max_seqs"):
            if getattr(self, name) < 1:
                raise UnsupportedError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise UnsupportedError(f"max_model_len={self.max_model_len} must be at least 1")


@dataclass(frozen=True, slots=True)
class Compiled:
    """Everything of an artifact but its weights."""

    graph: Graph
    plan: Plan
    selection: Selection
    module: CompiledModule
    report: Report
    dump: Dump


def compile_model(model_or_path: Any, out: str | Path, *, chip: str = "cpu", dtype: str = "bf16",
                  max_model_len: int | None = None, max_tokens: int = 2048, max_seqs: int = 64,
                  block_tokens: int = 32, progress: Progress | None = None) -> Path:
    """Compile a checkpoint directory (or a `TracedModel`) for a chip into the artifact directory `out`.

    An artifact that stands there is replaced, and nothing of it is left half written. Raises UnsupportedError
    for a model, chip or option that cannot be compiled.
    """
    say = progress or (lambda message: None)
    options = BuildOptions(dtype, max_model_len, max_tokens, max_seqs, block_tokens)
    options.check()
    target = find(chip)
    say("tracing the model")
    model = model_or_path if isinstance(model_or_path, TracedModel) else load(model_or_path, max_model_len)
    compiled = compile_graph(model, target, options, say)
    say(f"packing {compiled.plan.weight_bytes / 1e6:.0f} MB of weights")
    final = Path(out)
    with staging(final) as folder:
        manifest = _write(folder, model, target, options, compiled)
        say("hashing and sealing")
        seal(folder, manifest)
        publish(folder, final)
    return final


def compile_graph(model: TracedModel, chip: Chip, options: BuildOptions, say: Progress) -> Compiled:
    """Run the passes, plan memory and generate the kernels: all that does not touch weights."""
    report, dump = Report(), Dump()
    blocks = -(-model.max_model_len // options.block_tokens)
    say("running passes")
    graph = lower(model.graph, Options(DTYPES[options.dtype], PACKING, options.block_tokens, options.max_tokens,
                                       options.max_seqs, blocks), report, dump)
    plan = plan_memory(graph)
    selection = select_kernels(plan)
    say(f"generating {len(selection.sources)} kernels for {len(selection.calls)} calls a step ({chip.name})")
    return Compiled(graph, plan, selection, compile_kernels(selection.sources, chip), report, dump)


def _write(folder: Path, model: TracedModel, chip: Chip, options: BuildOptions, compiled: Compiled) -> m.Manifest:
    for name in ("kernels", "weights", "tokenizer", "ir"):
        (folder / name).mkdir()
    (folder / m.KERNELS_FILE).write_bytes(compiled.module.data)
    for name, path in sorted(model.tokenizer_files.items()):
        shutil.copyfile(path, folder / "tokenizer" / name)
    for number, (name, graph) in enumerate(compiled.dump.graphs):
        (folder / "ir" / f"{number:02d}-{name}.txt").write_text(print_graph(graph))
    (folder / "ir" / "report.json").write_text(json.dumps(compiled.report.to_json(), indent=1) + "\n")
    offset = _write_weights(folder / WEIGHTS_FILE, model, compiled)
    return _manifest(model, chip, options, compiled, offset)


def _write_weights(path: Path, model: TracedModel, compiled: Compiled) -> int:
    """Stream the packed weights into one file; returns where its data section starts."""
    sources = {p.value: p.source for p in compiled.graph.params}
    entries = []
    for number, value in enumerate(compiled.plan.weights):
        if not isinstance(value.type, TensorType):
            raise TypeError(value)
        name, itemsize = _STORED[value.type.dtype]
        size = tensor_bytes(value.type) // itemsize
        shape = [int(str(d)) for d in value.type.shape] if value.type.max_size == size else [size]
        entries.append((f"{number:05d}.{_weight_name(compiled.graph, value, sources)}", name, shape))
    safetensors.write(path, entries, weight_buffers(compiled.graph, compiled.plan.weights, model.weights.load,
                                                    tensor_bytes))
    return safetensors.read_header(path).data_offset


def _weight_name(graph: Graph, value: Value, sources: dict[Value, str]) -> str:
    """The checkpoint tensors that a weight is made of, joined."""
    made_by, names, todo = graph.producers(), dict[str, None](), [value]
    while todo:
        at = todo.pop(0)
        if at in sources:
            names[sources[at].removeprefix("buffer:")] = None
        elif at in made_by:
            todo += [v for v in made_by[at].operands if v is not None]
    return "+".join(names)[:200]


def _manifest(model: TracedModel, chip: Chip, options: BuildOptions, compiled: Compiled, data_offset: int) -> m.Manifest:
    plan = compiled.plan
    blocks = -(-model.max_model_len // options.block_tokens)
    dims = m.Dims(options.max_tokens, options.max_seqs, options.max_seqs, blocks)
    logits = plan.places[compiled.graph.outputs[0]]
    kernels = tuple(m.Kernel(k.symbol, k.kind, loc, m.Grid(k.grid.dim, k.grid.tile, k.grid.mult))
                    for k, loc in zip(compiled.module.kernels, compiled.selection.locations, strict=True))
    calls = []
    for call in compiled.selection.calls:
        args = compiled.module.kernels[call.kernel].args
        calls.append(m.Call(call.kernel, tuple(_arg(a, call.places) for a in args)))
    layers = tuple(m.StateLayer(plan.places[v].offset, v.type.heads, v.type.k_dim, v.type.v_dim)
                   for v in plan.states if isinstance(v.type, StateType))
    state = m.State(options.block_tokens, plan.bytes_per_block,
                    (m.StateGroup("kv", "paged_kv", layers, str(DTYPES[options.dtype])),))
    return m.Manifest(
        schema=m.SCHEMA, abi=m.ABI,
        versions={"inferloom": version("inferloom"), **{t: version(t) for t in _TOOLS}, "numpy": np.__version__,
                  "python": platform.python_version()},
        model=m.ModelInfo(model.name, model.architecture, model.vocab_size, model.max_model_len, model.eos_token_ids,
                          model.bos_token_id, "bf16" if options.dtype == "bf16" else "fp32"),
        chip=m.Chip(chip.name, chip.triple, chip.requires), dims=dims, state=state,
        memory=m.Memory(plan.weight_bytes, plan.workspace, m.inputs_layout(dims)[1], plan.bytes_per_block),
        output=m.Output("logits", logits.offset, logits.ld, model.vocab_size), kernels=kernels, plan=tuple(calls),
        weights=m.WeightsInfo(WEIGHTS_FILE, data_offset, plan.weight_bytes),
        numerics={"accumulate": "f32", "reduction_order": "sequential over k, independent of the batch",
                  "matmul_inputs": str(DTYPES[options.dtype]), "bf16_dot": chip.bf16_dot},
        files={})


def _arg(arg: int | str, places: tuple[Placement, ...]) -> m.Arg:
    if isinstance(arg, str):
        return m.Arg("input", name=arg)  # type: ignore[arg-type]
    place = places[arg]
    if place.space == "input":
        return m.Arg("input", name=place.name)  # type: ignore[arg-type]
    return m.Arg(place.space, offset=place.offset)  # type: ignore[arg-type]
