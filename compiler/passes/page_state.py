"""page-state: make what layers keep between steps explicit.

Before: `%o = flex_attention %q, %k, %v {slot=0, ...}`
After:  `%s1 = kv_write %state0, %k, %v, %slots; %o = paged_attention %q, %s1, %seq_starts, %kv_lens, %block_tables {...}`

Where queries choose blocks of keys, these have their means beside them:
After:  `%m1 = block_means %means0, %s1, ...; %b = block_scores %q, %m1, ...; %t, %c = topk %b; %o = paged_attention
        %q, %s1, ..., %c {chosen=0}`

Before: `%y = causal_conv1d %x, %w {slot=1}`
After:  `%y, %s1 = paged_causal_conv1d %state1, %seq_starts, %kv_lens, %pages, %x, %w`

The graph gains the inputs slots, seq_starts, kv_lens, block_tables, pages (those it needs) and one state per slot, and
returns the new states after its outputs. Where states lie in several tables (compiler/state.py), the inputs of table 1
are slots1 and block_tables1, and so on. Keys that no later query can see are not kept: that window is what the largest
distance between a query and the first key it sees makes it. Attentions over the same keys and values share one state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from inferloom.compiler.report import Report
from inferloom.compiler.state import need, plan_state, widest, window_of
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.ops.recurrent import PAGED as PAGED_OP
from inferloom.ir.ops.recurrent import STATE_OF
from inferloom.ir.types import DType, RecurrentType, StateType, Sym, TensorType

NAME = "page-state"


def run(graph: Graph, report: Report, *, dtype: DType, block_tokens: int, seqs: int, blocks_per_seq: int) -> Graph:
    stateful = [n for n in graph.nodes if n.op == "flex_attention" or n.op in STATE_OF]
    if len({slot_of(n) for n in stateful}) != len(stateful):
        raise UnsupportedError(f"two layers claim one state slot: {', '.join(n.loc for n in stateful)}")
    owners = _owners(stateful, report)
    types = {slot_of(n): _state_type(n, dtype, block_tokens) for n in stateful if owners[slot_of(n)] == slot_of(n)}
    longest, windows = block_tokens * blocks_per_seq, dict[int, int]()
    for node in (n for n in stateful if n.op == "flex_attention"):
        owner, window = owners[slot_of(node)], window_of(node.attrs["first"], longest)
        windows[owner] = widest(window, windows.get(owner, window))
    order = sorted(types)
    choosing = [n for n in stateful if n.attrs.get("blocks") and slot_of(n) in types]
    means = {slot_of(n): Value(_means_type(n, types[slot_of(n)], windows), f"means{slot_of(n)}") for n in choosing}
    placed = plan_state([*(need(types[slot], windows.get(slot, 0)) for slot in order),
                         *(need(v.type, by_block=True) for v in means.values())])  # type: ignore[arg-type]
    means_table = {slot: placed.places[len(order) + i].table for i, slot in enumerate(means)}
    table = {slot: placed.places[i].table for i, slot in enumerate(order)}
    tokens = next(v.type.shape[0] for v in graph.inputs if v.name == "tokens" and isinstance(v.type, TensorType))
    inputs = _Inputs(Sym("seqs", seqs))
    states = {slot: Value(types[slot], f"state{slot}") for slot in order}
    written: list[Value] = []
    kept, summed = dict[int, Value](), dict[int, Value]()

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        if node.op != "flex_attention" and node.op not in STATE_OF:
            return None
        slot = owners[slot_of(node)]
        attrs = {name: value for name, value in node.attrs.items() if name not in ("slot", "v_dim", "block", "blocks")}
        if node.op in STATE_OF:
            pages = inputs.get("pages", table[slot], (inputs.seqs, 2))
            made = builder.emit_node(PAGED_OP + node.op, (states[slot], *inputs.ragged(), pages, *operands), attrs, node.loc)
            written.append(made.results[1])
            return made.results[:1]
        q, k, v, *extra = operands
        if slot not in kept:
            slots = inputs.get("slots", table[slot], (tokens,))
            kept[slot] = builder.emit("kv_write", states[slot], k, v, slots, loc=node.loc)
            written.append(kept[slot])
        tables = inputs.get("block_tables", table[slot], (inputs.seqs, blocks_per_seq))
        if slot in means:
            own = inputs.get("block_tables", means_table[slot], (inputs.seqs, blocks_per_seq))
            if slot not in summed:
                summed[slot] = builder.emit("block_means", means[slot], kept[slot], *inputs.ragged(), tables, own, loc=node.loc)
                written.append(summed[slot])
            scores = builder.emit("block_scores", q, summed[slot], *inputs.ragged(), own, block=block_tokens, loc=node.loc)
            most = min(int(str(node.attrs["blocks"])) + 1, blocks_per_seq)
            extra.append(builder.emit_node("topk", [scores], {"k": most}, node.loc).results[1])
            attrs["chosen"] = len(extra) - 1
        return builder.emit_node("paged_attention", (q, kept[slot], *inputs.ragged(), tables, *extra), attrs,
                                 node.loc).results

    # Inputs are only known after the walk, and the walk maps only known inputs, so they are added at the end.
    paged = rewrite(graph, visit)
    return Graph(graph.name, (*paged.inputs, *inputs.made.values(), *states.values(), *means.values()), paged.params, paged.nodes,
                 (*paged.outputs, *written))


@dataclass(slots=True)
class _Inputs:
    """The step's inputs that say where state lies, made when first asked for."""

    seqs: Sym
    made: dict[str, Value] = field(default_factory=dict)

    def get(self, name: str, table: int, shape: tuple[object, ...]) -> Value:
        name = f"{name}{table or ''}"
        return self.made.setdefault(name, Value(TensorType(DType.I32, shape), name))  # type: ignore[arg-type]

    def ragged(self) -> tuple[Value, Value]:
        return self.get("seq_starts", 0, (self.seqs + 1,)), self.get("kv_lens", 0, (self.seqs,))


