"""Hand-built graphs for tests that need no front end."""

from __future__ import annotations

from typing import Any

import numpy as np

from inferloom.ir.graph import Builder, Graph, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.ops.recurrent import RecurrentArrays
from inferloom.ir.types import STATES, DType, StateType, Sym, TensorType


def tiny_llama(layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2, dim: int = 16, inter: int = 96,
               vocab: int = 131, tied: bool = True, window: int = 0, max_tokens: int = 64,
               gate_columns: int = 32) -> Graph:
    """A Llama-shaped model-level graph, merged and recognised as the passes before paging leave it."""
    b = Builder("tiny")
    f32 = DType.F32
    tokens, rows = Sym("tokens", max_tokens), Sym("rows", 8)
    ids = b.input("tokens", TensorType(DType.I32, (tokens,)))
    positions = b.input("positions", TensorType(DType.I32, (tokens,)))
    wanted = b.input("logit_rows", TensorType(DType.I32, (rows,)))

    def param(name: str, *shape: int) -> Value:
        return b.param(name, TensorType(f32, shape))

    table = param("embed.weight", vocab, hidden)
    h = b.emit("embedding", ids, table, loc="tiny.py:1")
    position = b.emit("cast", positions, dtype=f32)
    angle = b.emit("mul", b.emit("reshape", position, shape=(tokens, 1)), param("buffer:inv_freq", dim // 2))
    cos, sin = b.emit("cos", angle), b.emit("sin", angle)
    for i in range(layers):
        name = f"layers.{i}"
        x = b.emit("rms_norm", h, param(f"{name}.norm1", hidden), eps=1e-5, loc="tiny.py:2")
        width = (heads + 2 * kv_heads) * dim
        qkv = b.emit("linear", x, param(f"{name}.qkv", width, hidden), loc="tiny.py:3")
        parts, start = [], 0
        for count in (heads, kv_heads, kv_heads):
            part = b.emit("slice", qkv, axis=1, start=start, stop=start + count * dim)
            parts.append(b.emit("reshape", part, shape=(tokens, count, dim)))
            start += count * dim
        q, k, v = parts
        q, k = b.emit("rotary", q, cos, sin), b.emit("rotary", k, cos, sin)
        o = b.emit("attention", q, k, v, scale=dim**-0.5, slot=i, window=window if i % 2 else 0, loc="tiny.py:4")
        o = b.emit("reshape", o, shape=(tokens, heads * dim))
        h = b.emit("add", h, b.emit("linear", o, param(f"{name}.o", hidden, heads * dim)), loc="tiny.py:5")
        x = b.emit("rms_norm", h, param(f"{name}.norm2", hidden), eps=1e-5, loc="tiny.py:6")
        halves = [param(f"{name}.{half}", inter, hidden) for half in ("gate", "up")]
        gate_up = b.emit("interleave", *halves, group=gate_columns)
        y = b.emit("reshape", b.emit("linear", x, gate_up), shape=(tokens, inter // gate_columns, 2, gate_columns))
        gate, up = (b.emit("reshape", b.emit("slice", y, axis=2, start=j, stop=j + 1), shape=(tokens, inter))
                    for j in (0, 1))
        x = b.emit("mul", b.emit("silu", gate), up, loc="tiny.py:7")
        h = b.emit("add", h, b.emit("linear", x, param(f"{name}.down", hidden, inter)), loc="tiny.py:8")
    h = b.emit("gather_rows", b.emit("rms_norm", h, param("norm", hidden), eps=1e-5), wanted)
    head = table if tied else param("head.weight", vocab, hidden)
    return b.finish([b.emit("linear", h, head, name="logits", loc="tiny.py:9")])


def random_params(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of modest size, norms around one, inv_freq as rotary wants it."""
    rng = np.random.default_rng(seed)
    made = {}
    for p in graph.params:
        shape = tuple(int(str(d)) for d in p.value.type.shape)  # type: ignore[union-attr]
        if p.source == "buffer:inv_freq":
            made[p.source] = (10000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32)
        elif "norm" in p.source:
            made[p.source] = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            made[p.source] = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
    return made


def paged_inputs(graph: Graph, ids: np.ndarray, done: int, state: dict[str, Any] | None, block_tokens: int,
                 logit_rows: np.ndarray) -> dict[str, object]:
    """Inputs of a serving- or kernel-level graph for one sequence with `done` tokens already in `state`."""
    count = len(ids)
    pos = np.arange(done, done + count, dtype=np.int32)
    inputs: dict[str, object] = {
        "tokens": ids.astype(np.int32), "positions": pos, "logit_rows": logit_rows.astype(np.int32),
        "seq_starts": np.array([0, count], np.int32), "kv_lens": np.array([done + count], np.int32)}
    blocks = 1
    for value in graph.inputs:
        if value.name.startswith("block_tables"):
            columns = int(str(value.type.shape[1]))  # type: ignore[union-attr]
            # Not in order: the table must be read.
            inputs[value.name] = table = np.arange(blocks + columns - 1, blocks - 1, -1, dtype=np.int32)[None]
            slots = table[0][pos // block_tokens] * block_tokens + pos % block_tokens
            inputs[value.name.replace("block_tables", "slots")] = slots.astype(np.int32)
            blocks += columns
    for value in graph.inputs:
        if value.name.startswith("pages"):
            inputs[value.name] = np.full((1, 2), blocks, np.int32)
            blocks += 1
    for value in graph.inputs:
        if isinstance(value.type, STATES):
            kind = KVArrays if isinstance(value.type, StateType) else RecurrentArrays
            inputs[value.name] = state[value.name] if state else kind.zeros(value.type, blocks)  # type: ignore[arg-type]
    return inputs
