"""What every device does, and the checks of a step that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.errors import RequestError
from inferloom.runtime.manifest import Q_TILE, Manifest

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step over T tokens of S sequences, as C-contiguous int32 arrays; R rows of logits come out.

    tokens [T], positions [T], slots [T] (block * block_tokens + offset in it: where the token's state goes),
    seq_starts [S + 1] (first token of each sequence, then T), kv_lens [S] (tokens after this step),
    block_tables [S, blocks_per_seq or fewer], logit_rows [R] (indices of tokens).
    """

    tokens: Int32
    positions: Int32
    slots: Int32
    seq_starts: Int32
    kv_lens: Int32
    block_tables: Int32
    logit_rows: Int32


class Device(Protocol):
    """Memory and execution for one artifact; for one thread at a time."""

    num_blocks: int

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Logits f32 [R, vocab], valid until the next step. RequestError on a batch out of bounds."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy state blocks (source, destination), in order."""
        ...

    def read_block(self, block: int) -> bytes:
        """A block's bytes, in the artifact's state layout."""
        ...

    def write_block(self, block: int, data: bytes) -> None:
        """Set a block's bytes to what `read_block` gave."""
        ...

    def close(self) -> None:
        """Give memory and threads back. Closing twice is fine."""
        ...


def make_q_tiles(seq_starts: Int32) -> Int32:
    """Attention tiles int32 [QT, 3] of (sequence, first token, count <= 16), in order of tokens.

    >>> make_q_tiles(np.array([0, 1, 18], np.int32)).tolist()
    [[0, 0, 1], [1, 1, 16], [1, 17, 1]]
    """
    per_seq = -(-np.diff(seq_starts) // Q_TILE)
    seqs = np.repeat(np.arange(len(per_seq), dtype=np.int32), per_seq)
    nth = np.arange(len(seqs), dtype=np.int32) - np.repeat(np.cumsum(per_seq) - per_seq, per_seq)
    first = seq_starts[seqs] + Q_TILE * nth
    return np.stack([seqs, first, np.minimum(Q_TILE, seq_starts[seqs + 1] - first)], axis=1).astype(np.int32)


def check_batch(batch: StepBatch, manifest: Manifest, num_blocks: int) -> None:
    """RequestError unless every shape and every number of the batch is within the artifact's bounds.

    Kernels trust their inputs: whatever passes here must touch no memory but its own.
    """
    for field in fields(batch):
        array, ndim = getattr(batch, field.name), 2 if field.name == "block_tables" else 1
        if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != ndim:
            raise RequestError(f"step: {field.name} must be an int32 array of {ndim} dimension(s)")
        if not array.flags.c_contiguous:
            raise RequestError(f"step: {field.name} must be C-contiguous")
    dims, block_tokens = manifest.dims, manifest.state.block_tokens
    count, seqs, width = len(batch.tokens), len(batch.kv_lens), batch.block_tables.shape[1]
    _within("number of tokens", count, 1, dims.tokens)
    _within("number of sequences", seqs, 1, dims.seqs)
    _within("number of logit rows", len(batch.logit_rows), 0, dims.rows)
    _within("width of block_tables", width, 1, dims.blocks_per_seq)
    for name, want in (("positions", count), ("slots", count), ("seq_starts", seqs + 1), ("block_tables", seqs)):
        if len(getattr(batch, name)) != want:
            raise RequestError(f"step: {name} must have {want} entries, got {len(getattr(batch, name))}")
    lengths = np.diff(batch.seq_starts)
    if batch.seq_starts[0] != 0 or batch.seq_starts[-1] != count or lengths.min() < 1:
        raise RequestError(f"step: seq_starts must rise from 0 to {count}, at least one token a sequence")
    _all_within("tokens", batch.tokens, manifest.model.vocab_size)
    _all_within("positions", batch.positions, manifest.model.max_model_len)
    _all_within("slots", batch.slots, num_blocks * block_tokens)
    _all_within("logit_rows", batch.logit_rows, count)
    _all_within("kv_lens", batch.kv_lens, width * block_tokens + 1)
    if (batch.kv_lens < lengths).any():
        raise RequestError("step: kv_lens counts the tokens of this step too, so it cannot be less than their number")
    if (batch.positions >= np.repeat(batch.kv_lens, lengths)).any():
        raise RequestError("step: a position must be below its sequence's kv_lens")
    _all_within("block_tables", batch.block_tables[used_blocks(batch, block_tokens)], num_blocks)


def used_blocks(batch: StepBatch, block_tokens: int) -> NDArray[np.bool_]:
    """Which entries of block_tables hold tokens, as bool of its shape; the others are never read."""
    columns = np.arange(batch.block_tables.shape[1], dtype=np.int32)
    return columns[None, :] * block_tokens < batch.kv_lens[:, None]


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(f"step: {what} must be {low} to {high}, got {value}")


def _all_within(name: str, array: Int32, limit: int) -> None:
    if array.size and (array.min() < 0 or array.max() >= limit):
        raise RequestError(f"step: {name} must be 0 to {limit - 1}, got {array.min()} to {array.max()}")
