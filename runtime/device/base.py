"""What every device does, and the checks of a step that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.facts import DOCUMENT_START, PREFIX_LEN
from inferloom.runtime.manifest import DIMS, Manifest, Tiles, inputs_layout
from inferloom.runtime.top import TopRows
from inferloom.runtime.trace import Timeline

Int32 = NDArray[np.int32]
_RAGGED = ("tokens", "positions", "seq_starts", "kv_lens", "logit_rows")
_MOVING = ("tokens", "positions", "kv_lens")  # of these, what a layout leaves open
_DIMENSIONS = {**dict.fromkeys(_RAGGED, 1), "slots": 2, "block_tables": 3, "pages": 3, "facts": 2}


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step over T tokens of S sequences, as C-contiguous int32 arrays; R rows of logits come out.

    tokens [T], positions [T], seq_starts [S + 1] (first token of each sequence, then T), kv_lens [S] (tokens after this
    step), logit_rows [R] (indices of tokens). For each of the K tables of keys and values, slots [K, T]
    (block * block_tokens + offset in it: where the token's state goes) and block_tables [K, S, blocks_per_seq or fewer];
    for each of the N recurrent ones pages [N, S, 2] (the block to read, the block to write). `sharpness` f32 [R] is
    1 / temperature of each row, for what a device finds out about it; 1 if not given. facts [F, T]: those that the
    manifest's dims name. `made`: by the engine's `Batches`, so that all but ids and places is right by construction.
    Batches with the same `layout` differ in tokens, positions, slots, kv_lens, pages and facts at most.
    """

    tokens: Int32
    positions: Int32
    slots: Int32
    seq_starts: Int32
    kv_lens: Int32
    block_tables: Int32
    logit_rows: Int32
    pages: Int32 = field(default_factory=lambda: np.zeros((0, 0, 2), np.int32))
    sharpness: NDArray[np.float32] | None = None
    facts: Int32 = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    made: bool = False
    layout: object | None = None


class Device(Protocol):
    """Memory and execution for one artifact; for one thread at a time.

    With a `timeline`, steps record there when their inputs were ready and what each kernel took.
    """

    num_blocks: int
    timeline: Timeline | None

    def step(self, batch: StepBatch) -> NDArray[np.float32] | TopRows:
        """Logits f32 [R, vocab], valid until the next step; where the artifact has `output.top`, the largest of each row.

        RequestError on a batch out of bounds.
        """
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