def _owners(stateful: Sequence[Node], report: Report) -> dict[int, int]:
    """For each slot, the one whose state it reads: its own, or that of an earlier attention over the same keys and values."""
    first: dict[object, int] = {}
    owners = {}
    for node in stateful:
        slot = slot_of(node)
        key: object = node
        if node.op == "flex_attention":
            key = (*node.operands[1:3], node.attrs["v_dim"], bool(node.attrs["blocks"]))
        owners[slot] = first.setdefault(key, slot)
        if owners[slot] != slot:
            report.fused(f"attention slot {slot} reads the state of slot {owners[slot]}", node.loc)
    return owners


def _means_type(node: Node, state: StateType | RecurrentType, windows: dict[int, int]) -> RecurrentType:
    """Means of blocks of keys. UnsupportedError where blocks of the cache are none to choose from."""
    block = node.attrs["block"]
    if not isinstance(state, StateType) or state.latent or windows.get(slot_of(node)):
        raise UnsupportedError(f"{node.loc}: blocks can only be chosen from keys and values that are all kept")
    if block != state.block_tokens:
        raise UnsupportedError(f"{node.loc}: chosen blocks have {block} keys, those of the cache {state.block_tokens} tokens: "
                               f"compile with block_tokens={block}")
    return RecurrentType(DType.F32, (state.heads, state.k_dim))


def slot_of(node: Node) -> int:
    return int(str(node.attrs["slot"]))


def _state_type(node: Node, dtype: DType, block_tokens: int) -> StateType | RecurrentType:
    if node.op in STATE_OF:
        attrs = {name: value for name, value in node.attrs.items() if name != "slot"}
        return STATE_OF[node.op](*(None if v is None else v.type for v in node.operands), **attrs)
    (_, heads, k_dim), v = _shape(node.operands[1]), node.operands[2]
    v_dim = _shape(v)[2] if v is not None else int(str(node.attrs["v_dim"]))
    return StateType(dtype, heads, k_dim, v_dim, block_tokens, latent=v is None)


def _shape(value: Value | None) -> tuple[int, int, int]:
    shape = value.type.shape if value is not None and isinstance(value.type, TensorType) else ()
    if len(shape) != 3 or not isinstance(shape[1], int) or not isinstance(shape[2], int):
        raise UnsupportedError(f"keys and values must be [tokens, heads, dim], got {value!r}")
    return 0, shape[1], shape[2]
