"""quantize: linear layers and embeddings over weights of few bits.

Before: `%y = linear %x, %w, %b`
After:  `%v, %s = quantize_weight %w {format="int8"}; %q, %t, %u = quantize_rows %x;
         %y = quantized_linear %q, %t, %u, %v, %s, _, %b`

Weights that a checkpoint stores quantised keep their integers, also where merge-linear has joined several: a concatenation
of rows of one scheme is a weight of that scheme. What is left as it is, and why, stands in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inferloom.compiler.quantization.recipe import Recipe
from inferloom.compiler.quantization.rows import row_sources
from inferloom.compiler.quantization.scheme import GROUPS, Scheme
from inferloom.compiler.report import Report
from inferloom.compiler.rewrite import tensor
from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite

NAME = "quantize"
#: Fewer rows or columns are no work worth the rounding.
LEAST = 32
#: Rows of an expert's weight fill tiles of so many, which then hold one expert's each.
EXPERT_ROWS = 64
#: What may stand between a router's logits and the choice of experts, besides pointwise ops.
_BETWEEN = frozenset({"reshape", "slice", "sum", "max", "mean", "take", "expand"})


def run(graph: Graph, report: Report, *, recipe: Recipe) -> Graph:
    return _Quantizer(graph, report, recipe).run() if recipe.active else graph


class _Quantizer:
    def __init__(self, graph: Graph, report: Report, recipe: Recipe) -> None:
        self.graph, self.report, self.recipe = graph, report, recipe
        self.constants, self.producers = graph.constants(), graph.producers()
        self.sources = {p.value: p.source for p in graph.params}
        chosen = [v for n in graph.nodes if n.op == "topk" for v in n.operands]
        self.routers = _linears_before(chosen, self.producers)
        self.heads = _linears_before(graph.outputs, self.producers)
        self.tied = {n.operands[1] for n in self.heads} & {n.operands[1] for n in graph.nodes if n.op == "embedding"}
        self.schemes = {n: s for n in graph.nodes if (s := self._scheme(n)) is not None}
        self.stacked: dict[Value, Value] = {}
        self.weights: dict[Value, Sequence[Value]] = {}
        self.rows: dict[tuple[Value, int], Sequence[Value]] = {}

    def run(self) -> Graph:
        return rewrite(self.graph, self._visit) if self.schemes else self.graph

    # -- which scheme

    def _scheme(self, node: Node) -> Scheme | None:
        """The scheme of a linear layer or an embedding, None to leave it; says why."""
        if node.op == "expert_linear":
            return self._experts(node)
        if node.op not in ("linear", "embedding"):
            return None
        weight, what = node.operands[1], "linear layer" if node.op == "linear" else "embedding"
        if weight is None or weight not in self.constants:
            return None
        tied = weight in self.tied
        if node in self.heads or tied:
            what, wanted = "LM head" if node.op == "linear" else "tied embedding", self.recipe.head
        else:
            wanted = self.recipe.linear if node.op == "linear" else self.recipe.embedding
        wanted = self._stored(weight, wanted, node)
        if wanted is None:
            return None
        n, k = (int(str(d)) for d in tensor(weight).shape)
        why = ""
        if node in self.routers:
            why = "it chooses experts"
        elif min(n, k) < LEAST:
            why = f"[{n}, {k}] is too small to matter"
        elif tensor(node.operands[0]).rank != 2 and node.op == "linear":  # type: ignore[arg-type]
            why = "its rows are not those of tokens"
        else:
            wanted, why = self._fitting(wanted, k, node, what)
        if why or wanted is None:
            self.report.skipped(f"quantise {what} [{n}, {k}]", why, node.loc)
            return None
        self.report.fused(f"{what} [{n}, {k}] to {wanted}", node.loc)
        return wanted

    def _experts(self, node: Node) -> Scheme | None:
        """Experts are multiplied by floats, whatever other layers are."""
        wanted, weight, choice = self.recipe.linear, node.operands[1], node.operands[2]
        if wanted is None or weight not in self.constants:
            return None
        experts, n, k = (int(str(d)) for d in tensor(weight).shape)  # type: ignore[arg-type]
        n, k = (k, n) if node.attrs["transposed"] else (n, k)
        what, why = f"{experts} experts [{n}, {k}]", ""
        if not _chosen(choice, self.producers):
            why = "no router chooses them: they are heads of latent attention"
        elif n % EXPERT_ROWS:
            why = f"{n} rows are no multiple of {EXPERT_ROWS}"
        else:
            wanted, why = self._fitting(replace(wanted, activations="none"), k, node, what)
        if why or wanted is None:
            self.report.skipped(f"quantise {what}", why, node.loc)
            return None
        self.report.fused(f"{what} to {wanted}", node.loc)
        return wanted

    def _stored(self, weight: Value, wanted: Scheme | None, node: Node) -> Scheme | None:
        """What the checkpoint says, where it says anything."""
        names = row_sources(weight, self.producers, self.sources)
        schemes = {self.recipe.stored.get(name) for name in names or ()}
        if not schemes or schemes == {None}:
            return wanted
        kept = sorted((s for s in schemes if s is not None), key=lambda s: s.name)
        if len(schemes) == 1:
            return kept[0]
        made = Scheme("int8", min((s.group for s in kept if s.group), default=0), activations=kept[0].activations)
        self.report.skipped("keep the integers that the checkpoint stores", "weights of "
                            f"{', '.join([s.name for s in kept] + ['floats'] * (None in schemes))} were joined; they are "
                            f"rounded to {made}", node.loc)
        return made

    def _fitting(self, wanted: Scheme, k: int, node: Node, what: str) -> tuple[Scheme | None, str]:
        """The scheme with groups that divide rows of k."""
        if not wanted.group or k % wanted.group == 0:
            return wanted, ""
        smaller = [g for g in GROUPS if g < wanted.group and k % g == 0]
        if not smaller:
            return None, f"rows of {k} are not whole groups of {wanted.group}"
        self.report.skipped(f"{what} in groups of {wanted.group}", f"they do not divide {k}: groups of {smaller[-1]}", node.loc)
        return Scheme(wanted.format, smaller[-1], wanted.symmetric, wanted.activations), ""

    # -- the new nodes

    def _visit(self, builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        scheme = self.schemes.get(node)
        if scheme is None:
            return None
        x, weight, *bias = operands
        if node.op == "expert_linear":
            weight = self._rows_of_experts(builder, weight, bool(node.attrs["transposed"]))  # type: ignore[arg-type]
        how = {"format": scheme.format, "group": scheme.group}
        values, scales, offsets = self._weight(builder, weight, scheme)  # type: ignore[arg-type]
        if node.op == "embedding":
            return builder.emit_node("quantized_embedding", (x, values, scales, offsets), how, node.loc).results
        if node.op == "expert_linear":
            n = int(str(tensor(node.result).shape[-1]))
            return builder.emit_node("quantized_expert_linear", (x, values, scales, offsets, *bias), {**how, "n": n},
                                     node.loc).results
        rows: Sequence[Value | None] = (x, None, None)
        if scheme.activations == "int8":
            rows = self._rows(builder, x, scheme.group, node.loc)  # type: ignore[arg-type]
        return builder.emit_node("quantized_linear", (*rows, values, scales, offsets, *bias), how, node.loc,
                                 [v.name for v in node.results]).results

    def _rows_of_experts(self, builder: Builder, weight: Value, transposed: bool) -> Value:
        """All experts' weights as one, [experts * n, k]."""
        if weight not in self.stacked:
            moved = builder.emit("permute", weight, axes=(0, 2, 1)) if transposed else weight
            experts, n, k = (int(str(d)) for d in tensor(moved).shape)
            self.stacked[weight] = builder.emit("reshape", moved, shape=(experts * n, k))
        return self.stacked[weight]

    def _weight(self, builder: Builder, weight: Value, scheme: Scheme) -> tuple[Value, Value, Value | None]:
        if weight not in self.weights:
            self.weights[weight] = builder.emit_node("quantize_weight", (weight,), {
                "format": scheme.format, "group": scheme.group, "symmetric": scheme.symmetric}).results
        values, scales, *offsets = self.weights[weight]
        return values, scales, offsets[0] if offsets else None

    def _rows(self, builder: Builder, x: Value, group: int, loc: str) -> Sequence[Value]:
        if (x, group) not in self.rows:
            self.rows[x, group] = builder.emit_node("quantize_rows", (x,), {"group": group}, loc).results
        return self.rows[x, group]


def _chosen(choice: Value | None, producers: dict[Value, Node]) -> bool:
    """Whether a `topk` is among what makes `choice`."""
    seen, todo = set(), [choice]
    while todo:
        node = producers.get(todo.pop())  # type: ignore[arg-type]
        if node is None or node in seen:
            continue
        if node.op == "topk":
            return True
        seen.add(node)
        todo += node.operands
    return False


def _linears_before(values: Sequence[Value | None], producers: dict[Value, Node]) -> set[Node]:
    """The linear layers that make `values`, with nothing but pointwise ops and moves after them."""
    found, seen, todo = set(), set(), list(values)
    while todo:
        node = producers.get(todo.pop())  # type: ignore[arg-type]
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op == "linear":
            found.add(node)
        elif ops.get(node.op).pointwise or node.op in _BETWEEN:
            todo += [v for v in node.operands if v is not None]
    return found
