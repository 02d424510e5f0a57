"""lower-attention: spell out each `attention` through its variants.

Before: `%o = attention %q, %k, %v {scale=0.125, slot=0, softcap=0.0, window=64, ...}`
After:  `%o = flex_attention %q, %k, %v {scale=0.125, slot=0, score=score, visible=(and (le k_pos q_pos)
        (lt (sub q_pos k_pos) 64)), first=(max (sub q_pos 63) 0), last=q_pos, sink=-1}`

What variants ask the runtime about a query (`spec.FACTS`) becomes an input i32[tokens] of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inferloom.compiler.attention import FACTS, VARIANTS, AttentionSpec, Load, Variant
from inferloom.compiler.report import Report
from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.expr import Var
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.types import DType, TensorType

NAME = "lower-attention"
_COMMON = frozenset({"scale", "slot", "v_dim"})
_TOKEN = Var("token")


def run(graph: Graph, report: Report, more: Sequence[Variant] = ()) -> Graph:
    """`more` variants come after the built-in ones."""
    declared = ops.get("attention")
    variants = (*VARIANTS, *more)
    known = _COMMON.union(*(v.consumes for v in variants))
    tokens = next((v.type.shape for v in graph.inputs if v.name == "tokens" and isinstance(v.type, TensorType)), ())
    facts = {fact: Value(TensorType(DType.I32, tokens), fact.name) for fact in FACTS}
    asked: dict[Var, Value] = {}

    def answer(spec: AttentionSpec) -> AttentionSpec:
        """`spec` with its facts loaded from inputs."""
        for fact in FACTS:
            if fact.name in spec.visible.variables() | spec.score.variables() | spec.first.variables() | spec.last.variables():
                spec, table = spec.with_table(asked.setdefault(fact, facts[fact]))
                load = Load(table, _TOKEN)
                spec = replace(spec, **{name: getattr(spec, name).substitute(fact, load)
                                        for name in ("visible", "score", "first", "last")})
        return spec

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        if node.op != "attention":
            return None
        if node.attrs["variant"] not in ("causal", *(v.name for v in more)):
            raise UnsupportedError(f"{node.loc}: no pass gives meaning to attention variant {node.attrs['variant']!r}")
        for name, spec in declared.attrs.items():
            if name not in known and node.attrs[name] != spec.default:
                raise UnsupportedError(f"{node.loc}: no attention variant consumes {name}={node.attrs[name]!r}")
        meaning = AttentionSpec()
        for variant in variants:
            changed = variant.apply(node, operands, meaning)
            if changed != meaning:
                report.fused(f"attention slot {node.attrs['slot']}: {variant.name}", node.loc)
            meaning = changed
        meaning = answer(meaning)
        lowered = builder.emit_node(
            "flex_attention", (*operands[:3], *meaning.tables),
            {"scale": node.attrs["scale"], "slot": node.attrs["slot"], "v_dim": node.attrs["v_dim"], "score": meaning.score,
             "visible": meaning.visible, "first": meaning.first, "last": meaning.last, "sink": meaning.sink,
             "block": meaning.block, "blocks": meaning.blocks}, node.loc)
        return lowered.results

    # Which are asked is only known after the walk.
    lowered = rewrite(graph, visit)
    return replace(lowered, inputs=(*lowered.inputs, *asked.values()))
