"""Build: a model and a chip become an artifact directory."""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.compiler import plugins
from inferloom.compiler.attention import FACTS
from inferloom.compiler.frontends import huggingface
from inferloom.compiler.frontends.huggingface import TracedModel
from inferloom.compiler.frontends.paths import is_gguf, is_onnx
from inferloom.compiler.frontends.pooling import check_pooling
from inferloom.compiler.kernels import Selection, select_kernels
from inferloom.compiler.passes.pack_weights import Packing
from inferloom.compiler.pipeline import Dump, Options, lower
from inferloom.compiler.plan import Placement, Plan, Rows, align, plan_memory, row_elements, tensor_bytes
from inferloom.compiler.plugins import Plugin
from inferloom.compiler.quantization.keep import keep
from inferloom.compiler.quantization.recipe import Recipe, recipe
from inferloom.compiler.quantization.scheme import Scheme
from inferloom.compiler.report import Report
from inferloom.compiler.state import Place
from inferloom.compiler.task import Task, check_task, for_task
from inferloom.compiler.weights import weight_buffers
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.text import print_graph
from inferloom.ir.types import DType, RecurrentType, StateType, TensorType
from inferloom.runtime import manifest as m
from inferloom.runtime import safetensors
from inferloom.runtime.artifact import seal
from inferloom.runtime.publish import publish, staging
from inferloom.targets.base import OUTPUT, CompiledModule, Logits, Scratch, Target
from inferloom.targets.chips import find
from inferloom.targets.select import target_for

Progress = Callable[[str], None]
DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16}
KV_DTYPES = {"bf16": DType.BF16, "int8": DType.I8, "fp8": DType.F8}
WEIGHTS_FILE = "weights/model.safetensors"
_STORED = {DType.F32: ("F32", 4), DType.F16: ("F16", 2), DType.BF16: ("BF16", 2), DType.I32: ("I32", 4),
           DType.I8: ("I8", 1), DType.U8: ("U8", 1)}
