"""A step's arrays, made from what the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.device.base import Int32, StepBatch
from inferloom.runtime.request import Sequence
from inferloom.runtime.scheduler import Limits, Work
from inferloom.runtime.state import Tables

_NONE = np.zeros((0, 0), np.int32)


class Batches:
    """Makes each step's `StepBatch`; it is good until the next one is made."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._size = limits, limits.block_tokens
        self._tables = Tables(limits.groups, limits.blocks_per_seq)
        self._numbers = np.arange(max(limits.tokens, limits.seqs) + 1, dtype=np.int32)
        self._work: Seq[Work] = ()
        self._last: StepBatch | None = None
        self._changes = 0  # of the tables, as the last batch has them
        # Of a last step of a token each: its [tokens, positions, lens], what was computed before it, and how many more such
        # steps stay inside the blocks that its slots are in.
        self._single, self._computed, self._left = _NONE, list[int](), 0

    def of(self, work: Seq[Work]) -> StepBatch:
        sequences, counts = [w.sequence for w in work], [w.count for w in work]
        computed = [s.computed for s in sequences]
        seqs, total = len(work), sum(counts)
        tables, pages = self._tables.of([s.held for s in sequences])
        last = self._last if work is self._work else None  # the sequences of the last step decode again
        if last is not None and self._left and self._changes == self._tables.changes and not self._limits.facts and (
                computed == [at + 1 for at in self._computed]):
            self._computed, self._left = computed, self._left - 1
            self._single[0] = [s.tokens[at] for s, at in zip(sequences, computed)]
            self._single[1:] += 1
            slots = last.slots
            slots += 1
            return last
        self._left = 0
        if total == seqs:  # a token each
            starts, owners = self._numbers[:seqs + 1], self._numbers[:seqs]
            self._single = np.array([[s.tokens[at] for s, at in zip(sequences, computed)], computed,
                                     [at + 1 for at in computed]], np.int32)
            tokens, positions, lens = self._single
            begins = positions
            self._computed, self._left = computed, self._size - 1 - max([at % self._size for at in computed])
        else:
            begins, lens = np.array([computed, counts], np.int32)
            starts = np.zeros(seqs + 1, np.int32)
            np.cumsum(lens, out=starts[1:])
            owners = np.repeat(self._numbers[:seqs], lens)
            positions = self._numbers[:total] + (begins - starts[:-1])[owners]
            lens += begins
            parts = [s.tokens[at:at + n] for s, at, n in zip(sequences, computed, counts)]
            for part, w in zip(parts, work):
                if w.samples > 1:
                    part += w.sequence.draft
            tokens = np.fromiter(chain.from_iterable(parts), np.int32, total)
        index, offset = divmod(positions, self._size)
        count, _, width = tables.shape
        blocks = tables.reshape(count, seqs * width).take(owners * width + index, axis=1)
        layout = object() if last is None or self._changes != self._tables.changes else last.layout
        self._work, self._changes = work, self._tables.changes
        self._last = StepBatch(tokens, positions, blocks * self._size + offset, starts, lens, tables,
                               self._rows(work, starts) if last is None else last.logit_rows, pages,
                               _sharpness(work) if last is None else last.sharpness,
                               self._facts(sequences, begins, lens) if self._limits.facts else _NONE, True, layout)
        return self._last

    def _rows(self, work: Seq[Work], starts: Int32) -> Int32:
        """The tokens whose logits are wanted."""
        samples = [w.samples for w in work]
        if max(samples) <= 1 and not any([w.scored for w in work]):
            ends = starts[1:] - 1
            return ends if all(samples) else ends[np.array(samples, np.bool_)]
        rows: list[int] = []
        for w, start, end in zip(work, starts.tolist(), starts[1:].tolist()):
            rows += [start + at - w.sequence.computed for at in w.scored]
            rows += range(end - w.samples, end)
        return np.array(rows, np.int32)

    def _facts(self, sequences: Seq[Sequence], begins: Int32, ends: Int32) -> Int32:
        parts = [s.facts.of(s.tokens, int(begin), int(end))
                 for s, begin, end in zip(sequences, begins, ends) if s.facts is not None]
        return np.concatenate(parts, axis=1) if parts else _NONE


def _sharpness(work: Seq[Work]) -> NDArray[np.float32] | None:
    """1 / temperature of each row; None where it is 1 for all."""
    hot = [sharpness for w in work for sharpness in [w.sequence.request.sharpness] * (len(w.scored) + w.samples)]
    return None if hot.count(1.0) == len(hot) else np.array(hot, np.float32)
