"""page-state: make each attention's keys and values explicit, paged state.

Before: `%o = flex_attention %q, %k, %v {slot=0, ...}`
After:  `%s1 = kv_write %kv0, %k, %v, %slots; %o = paged_attention %q, %s1, %seq_starts, %kv_lens, %block_tables {...}`

The graph gains the inputs slots, seq_starts, kv_lens, block_tables and one state per attention, and returns the
new states after its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferloom.compiler.report import Report
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph, Node, Value, rewrite
from inferloom.ir.types import DType, StateType, Sym, TensorType

NAME = "page-state"


def run(graph: Graph, report: Report, *, dtype: DType, block_tokens: int, seqs: int, blocks_per_seq: int) -> Graph:
    tokens = next(v.type.shape[0] for v in graph.inputs if v.name == "tokens" and isinstance(v.type, TensorType))
    seq = Sym("seqs", seqs)
    slots = Value(TensorType(DType.I32, (tokens,)), "slots")
    seq_starts = Value(TensorType(DType.I32, (seq + 1,)), "seq_starts")
    kv_lens = Value(TensorType(DType.I32, (seq,)), "kv_lens")
    block_tables = Value(TensorType(DType.I32, (seq, blocks_per_seq)), "block_tables")
    states: dict[int, Value] = {}
    written: list[Value] = []

    def visit(builder: Builder, node: Node, operands: tuple[Value | None, ...]) -> Sequence[Value] | None:
        if node.op != "flex_attention":
            return None
        q, k, v, *tables = operands
        slot = int(str(node.attrs["slot"]))
        if slot in states or not isinstance(k, Value) or not isinstance(v, Value):
            raise UnsupportedError(f"{node.loc}: two attentions claim state slot {slot}")
        (_, heads, k_dim), (_, _, v_dim) = _shape(k), _shape(v)
        states[slot] = Value(StateType(dtype, heads, k_dim, v_dim, block_tokens), f"kv{slot}")
        new = builder.emit("kv_write", states[slot], k, v, slots, loc=node.loc)
        written.append(new)
        attrs = {name: value for name, value in node.attrs.items() if name != "slot"}
        return builder.emit_node("paged_attention", (q, new, seq_starts, kv_lens, block_tables, *tables), attrs,
                                 node.loc).results

    # Inputs are only known after the walk, and the walk maps only known inputs, so they are added at the end.
    paged = rewrite(graph, visit)
    added = (slots, seq_starts, kv_lens, block_tables) if states else ()
    return Graph(graph.name, (*paged.inputs, *added, *(states[s] for s in sorted(states))), paged.params,
                 paged.nodes, (*paged.outputs, *written))


def _shape(value: Value) -> tuple[int, int, int]:
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    if len(shape) != 3 or not isinstance(shape[1], int) or not isinstance(shape[2], int):
        raise UnsupportedError(f"keys and values must be [tokens, heads, dim], got {value.type}")
    return 0, shape[1], shape[2]