_TOOLS = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Limits of an artifact: tokens and sequences of one step, tokens of one sequence and of one block.

    `batch_invariant`: a sequence's bits do not depend on its batch (always so on CPUs; slower on GPUs). `kv_dtype`: what
    keys and values are kept in, if not in `dtype`. `given`: options as the user wrote them, for the manifest. `task`: what a
    step gives, see compiler/task.py; `pooling` and `normalize` of an artifact that embeds, None for what the checkpoint says.
    """

    dtype: str = "bf16"
    max_model_len: int | None = None
    max_tokens: int = 2048
    max_seqs: int = 64
    block_tokens: int = 32
    batch_invariant: bool = False
    plugins: tuple[Plugin, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    kv_dtype: str | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    task: Task = "generate"
    pooling: str | None = None
    normalize: bool | None = None

    @property
    def max_rows(self) -> int:
        """Rows that a step gives: logits of a token of each sequence, or hidden states of all tokens."""
        return self.max_seqs if self.task == "generate" else self.max_tokens

    def check(self, target: Target) -> None:
        """UnsupportedError on a dtype or a quantisation that the target lacks, or a limit that makes no sense."""
        if self.dtype not in target.lowering.dtypes:
            raise UnsupportedError(f"dtype {self.dtype!r} is not supported for {target.chip.name}; choose from: "
                                   f"{', '.join(target.lowering.dtypes)}")
        for scheme in self.recipe.schemes:
            if (scheme.format, scheme.activations) not in target.lowering.quantized:
                raise UnsupportedError(f"quantisation {scheme.name} is not supported for {target.chip.name}" + (
                    "; it has kernels for " + ", ".join(f"{w} weights with {a} activations" for w, a in
                                                       sorted(target.lowering.quantized)) if target.lowering.quantized
                    else ": compile without it"))
        if self.kv_dtype not in (None, self.dtype, *target.lowering.kv_dtypes):
            raise UnsupportedError(f"kv_dtype {self.kv_dtype!r} is not supported for {target.chip.name}; choose from: "
                                   f"{', '.join(dict.fromkeys([self.dtype, *target.lowering.kv_dtypes]))}")
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise UnsupportedError(f"block_tokens={self.block_tokens} must be a positive multiple of 16")
        for name in ("max_tokens", "max_seqs"):
            if getattr(self, name) < 1:
                raise UnsupportedError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise UnsupportedError(f"max_model_len={self.max_model_len} must be at least 1")
        if self.task == "generate" and (self.pooling is not None or self.normalize is not None):
            raise UnsupportedError("pooling and normalize are of embeddings: they go with --task embed")
        if self.pooling is not None:
            check_pooling(None, self.pooling, self.normalize)


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
                  block_tokens: int = 32, batch_invariant: bool = False, passes: Sequence[str] = (),
                  quant: str | None = None, quant_head: str | None = None, quant_embedding: str | None = None,
                  quant_activations: str | None = None, kv_dtype: str | None = None, task: str = "generate",
                  pooling: str | None = None, normalize: bool | None = None, progress: Progress | None = None) -> Path:
    """Compile a checkpoint directory, an ONNX file (or a `TracedModel`) for a chip into the artifact directory `out`.

    `passes` are files or names as compiler/plugins.py knows them; `quant` and its like are those of
    compiler/quantization/recipe.py.
    An artifact that stands there is replaced, and nothing of it is left half written. Raises UnsupportedError
    for a model, chip or option that cannot be compiled.
    """
    say = progress or (lambda message: None)
    given = {name: value for name, value in (
        ("quant", quant), ("quant_head", quant_head), ("quant_embedding", quant_embedding),
        ("quant_activations", quant_activations), ("kv_dtype", kv_dtype)) if value is not None}
    options = BuildOptions(dtype, max_model_len, max_tokens, max_seqs, block_tokens, batch_invariant, plugins.load(passes),
                           recipe(quant, quant_head, quant_embedding, quant_activations), kv_dtype, given, check_task(task),
                           pooling, normalize)
    target = target_for(find(chip), batch_invariant)
    options.check(target)
    say("tracing the model")
    model = (_for_task(model_or_path, options.task) if isinstance(model_or_path, TracedModel)
             else load(model_or_path, max_model_len, options.task))
    embedding = m.Embedding(*check_pooling(model.embedding, pooling, normalize)) if task == "embed" else m.Embedding()
    for note in model.notes:
        say(f"note: {note}")
    compiled = compile_graph(model, target, options, say)
    say(f"packing {compiled.plan.weight_bytes / 1e6:.0f} MB of weights")
    final = Path(out)
    with staging(final) as folder:
        manifest = replace(_write(folder, model, target, options, compiled), embedding=embedding)
        say("hashing and sealing")
        seal(folder, manifest)
        publish(folder, final)
    return final


def load(path: str | Path, max_model_len: int | None = None, task: Task = "generate") -> TracedModel:
    """The model at a path, by the front end that reads it."""
    if is_gguf(Path(path)):
        from inferloom.compiler.frontends.gguf import loader as gguf

        return gguf.load(path, max_model_len, task)
    if not is_onnx(Path(path)):
        return huggingface.load(path, max_model_len, task)
    from inferloom.compiler.frontends.onnx import loader  # the onnx package is an extra of its own

    return _for_task(loader.load(path, max_model_len), task)


def _for_task(model: TracedModel, task: Task) -> TracedModel:
    return replace(model, graph=for_task(model.graph, task))


def compile_graph(model: TracedModel, target: Target, options: BuildOptions, say: Progress) -> Compiled:
    """Run the passes, plan memory and generate the kernels: all that does not touch weights."""
    report, dump = Report("front-end"), Dump()
    for note in model.notes:
        report.fused(note)
    blocks = -(-model.max_model_len // options.block_tokens)
    say("running passes")
    wanted = target.lowering
    packing = Packing(wanted.weight_tile, wanted.weight_k_multiple, dict(wanted.weight_pair))
    stored, kept = keep(None if options.recipe.unpack else model.quantized, wanted.quantized,
                        options.recipe.activations)
    for note in kept:
        say(f"note: {note}")
        report.fused(note)
    graph = lower(model.graph, Options(DTYPES[options.dtype], packing, wanted.gate_columns, wanted.prologue,
                                       options.block_tokens, options.max_tokens, options.max_seqs, blocks,
                                       options.plugins, wanted.inputs.get(DTYPES[options.dtype]),
                                       replace(options.recipe, stored=stored), KV_DTYPES.get(options.kv_dtype or ""),
                                       options.max_rows),
                  report, dump)
    plan = plan_memory(graph, Rows(wanted.row_align, wanted.avoid))
    selection = select_kernels(plan)
    say(f"generating {len(selection.sources)} kernels for {len(selection.calls)} calls a step ({target.chip.name})")
    place = plan.places[graph.outputs[0]]
    logits = Logits(options.max_rows, model.vocab_size, place.ld) if options.task == "generate" else None
    return Compiled(graph, plan, selection, target.compile_kernels(selection.sources, logits, say), report, dump)


def _write(folder: Path, model: TracedModel, target: Target, options: BuildOptions, compiled: Compiled) -> m.Manifest:
    for name in ("kernels", "weights", "tokenizer", "ir"):
        (folder / name).mkdir()
    for name, data in sorted(compiled.module.files.items()):
        (folder / name).write_bytes(data)
    for name, content in sorted(model.tokenizer_files.items()):
        made = folder / "tokenizer" / name
        if isinstance(content, bytes):
            made.write_bytes(content)
        else:
            shutil.copyfile(content, made)
    for number, (name, graph) in enumerate(compiled.dump.graphs):
        (folder / "ir" / f"{number:02d}-{name}.txt").write_text(print_graph(graph))
    (folder / "ir" / "report.json").write_text(json.dumps(compiled.report.to_json(), indent=1) + "\n")
    offset = _write_weights(folder / WEIGHTS_FILE, model, compiled)
    return describe(model, target, options, compiled, offset)


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
                                                    tensor_bytes, model.quantized.get if model.quantized else None))
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


def describe(model: TracedModel, target: Target, options: BuildOptions, compiled: Compiled,
             data_offset: int) -> m.Manifest:
    plan, module, chip = compiled.plan, compiled.module, target.chip
    scratch = align(plan.workspace, 256)  # tensor descriptors lie on 128 bytes
    blocks = -(-model.max_model_len // options.block_tokens)
    facts = tuple(fact.name for fact in FACTS if fact.name in {v.name for v in compiled.graph.inputs})
    dims = m.Dims(options.max_tokens, options.max_seqs, options.max_rows, blocks, facts)  # type: ignore[arg-type]
    logits = plan.places[compiled.graph.outputs[0]]
    width = row_elements(compiled.graph.outputs[0].type)  # type: ignore[arg-type]
    tiles = m.Tiles(*module.tiles)
    kernels = tuple(m.Kernel(k.symbol, k.kind, compiled.selection.locations[k.source] if k.source >= 0 else (),
                             m.Grid(k.grid.dim, k.grid.tile, k.grid.mult),
                             m.Launch(*astuple(k.launch)) if k.launch is not None else None, dict(k.resources))
                    for k in module.kernels)
    by_source = [[i for i, k in enumerate(module.kernels) if k.source == s] for s in range(len(compiled.selection.sources))]
    calls = [m.Call(i, tuple(_arg(a, call.places, scratch, logits) for a in module.kernels[i].args))
             for call in compiled.selection.calls for i in by_source[call.kernel]]
    calls += [m.Call(i, tuple(_arg(a, (), scratch, logits) for a in k.args)) for i, k in enumerate(module.kernels)
              if k.source < 0]
    top, sums = None, module.top.sums if module.top else None
    if module.top is not None:
        top = m.Top(module.top.count, scratch + module.top.keys, scratch + module.top.stats,
                    m.Sums(scratch + sums.offset, sums.count, sums.columns) if sums else None)
    groups = tuple(m.StateGroup(g.kind, g.window, len(g.tables), tuple(  # type: ignore[arg-type]
        _layer(plan.states[i], plan.state.places[i], g.tables[0]) for i in g.members)) for g in plan.state.groups)
    state = m.State(options.block_tokens, plan.bytes_per_block, groups)
    return m.Manifest(
        schema=m.SCHEMA, abi=m.ABI,
        versions={"inferloom": version("inferloom"), **{t: version(t) for t in (*_TOOLS, *target.tools)}, "numpy": np.__version__,
                  "python": platform.python_version()},
        model=m.ModelInfo(model.name, model.architecture, model.vocab_size, model.max_model_len, model.eos_token_ids,
                          model.bos_token_id, options.dtype),  # type: ignore[arg-type]
        chip=m.Chip(chip.name, chip.triple, chip.requires, chip.driver, chip.arch),  # type: ignore[arg-type]
        dims=dims, tiles=tiles, state=state,
        memory=m.Memory(plan.weight_bytes, scratch + module.scratch, m.inputs_layout(dims, tiles, state)[1],
                        plan.bytes_per_block),
        output=m.Output("logits" if options.task == "generate" else "hidden", logits.offset, logits.ld, width, top),
        kernels=kernels, plan=tuple(calls),
        weights=m.WeightsInfo(WEIGHTS_FILE, data_offset, plan.weight_bytes),
        numerics={**target.numerics(), "matmul_inputs": str(DTYPES[options.dtype]), **_quantization(compiled.graph),
                  **({"options": dict(options.given)} if options.given else {}),
                  **({"passes": ", ".join(f"{p.name} {p.digest}" for p in options.plugins)} if options.plugins else {})},
        files={}, task=options.task)


def _quantization(graph: Graph) -> dict[str, dict[str, int]]:
    """How many weights of an artifact are in which scheme, for the manifest."""
    counts: Counter[str] = Counter()
    for kernel in graph.nodes:
        body = kernel.attrs.get("body")
        for node in body.nodes if isinstance(body, Graph) else ():
            attrs, place = node.attrs, {"packed_quantized_linear": 5, "quantized_embedding": 3,
                                                  "packed_quantized_expert_linear": 3}.get(node.op)
            if place is not None:
                symmetric = len(node.operands) <= place or node.operands[place] is None
                integers = node.op == "packed_quantized_linear" and node.operands[1] is not None
                scheme = Scheme(attrs["format"], attrs["group"], symmetric, "int8" if integers else "none")  # type: ignore[arg-type]
                counts[scheme.name] += 1
    return {"quantized_weights": dict(sorted(counts.items()))} if counts else {}


def _layer(value: Value, place: Place, first: int) -> m.StateLayer:
    type = value.type
    if isinstance(type, StateType):
        return m.StateLayer(place.table - first, place.offset, type.bytes_per_block, str(type.dtype),
                            (type.heads, type.k_dim, 0 if type.latent else type.v_dim))
    if isinstance(type, RecurrentType):
        return m.StateLayer(place.table - first, place.offset, type.bytes, str(type.dtype), type.shape)
    raise TypeError(value)


def _arg(arg: int | str | Scratch, places: tuple[Placement, ...], scratch: int, logits: Placement) -> m.Arg:
    if isinstance(arg, Scratch):
        return m.Arg("workspace", offset=scratch + arg.offset)
    if arg == OUTPUT:
        return m.Arg("workspace", offset=logits.offset)
    if isinstance(arg, str):
        return m.Arg("input", name=arg)  # type: ignore[arg-type]
    place = places[arg]
    if place.space == "input":
        return m.Arg("input", name=place.name)  # type: ignore[arg-type]
    return m.Arg(place.space, offset=place.offset)  # type: ignore[arg-type]
