"""Attention over whole sequences (model level) and over paged state (serving level)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.expr import Expr, Var
from inferloom.ir.op import KERNEL, MODEL, SERVING, Tolerance, op
from inferloom.ir.ops.sparse import chosen_blocks
from inferloom.ir.types import DType, StateType, TensorType, store_array

#: Where the query stands: what it sees last, unless said otherwise.
Q_POS = Var("q_pos")


@dataclass(slots=True)
class KVArrays:
    """State as the NumPy reference holds it: k [slots, heads, k_dim], v [slots, heads, v_dim], float32."""

    k: np.ndarray
    v: np.ndarray
    type: StateType

    @classmethod
    def zeros(cls, type: StateType, blocks: int) -> KVArrays:
        """State of `blocks` empty blocks."""
        slots = blocks * type.block_tokens
        k = np.zeros((slots, type.heads, type.k_dim), np.float32)
        return cls(k, k[..., :type.v_dim] if type.latent else np.zeros((slots, type.heads, type.v_dim), np.float32), type)


def _qkv(q: TensorType, heads: Any, k_dim: Any) -> None:
    if q.rank != 3 or q.shape[2] != k_dim:
        raise VerifyError(f"q must be [tokens, heads, {k_dim}], got {q}")
    if not isinstance(q.shape[1], int) or not isinstance(heads, int) or heads < 1 or q.shape[1] % heads:
        raise VerifyError(f"{q.shape[1]} query heads do not share {heads} key heads")


def _kv(k: TensorType, v: TensorType | None, v_dim: int) -> Any:
    """Check keys and values of a model-level attention; the size of a value."""
    if k.rank != 3:
        raise VerifyError(f"k must be [tokens, heads, dim], got {k}")
    if v is None:
        if not isinstance(k.shape[2], int) or not 0 < v_dim <= k.shape[2]:
            raise VerifyError(f"without v, v_dim must be between 1 and {k.shape[2]}, got {v_dim}")
        return v_dim
    if v_dim or v.rank != 3 or k.shape[:2] != v.shape[:2]:
        raise VerifyError("k and v must be [tokens, heads, dim] with equal tokens and heads, and v_dim is for no v")
    return v.shape[2]


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, q_pos: np.ndarray, scale: float, score: Expr,
                    visible: Expr, tables: tuple[np.ndarray, ...], sink: int = -1, begin: int = 0,
                    chosen: np.ndarray | None = None) -> np.ndarray:
    """One sequence: q [n, H, dk], k [m, Hkv, dk], v [m, Hkv, dv] -> [n, H, dv], all float32.

    `score` maps the scaled product `score`, `visible` says which keys a query sees; `tables[sink]`, when
    sink >= 0, holds one extra logit a head that takes part in the softmax and contributes no value. The first
    query is number `begin` of the step's tokens. Of the keys only those `chosen` [n, Hkv, m] are seen.
    """
    heads = q.shape[1]
    group = heads // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = np.einsum("qhd,khd->hqk", q, k).astype(np.float32) * np.float32(scale)
    env: dict[str, Any] = {f"t{i}": t for i, t in enumerate(tables)}
    env |= {"score": s, "q_pos": q_pos[None, :, None], "k_pos": np.arange(k.shape[0])[None, None],
            "head": np.arange(heads)[:, None, None], "token": np.arange(begin, begin + len(q))[None, :, None]}
    s = np.asarray(score.evaluate(env), np.float32)
    s = np.where(visible.evaluate(env), s, np.float32(-np.inf))
    if chosen is not None:
        s = np.where(np.repeat(chosen, group, 1).transpose(1, 0, 2), s, np.float32(-np.inf))
    top = s.max(-1, keepdims=True)
    if sink >= 0:
        top = np.maximum(top, tables[sink][:, None, None])
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    if sink >= 0:
        total = total + np.exp(tables[sink][:, None, None] - top)
    return np.einsum("hqk,khd->qhd", p / total, v).astype(np.float32)


@op("attention", levels=(MODEL,), tolerance=Tolerance(1e-4, 1e-4), foldable=False)
class Attention:
    """Attention of q [tokens, H, dk] over k [tokens, Hkv, dk], v [tokens, Hkv, dv] -> f32 [tokens, H, dv].

    Without v, the first `v_dim` elements of a key are its value.

    As traced: `window` (0: none), `softcap` (0: none), `chunk` (0: none), optional per-head `sinks` [H] and
    `alibi` slopes [H]; `variant` names the pass that gives it meaning. `slot` numbers stateful ops in program
    order. The reference treats all tokens as one causal sequence that starts at position 0.
    """

    def infer(q: TensorType, k: TensorType, v: TensorType | None, sinks: TensorType | None = None,  # type: ignore[misc]
              alibi: TensorType | None = None, *, scale: float, slot: int, window: int = 0, softcap: float = 0.0,
              chunk: int = 0, variant: str = "causal", v_dim: int = 0) -> TensorType:
        width = _kv(k, v, v_dim)
        _qkv(q, k.shape[1], k.shape[2])
        return TensorType(DType.F32, (*q.shape[:2], width))

    def reference(q, k, v, sinks=None, alibi=None, *, scale, slot, window, softcap, chunk, variant, v_dim):  # type: ignore[no-untyped-def, misc]
        tokens, heads = q.shape[:2]
        v = k[..., :v_dim] if v is None else v
        group = heads // k.shape[1]
        s = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)).astype(np.float32) * np.float32(scale)
        if softcap:
            s = np.tanh(s / np.float32(softcap)) * np.float32(softcap)
        i, j = np.arange(tokens)[:, None], np.arange(tokens)[None]
        if alibi is not None:
            s = s + alibi[:, None, None] * (j - i)
        seen = j <= i
        if window:
            seen &= i - j < window
        if chunk:
            seen &= i // chunk == j // chunk
        s = np.where(seen, s, np.float32(-np.inf))
        if sinks is not None:
            s = np.concatenate([s, np.broadcast_to(sinks[:, None, None], (heads, tokens, 1))], -1)
        p = np.exp(s - s.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[..., :tokens]
        return np.einsum("hqk,khd->qhd", p, np.repeat(v, group, 1)).astype(np.float32)


@op("flex_attention", levels=(MODEL,), tolerance=Tolerance(1e-4, 1e-4), foldable=False)
class FlexAttention:
    """`attention` whose meaning is spelled out in scalar expressions by its variant passes.

    `score`, `visible`, `first`, `last`, `sink` and the tables are those of `paged_attention`. The reference treats
    all tokens as one sequence that starts at position 0. With `blocks`, a query sees only its own block of `block` keys
    and the `blocks` earlier ones that it meets best (ir/ops/sparse.py).
    """

    def infer(q: TensorType, k: TensorType, v: TensorType | None, *tables: TensorType, scale: float, slot: int,  # type: ignore[misc]
              score: Expr, visible: Expr, first: Expr, last: Expr = Q_POS, sink: int = -1,
              block: int = 0, blocks: int = 0, v_dim: int = 0) -> TensorType:
        width = _kv(k, v, v_dim)
        _qkv(q, k.shape[1], k.shape[2])
        if not -1 <= sink < len(tables):
            raise VerifyError(f"sink={sink} names no table")
        if blocks and (block < 1 or blocks < 0):
            raise VerifyError(f"blocks={blocks} of block={block} keys make no sense")
        return TensorType(DType.F32, (*q.shape[:2], width))

    def reference(q, k, v, *tables, scale, slot, score, visible, first, last, sink, block, blocks, v_dim):  # type: ignore[no-untyped-def, misc]
        v = k[..., :v_dim] if v is None else v
        at = np.arange(q.shape[0])
        chosen = chosen_blocks(q, k, at, block, blocks) if blocks else None
        return dense_attention(q, k, v, at, scale, score, visible, tables, sink, chosen=chosen)


@op("kv_write", levels=(SERVING, KERNEL), tolerance=Tolerance(0.0, 0.0), foldable=False)
class KvWrite:
    """New state with k [tokens, heads, dk] and v [tokens, heads, dv] (none if latent) stored at `slots` i32[tokens].

    A state of i8 stores them as integers with a scale for each token and head (`store_array`).
    """

    def infer(state: StateType, k: TensorType, v: TensorType | None, slots: TensorType) -> StateType:  # type: ignore[misc]
        values = (state.heads, state.v_dim) if v is None else v.shape[1:]
        if k.shape[1:] != (state.heads, state.k_dim) or values != (state.heads, state.v_dim) or (v is None) != state.latent:
            raise VerifyError("k and v do not fit the state")
        if slots.dtype is not DType.I32:
            raise VerifyError("slots must be i32")
        return state

    def reference(state, k, v, slots):  # type: ignore[no-untyped-def, misc]
        keys = state.k.copy()
        keys[slots] = store_array(k, state.type.dtype)
        if v is None:
            return KVArrays(keys, keys[..., :state.type.v_dim], state.type)
        values = state.v.copy()
        values[slots] = store_array(v, state.type.dtype)
        return KVArrays(keys, values, state.type)


@op("paged_attention", levels=(SERVING, KERNEL), tolerance=Tolerance(1e-4, 1e-4), foldable=False)
class PagedAttention:
    """Attention of ragged q [tokens, H, dk] over paged state -> f32 [tokens, H, dv].

    Sequence i owns tokens `seq_starts[i]:seq_starts[i+1]`, the last of its `kv_lens[i]` tokens; its blocks are
    `block_tables[i]`. `score` and `visible` are scalar expressions over score, q_pos, k_pos, head, token (the
    query's number in the step) and loads from `tables` (t0, t1, ...). `first` and `last` give the first and the last
    key position that a query may see (pages before and after are skipped); a last one beyond the sequence's tokens
    means its last token. `sink` is the table of extra logits, or -1; `chosen` the table i32 [tokens, key heads, n] of
    the blocks (counted from the sequence's first) of which a query sees keys at all, or -1.
    """

    def infer(q: TensorType, state: StateType, seq_starts: TensorType, kv_lens: TensorType,  # type: ignore[misc]
              block_tables: TensorType, *tables: TensorType, scale: float, score: Expr, visible: Expr, first: Expr,
              last: Expr = Q_POS, sink: int = -1, chosen: int = -1) -> TensorType:
        _qkv(q, state.heads, state.k_dim)
        if any(t.dtype is not DType.I32 for t in (seq_starts, kv_lens, block_tables)) or block_tables.rank != 2:
            raise VerifyError("seq_starts, kv_lens and block_tables [seqs, blocks] must be i32")
        if not -1 <= sink < len(tables):
            raise VerifyError(f"sink={sink} names no table")
        if chosen >= 0 and (chosen >= len(tables) or tables[chosen].dtype is not DType.I32 or tables[chosen].rank != 3
                            or tables[chosen].shape[1] != state.heads):
            raise VerifyError(f"chosen={chosen} names no table i32 [tokens, {state.heads}, n]")
        return TensorType(DType.F32, (*q.shape[:2], state.v_dim))

    def reference(q, state, seq_starts, kv_lens, block_tables, *tables, scale, score, visible, first, last, sink, chosen):  # type: ignore[no-untyped-def, misc]
        out = np.zeros((*q.shape[:2], state.v.shape[2]), np.float32)
        per_block = state.type.block_tokens
        for i, length in enumerate(kv_lens):
            begin, end = seq_starts[i], seq_starts[i + 1]
            pos = np.arange(length)
            slots = block_tables[i][pos // per_block] * per_block + pos % per_block
            q_pos = np.arange(length - (end - begin), length)
            named = None if chosen < 0 else (tables[chosen][begin:end, :, :, None] == pos // per_block).any(2)
            out[begin:end] = dense_attention(q[begin:end], state.k[slots], state.v[slots], q_pos, scale, score,
                                             visible, tables, sink, begin, named)
        return out