def make_tiles(seq_starts: Int32, tiles: Tiles) -> tuple[Int32, Int32]:
    """Attention work q_tiles int32 [QT, 3] and d_tiles int32 [DT, 3] of (sequence, first token, count).

    >>> [t.tolist() for t in make_tiles(np.array([0, 1, 18], np.int32), Tiles(16, 0))]
    [[[0, 0, 1], [1, 1, 16], [1, 17, 1]], []]
    >>> [t.tolist() for t in make_tiles(np.array([0, 1, 18], np.int32), Tiles(16, 4))]
    [[[1, 1, 16], [1, 17, 1]], [[0, 0, 1]]]
    """
    if seq_starts[-1] == len(seq_starts) - 1:  # a token each
        one = _single_tiles(len(seq_starts) - 1)
        return (one[:0], one) if tiles.decode else (one, one[:0])
    counts = np.diff(seq_starts)
    short = counts <= tiles.decode
    whole = np.flatnonzero(short).astype(np.int32)
    per_seq = np.where(short, 0, -(-counts // tiles.prefill))
    seqs = np.repeat(np.arange(len(per_seq), dtype=np.int32), per_seq)
    nth = np.arange(len(seqs), dtype=np.int32) - np.repeat(np.cumsum(per_seq) - per_seq, per_seq)
    first = seq_starts[seqs] + tiles.prefill * nth
    cut = np.stack([seqs, first, np.minimum(tiles.prefill, seq_starts[seqs + 1] - first)], axis=1)
    return cut.astype(np.int32), np.stack([whole, seq_starts[whole], counts[whole]], axis=1).astype(np.int32)


@lru_cache(256)
def _single_tiles(seqs: int) -> Int32:
    numbers = np.arange(seqs, dtype=np.int32)
    tiles = np.stack([numbers, numbers, np.ones_like(numbers)], axis=1)
    tiles.flags.writeable = False
    return tiles


def check_batch(batch: StepBatch, manifest: Manifest, num_blocks: int, again: bool = False) -> None:
    """RequestError unless every shape and every number of the batch is within the artifact's bounds.

    `again`: its layout has been checked. Kernels trust their inputs: whatever passes here must touch no memory but its own.
    """
    if batch.made:
        _check_places(batch, manifest, num_blocks, again)
    else:
        _check_all(batch, manifest, num_blocks)


def _check_places(batch: StepBatch, manifest: Manifest, num_blocks: int, again: bool) -> None:
    """Ids and places in memory; block tables are of valid blocks throughout."""
    _all_within("tokens", batch.tokens, manifest.model.vocab_size)
    _all_within("positions", batch.positions, manifest.model.max_model_len)
    _all_within("slots", batch.slots, num_blocks * manifest.state.block_tokens)
    if not again:
        _all_within("block_tables", batch.block_tables, num_blocks)
    _all_within("pages", batch.pages, num_blocks)


def _check_all(batch: StepBatch, manifest: Manifest, num_blocks: int) -> None:
    for name, ndim in _DIMENSIONS.items():
        array = getattr(batch, name)
        if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != ndim:
            raise RequestError(f"step: {name} must be an int32 array of {ndim} dimension(s)")
        if not array.flags.c_contiguous:
            raise RequestError(f"step: {name} must be C-contiguous")
    dims, state = manifest.dims, manifest.state
    count, seqs, width = len(batch.tokens), len(batch.kv_lens), batch.block_tables.shape[2] if state.kv_tables else 1
    _within("number of tokens", count, 1, dims.tokens)
    _within("number of sequences", seqs, 1, dims.seqs)
    _within("number of logit rows", len(batch.logit_rows), 0, dims.rows)
    _within("width of block_tables", width, 1, dims.blocks_per_seq)
    for name, want in (("positions", count), ("seq_starts", seqs + 1)):
        if len(getattr(batch, name)) != want:
            raise RequestError(f"step: {name} must have {want} entries, got {len(getattr(batch, name))}")
    for name, shape in (("slots", (state.kv_tables, count)), ("block_tables", (state.kv_tables, seqs, width)),
                        ("pages", (state.recurrent_tables, seqs, 2)), ("facts", (len(dims.facts), count))):
        if shape[0] and getattr(batch, name).shape != shape:
            raise RequestError(f"step: {name} must be {shape}, got {getattr(batch, name).shape}")
    sharpness = batch.sharpness
    if sharpness is not None and (sharpness.dtype != np.float32 or sharpness.shape != batch.logit_rows.shape):
        raise RequestError("step: sharpness must be float32, one number for each row of logits")
    starts, ends = batch.seq_starts, batch.kv_lens
    lengths = starts[1:] - starts[:-1]
    if starts[0] != 0 or starts[-1] != count or lengths.min() < 1:
        raise RequestError(f"step: seq_starts must rise from 0 to {count}, at least one token a sequence")
    _all_within("tokens", batch.tokens, manifest.model.vocab_size)
    _all_within("positions", batch.positions, manifest.model.max_model_len)
    if state.kv_tables:
        _all_within("slots", batch.slots, num_blocks * state.block_tokens)
        _all_within("kv_lens", ends, width * state.block_tokens + 1)
        _all_within("block_tables", batch.block_tables[:, used_blocks(batch, state.block_tokens)], num_blocks)
    if state.recurrent_tables:
        _all_within("pages", batch.pages, num_blocks)
    _all_within("logit_rows", batch.logit_rows, count)
    if (ends < lengths).any():
        raise RequestError("step: kv_lens counts the tokens of this step too, so it cannot be less than their number")
    of_token = ends if count == seqs else np.repeat(ends, lengths)
    if (batch.positions >= of_token).any():
        raise RequestError("step: a position must be below its sequence's kv_lens")
    limits = {PREFIX_LEN: of_token, DOCUMENT_START: batch.positions}
    for name, row in zip(dims.facts, batch.facts):
        if (row < 0).any() or (row > limits[name]).any():
            raise RequestError(f"step: {name} must be 0 to what there is of the sequence, got {row.min()} to {row.max()}")


def used_blocks(batch: StepBatch, block_tokens: int) -> NDArray[np.bool_]:
    """Which entries [S, blocks_per_seq or fewer] of a block table may be read; the others never are."""
    columns = np.arange(batch.block_tables.shape[2], dtype=np.int32)
    return columns[None, :] * block_tokens < batch.kv_lens[:, None]


def plan_blocks(m: Manifest, num_blocks: int | None, memory_bytes: int | None) -> int:
    """How many blocks of state the device gets. ArtifactError, with the arithmetic, when not even one fits."""
    if (num_blocks is None) == (memory_bytes is None):
        raise RequestError("give either num_blocks or memory_bytes")
    most = (2**31 - 1) // m.state.block_tokens  # slots are int32
    if num_blocks is not None:
        if not 1 <= num_blocks <= most:
            raise RequestError(f"num_blocks={num_blocks} must be 1 to {most}")
        return num_blocks
    least, sum_ = memory_needed(m, 1)
    if memory_bytes is None or memory_bytes < least:
        raise ArtifactError(f"{m.model.name} needs {least:,} bytes of memory and was given {memory_bytes:,}: {sum_}; "
                            "give more memory, or compile with smaller limits")
    return min((memory_bytes - least) // m.state.bytes_per_block + 1, most)


def memory_needed(m: Manifest, blocks: int) -> tuple[int, str]:
    """Bytes that a device takes with so many blocks of state, and how they add up."""
    mem, state = m.memory, blocks * m.state.bytes_per_block
    weights = m.files[m.weights.file].bytes  # the file as a whole, its header included
    what = "one block" if blocks == 1 else f"{blocks:,} blocks"
    return (weights + mem.workspace + mem.inputs + state,
            f"weights {weights:,} + workspace {mem.workspace:,} + inputs {mem.inputs:,} + {what} of "
            f"{m.state.block_tokens} tokens {state:,}")


def input_views(m: Manifest, memory: NDArray[np.uint8]) -> dict[str, Int32]:
    """Arrays over `memory` of the step inputs at their largest, by name."""
    layout, _ = inputs_layout(m.dims, m.tiles, m.state)
    return {name: np.ndarray(shape, np.int32, memory, offset) for name, (offset, shape) in layout.items()}


def fill_inputs(batch: StepBatch, m: Manifest, views: dict[str, Int32], again: bool = False) -> list[int]:
    """Write a checked batch into `input_views`; the counts of `DIMS`. `again`: they hold the last batch, of the same layout."""
    for name in _MOVING if again else _RAGGED:
        array = getattr(batch, name)
        views[name][: len(array)] = array
    seqs = len(batch.kv_lens)
    for i in range(m.state.kv_tables):
        views[f"slots{i or ''}"][: len(batch.tokens)] = batch.slots[i]
    for name, row in zip(m.dims.facts, batch.facts):
        views[name][: len(row)] = row
    for i in range(m.state.recurrent_tables):
        views[f"pages{i or ''}"][:seqs] = batch.pages[i]
    if again:
        return views["dims"][: len(DIMS)].tolist()
    for i in range(m.state.kv_tables):
        # What is beyond a sequence's length may be anything to the caller; to kernels it is a valid block, of an earlier
        # step perhaps.
        table, width = batch.block_tables[i], batch.block_tables.shape[2]
        views[f"block_tables{i or ''}"][:seqs, :width] = table if batch.made else np.where(
            used_blocks(batch, m.state.block_tokens), table, 0)
    q_tiles, d_tiles = make_tiles(batch.seq_starts, m.tiles)
    views["q_tiles"][: len(q_tiles)], views["d_tiles"][: len(d_tiles)] = q_tiles, d_tiles
    counts = [len(batch.tokens), seqs, len(batch.logit_rows), len(q_tiles), len(d_tiles)]
    views["dims"][: len(DIMS)] = counts
    views["sharpness"].view(np.float32)[: counts[2]] = 1 if batch.sharpness is None else batch.sharpness
    return counts


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(f"step: {what} must be {low} to {high}, got {value}")


def _all_within(name: str, array: Int32, limit: int) -> None:
    if array.size and array.view(np.uint32).max() >= limit:  # a negative one is larger than all
        raise RequestError(f"step: {name} must be 0 to {limit - 1}, got {array.min()} to {array.max()}")
