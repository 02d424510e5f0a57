"""Paged attention on a device: a work-group for each query head of a tile of tokens, one token after the other.

Keys are visited in tiles of 64 that begin at multiples of 64, one key for each thread, with an online softmax; then
each thread sums the values of its columns. A masked key has probability exactly 0, so results do not depend on tiling,
chunking or batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.ops.attention import Q_POS
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.targets.base import Grid, KernelSource
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import bind
from inferloom.targets.tvm.kvlayout import KEYS
from inferloom.targets.tvm.portable.emit import THREADS, Group, device_kernel, local
from inferloom.targets.tvm.rows import storage
from inferloom.targets.tvm.scalars import as_float, attr_expr, emit_expr

Expr = Any
#: What a row that has seen no key yet, and a key that is not seen, have for a score.
LOWEST = -1e30


def lower(source: KernelSource, limit: int) -> tuple[Any, int, Grid, tuple[int | str, ...]]:
    """The PrimFunc of an "attention" kernel, the bytes its groups share, its grid, and its arguments."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    made = _DeviceAttention(body, source)
    fn, shared = device_kernel(source, made.signature, limit, made.emit_device)
    return fn, shared, Grid(3, 1, made.heads), (*(a for a, _ in made.signature), "dims")


class _DeviceAttention:
    def __init__(self, body: Graph, source: KernelSource) -> None:
        (self.node,) = (n for n in body.nodes if n.op == "paged_attention")
        for node in body.nodes:
            if node.op not in ("paged_attention", "reshape", "cast"):
                raise UnsupportedError(f"{node.loc}: {node.op} cannot follow attention in one kernel")
        q, state, starts, lens, tables, *extra = (_value(v) for v in self.node.operands)
        if not isinstance(state.type, StateType) or not isinstance(q.type, TensorType) or not isinstance(tables.type, TensorType):
            raise TypeError(state)
        self.state, self.heads = state.type, int(str(q.type.shape[1]))
        for what, is_so in (("latent attention", self.state.latent),
                            (f"a cache of {self.state.dtype}", self.state.dtype is not DType.F32),
                            ("attention to chosen blocks", int(str(self.node.attrs["chosen"])) >= 0)):
            if is_so:
                raise UnsupportedError(f"{self.node.loc}: devices reached by source cannot lower {what} yet")
        self.group = self.heads // self.state.heads
        inputs = [body.inputs.index(v) for v in (q, state, starts, lens, tables, *extra)]
        (out,) = body.outputs
        types = ["float32", "float32", "int32", "int32", "int32", *(storage(v) for v in extra)]
        self.signature: list[tuple[int | str, str]] = list(zip(inputs, types, strict=True))
        self.signature += [(len(body.inputs), storage(out)), ("q_tiles", "int32")]
        self.ldq, self.ldo = source.layouts[inputs[0]].ld, source.layouts[len(body.inputs)].ld
        self.columns = int(str(tables.type.shape[1]))
        self.stride = source.layouts[inputs[1]].block_stride // 4
        self.extra = len(extra)

    def emit_device(self, views: list[Expr], dims: Expr, chunk: Expr, group: Group) -> None:
        q, self.pool, starts, self.lens, self.tables = views[:5]
        self.extras, result, tiles = views[5:5 + self.extra], views[5 + self.extra], views[6 + self.extra]
        dk, dv, thread = self.state.k_dim, self.state.v_dim, group.thread
        work, head = bind(chunk // self.heads), bind(chunk % self.heads)
        seq, first, count = (bind(tiles[work * 3 + i]) for i in range(3))
        position = bind(self.lens[seq] - starts[seq + 1] + first)
        columns = -(-dv // THREADS)
        query, probs = group.shared(dk), group.shared(THREADS)
        acc, top, total, score = local(columns), local(1), local(1), local(1)
        sink = int(str(self.node.attrs["sink"]))
        with T.serial(0, count) as nth:
            token = bind(first + nth)
            where = {"q_pos": bind(position + nth), "token": token}
            group.spread((dk,), lambda index: T.buffer_store(
                query, q[token * self.ldq + head * dk + index[0]], [index[0]]))
            group.barrier()
            for c in range(columns):
                T.buffer_store(acc, T.float32(0.0), [c])
            T.buffer_store(top, self.extras[sink][head] if sink >= 0 else T.float32(LOWEST), [0])
            T.buffer_store(total, T.float32(1.0 if sink >= 0 else 0.0), [0])
            lowest = bind(T.max(self._scalar("first", where), T.int32(0)) // THREADS)
            last = where["q_pos"]
            if attr_expr(self.node, "last") != Q_POS:
                last = bind(T.min(self._scalar("last", where), self.lens[seq] - 1))
            with T.serial(0, last // THREADS + 1 - lowest) as step:
                begin = bind((lowest + step) * THREADS)
                key = bind(begin + thread)
                at = self._place(seq, head, key)
                T.buffer_store(score, T.float32(0.0), [0])
                with T.serial(0, dk) as d:
                    T.buffer_store(score, vmath.fma(query[d], self.pool[at[0] + d * KEYS + at[1]], score[0], 1), [0])
                scale = T.float32(float(str(self.node.attrs["scale"])))
                env = {"score": bind(score[0] * scale), "k_pos": key, "head": head, **where}
                seen = T.And(key <= last, self._scalar("visible", env))
                T.buffer_store(score, T.Select(seen, as_float(self._scalar("score", env), 1), T.float32(LOWEST)), [0])
                T.buffer_store(probs, score[0], [thread])
                group.barrier()
                new = local(1)
                T.buffer_store(new, top[0], [0])
                with T.serial(0, THREADS) as j:
                    T.buffer_store(new, T.max(new[0], probs[j]), [0])
                group.barrier()
                T.buffer_store(probs, T.Select(seen, vmath.exp(score[0] - new[0], 1), T.float32(0.0)), [thread])
                group.barrier()
                decay = bind(vmath.exp(top[0] - new[0], 1))
                T.buffer_store(top, new[0], [0])
                T.buffer_store(total, total[0] * decay, [0])
                for c in range(columns):
                    T.buffer_store(acc, acc[c] * decay, [c])
                with T.serial(0, THREADS) as j:
                    p = bind(probs[j])
                    row = self._place(seq, head, bind(begin + j))
                    T.buffer_store(total, total[0] + p, [0])
                    for c in range(columns):
                        column = T.min(thread + c * THREADS, T.int32(dv - 1))
                        value = self.pool[row[0] + KEYS * dk + row[1] * dv + column]
                        T.buffer_store(acc, vmath.fma(p, value, acc[c], 1), [c])
                group.barrier()
            inverse = bind(T.float32(1.0) / total[0])
            for c in range(columns):
                with T.If(thread + c * THREADS < dv):
                    with T.Then():
                        T.buffer_store(result, acc[c] * inverse, [token * self.ldo + head * dv + c * THREADS + thread])

    def _scalar(self, name: str, env: Mapping[str, Expr]) -> Expr:
        return emit_expr(attr_expr(self.node, name), env, self.extras, 1)

    def _place(self, seq: Expr, head: Expr, key: Expr) -> tuple[Expr, Expr]:
        """Where the tile of 16 tokens that a key is in begins, and which of it the key is; beyond the last, the last."""
        state = self.state
        key = bind(T.min(key, self.lens[seq] - 1))
        page = self.tables[seq * self.columns + key // state.block_tokens]
        tile = head // self.group * (state.block_tokens // KEYS) + key % state.block_tokens // KEYS
        return bind(page * self.stride + tile * (KEYS * state.per_token)), bind(key % KEYS)


def _value(value: Value | None) -> Value:
    if value is None:
        raise TypeError("operand is required")
    return value
