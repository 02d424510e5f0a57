"""Dilated attention: a query sees the last 8 keys, and of the older ones, up to 64 back, every fourth."""

from __future__ import annotations

import numpy as np

from inferloom.compiler.attention import K_POS, Q_POS, AttentionSpec, Variant
from inferloom.ir.expr import Const, call, maximum
from inferloom.ir.graph import Node, Value

NEAR, FAR, STEP = 8, 64, 4


def apply(node: Node, operands: tuple[Value | None, ...], spec: AttentionSpec) -> AttentionSpec:
    back = Q_POS - K_POS
    seen = (back < NEAR) | (call("eq", back % STEP, 0) & (back < FAR))
    # No key before this one is seen: pages that lie before it are never read, and are given back.
    return spec.see_only(seen, maximum(Q_POS - (FAR - 1), Const(0)))


VARIANT = Variant("dilated", apply)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """What is meant, in plain NumPy, for one sequence: q [tokens, heads, dim], k and v [tokens, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for i in range(len(q)):
        keys = [j for j in range(i + 1) if i - j < NEAR or (i - j < FAR and (i - j) % STEP == 0)]
        for h in range(q.shape[1]):
            p = np.exp(scale * k[keys, h] @ q[i, h])
            out[i, h] = p @ v[keys, h] / p.sum()
    return out
