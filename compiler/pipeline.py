"""The pipeline: one list of passes, top to bottom, with the reasons for their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from inferloom.compiler.attention import differential, latent
from inferloom.compiler.passes import (
    bind_dims,
    canonicalize,
    cse,
    dce,
    fold_scalars,
    group_kernels,
    lower_attention,
    lower_precision,
    merge_linear,
    pack_weights,
    page_state,
    quantize,
    recognize_activation,
    recognize_norm,
    recognize_rotary,
)
from inferloom.compiler.plugins import Plugin
from inferloom.compiler.quantization.recipe import Recipe
from inferloom.compiler.report import Report
from inferloom.ir.errors import InferloomError
from inferloom.ir.graph import Graph
from inferloom.ir.types import DType
from inferloom.ir.verify import verify

Pass = Callable[[Graph, Report], Graph]


@dataclass(frozen=True, slots=True)
class Options:
    """What the passes need to know of the target and of the artifact to be made."""

    dtype: DType
    packing: pack_weights.Packing
    gate_columns: int
    prologue: bool
    block_tokens: int
    max_tokens: int
    max_seqs: int
    blocks_per_seq: int
    plugins: tuple[Plugin, ...] = ()
    inputs: DType | None = None
    recipe: Recipe = field(default_factory=Recipe)
    kv_dtype: DType | None = None
    max_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A pass in the pipeline: what must hold after it, and why it stands where it does."""

    name: str
    run: Pass
    level: str
    reason: str


@dataclass(slots=True)
class Dump:
    """Graphs after each pass that changed something, for `inspect` and the artifact's `ir/`."""

    graphs: list[tuple[str, Graph]] = field(default_factory=list)


def steps(options: Options) -> tuple[Step, ...]:
    """The passes in order."""
    page = partial(page_state.run, dtype=options.kv_dtype or options.dtype, block_tokens=options.block_tokens,
                   seqs=options.max_seqs, blocks_per_seq=options.blocks_per_seq)
    variants = [p.variant for p in options.plugins if p.variant is not None]
    bounds = {"tokens": options.max_tokens, "rows": options.max_rows or options.max_seqs}
    return (
        Step("bind-dims", partial(bind_dims.run, bounds=bounds), "model", "every later pass sees the artifact's limits"),
        Step("canonicalize", canonicalize.run, "model", "patterns below are written for canonical form"),
        Step("fold-scalars", fold_scalars.run, "model", "patterns match constants, not arithmetic on them"),
        Step("cse", cse.run, "model", "the rotary tables are the same in every layer"),
        Step("recognize-norm", recognize_norm.run, "model", "before merging, which looks at who reads a norm"),
        Step("recognize-rotary", recognize_rotary.run, "model", "needs shared cos and sin"),
        Step("recognize-activation", recognize_activation.run, "model", "merge-linear looks for gated activations"),
        Step("merge-linear", partial(merge_linear.run, gate_columns=options.gate_columns, stored=options.recipe.stored), "model",
             "needs one shared input value, so it follows cse"),
        Step("canonicalize-2", canonicalize.run, "model", "merging leaves slices and reshapes behind"),
        Step("cse-2", cse.run, "model", "recognised ops may have become equal"),
        Step("pair-heads", differential.run, "model", "keys and queries are equal by now where they are the same"),
        Step("dce", dce.run, "model", "what was matched is dead now"),
        *(Step(p.name, p.run, "model", "passes from outside see what was recognised") for p in options.plugins if p.run),
        Step("absorb-latent", latent.run, "model", "looks for the linear that makes keys and values, and nothing else"),
        Step("lower-attention", partial(lower_attention.run, more=variants), "model",
             "variants read the attributes of the traced node"),
        Step("quantize", partial(quantize.run, recipe=options.recipe), "model",
             "after all patterns, which know linear alone; before precision, which casts what stays linear"),
        Step("lower-precision", partial(lower_precision.run, dtype=options.dtype, inputs=options.inputs), "model",
             "after all patterns, which know nothing of casts"),
        Step("page-state", page, "serving", "makes state explicit"),
        Step("pack-weights", partial(pack_weights.run, packing=options.packing), "serving",
             "after precision, which decides what a pair is"),
        Step("dce-2", dce.run, "serving", "unpacked weights are dead now"),
        Step("group-kernels", partial(group_kernels.run, prologue=options.prologue), "kernel",
             "last: kernels are opaque to other passes"),
    )


def lower(graph: Graph, options: Options, report: Report, dump: Dump | None = None) -> Graph:
    """Run all passes, verifying after each; an error says which pass made the bad graph."""
    verify(graph, "model")
    if dump is not None:
        dump.graphs.append(("traced", graph))
    for step in steps(options):
        report.pass_name = step.name
        changed = step.run(graph, report)
        if changed is not graph:
            try:
                verify(changed, step.level)
            except InferloomError as error:
                raise type(error)(f"after pass {step.name}: {error}") from error
            if dump is not None:
                dump.graphs.append((step.name, changed))
        graph = changed
    return graph
