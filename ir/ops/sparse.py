"""Choosing which blocks of keys a query reads: the mean of each block's keys, and how well a query meets it."""

from __future__ import annotations

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import KERNEL, SERVING, Tolerance, op
from inferloom.ir.types import DType, RecurrentType, StateType, TensorType

#: Scores of the query's own block, which is always chosen, and of those after it.
OWN, NEVER = 1e30, -1e30


def chosen_blocks(q: np.ndarray, k: np.ndarray, q_pos: np.ndarray, block: int, blocks: int) -> np.ndarray:
    """Which keys the queries may read, [queries, key heads, keys]: of q [n, H, dk] over k [m, Hkv, dk] from position 0.

    Those of a query's own block of `block` keys, and of the `blocks` earlier ones whose mean key has the largest product
    with the sum of the queries that share its head (the first of equal ones).
    """
    count, heads = -(-k.shape[0] // block), k.shape[1]
    shared = q.reshape(len(q), heads, -1, q.shape[2]).sum(2, dtype=np.float32)
    means = np.stack([k[b * block:(b + 1) * block].mean(0, dtype=np.float32) for b in range(count)])
    scores = np.einsum("qhd,bhd->qhb", shared, means)
    own, number = q_pos[:, None, None] // block, np.arange(count)
    scores = np.where(number == own, OWN, np.where(number > own, NEVER, scores))
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :blocks + 1]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, True, -1)
    return np.repeat(chosen, block, -1)[..., :k.shape[0]]


def _check(means: RecurrentType, heads: int, k_dim: int) -> None:
    if means.shape != (heads, k_dim):
        raise VerifyError(f"means must be [{heads}, {k_dim}], got {list(means.shape)}")


@op("block_means", levels=(SERVING, KERNEL), tolerance=Tolerance(1e-5, 1e-5), foldable=False)
class BlockMeans:
    """New means with that of the keys of each block that this step completed, f32 [heads, k_dim] a block.

    Block i of a sequence has its keys in block `block_tables[i]` of `state`, and its mean in `own_tables[i]` of `means`.
    """

    def infer(means: RecurrentType, state: StateType, seq_starts: TensorType, kv_lens: TensorType,  # type: ignore[misc]
              block_tables: TensorType, own_tables: TensorType) -> RecurrentType:
        _check(means, state.heads, state.k_dim)
        return means

    def reference(means, state, seq_starts, kv_lens, block_tables, own_tables):  # type: ignore[no-untyped-def, misc]
        data, size = means.data.copy(), state.type.block_tokens
        for i, length in enumerate(kv_lens):
            done = length - (seq_starts[i + 1] - seq_starts[i])
            for b in range(done // size, length // size):
                first = block_tables[i][b] * size
                data[own_tables[i][b]] = state.k[first:first + size].mean(0)
        return type(means)(data, means.type)


@op("block_scores", levels=(SERVING, KERNEL), tolerance=Tolerance(1e-4, 1e-4), foldable=False)
class BlockScores:
    """How well each token of ragged q [tokens, H, dk] meets the means of its sequence's blocks: f32 [tokens, heads, blocks].

    The product with the sum of the queries that share a key head; `OWN` for the block that the token is in, `NEVER` for
    those after it. Blocks have `block` tokens.
    """

    def infer(q: TensorType, means: RecurrentType, seq_starts: TensorType, kv_lens: TensorType,  # type: ignore[misc]
              own_tables: TensorType, *, block: int) -> TensorType:
        heads, k_dim = means.shape
        if q.rank != 3 or q.shape[2] != k_dim or int(str(q.shape[1])) % heads or own_tables.rank != 2 or block < 1:
            raise VerifyError(f"q must be [tokens, a multiple of {heads}, {k_dim}], got {q}")
        return TensorType(DType.F32, (q.shape[0], heads, own_tables.shape[1]))

    def reference(q, means, seq_starts, kv_lens, own_tables, *, block):  # type: ignore[no-untyped-def, misc]
        heads, k_dim = means.type.shape
        out = np.full((len(q), heads, own_tables.shape[1]), NEVER, np.float32)
        shared = q.reshape(len(q), heads, -1, k_dim).sum(2, dtype=np.float32)
        for i, length in enumerate(kv_lens):
            for t in range(seq_starts[i], seq_starts[i + 1]):
                own = (length - seq_starts[i + 1] + t) // block
                out[t, :, :own] = np.einsum("hd,bhd->hb", shared[t], means.data[own_tables[i][:own]])
                out[t, :, own] = OWN
        return out
