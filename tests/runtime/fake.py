"""A device whose state is the tokens themselves, so that a wrong block, slot or position is caught exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.engine import Engine
from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.scheduler import Limits

VOCAB = 64


class FakeDevice:
    """Logits are random numbers seeded by a hash over all tokens of the sequence, read through its block table."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = blocks, block_tokens
        self.slots: list[tuple[int, int] | None] = [None] * (blocks * block_tokens)
        self.steps = self.computed = 0
        self.fail_at: int | None = None

    def step(self, batch: StepBatch) -> np.ndarray:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RequestError("the device failed")
        self.computed += len(batch.tokens)
        assert len(set(batch.slots.tolist())) == len(batch.slots) > 0
        for slot, token, position in zip(batch.slots, batch.tokens, batch.positions, strict=True):
            self.slots[slot] = int(token), int(position)
        rows = []
        for row in batch.logit_rows:
            seq = int(np.searchsorted(batch.seq_starts, row, side="right")) - 1
            rows.append(self._logits(batch.block_tables[seq], int(batch.positions[row])))
        return np.array(rows, np.float32).reshape(len(batch.logit_rows), VOCAB)

    def _logits(self, table: np.ndarray, last: int) -> np.ndarray:
        digest, size = hashlib.sha256(), self.block_tokens
        for position in range(last + 1):
            held = self.slots[table[position // size] * size + position % size]
            assert held is not None and held[1] == position
            digest.update(held[0].to_bytes(4, "little"))
        return 3 * np.random.default_rng(int.from_bytes(digest.digest()[:8], "little")).standard_normal(VOCAB)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        size = self.block_tokens
        for source, target in pairs:
            self.slots[target * size:(target + 1) * size] = self.slots[source * size:(source + 1) * size]

    def read_block(self, block: int) -> bytes:
        raise NotImplementedError

    def write_block(self, block: int, data: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def make_engine(blocks: int = 64, block_tokens: int = 4, tokens: int = 32, seqs: int = 8, length: int = 64,
                **options: Any) -> Engine:
    """An engine on a FakeDevice."""
    limits = Limits(tokens, seqs, -(-length // block_tokens), block_tokens, length)
    return Engine(FakeDevice(blocks, block_tokens), limits, VOCAB, **{"seed": 0, **options})


def finish(engine: Engine, most: int = 10_000) -> dict[str, RequestOutput]:
    """Step until all requests are done."""
    done = {}
    for _ in range(most):
        if not engine.has_unfinished:
            return done
        done.update({o.request_id: o for o in engine.step() if o.finished})
        engine.check_integrity()
    raise AssertionError("the engine makes no progress")
