"""A device whose state is the tokens themselves, so that a wrong block, slot or position is caught exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.engine import Engine
from inferloom.runtime.errors import RequestError
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.scheduler import Limits
from inferloom.runtime.state import ALL_KEYS, Group

VOCAB = 64


class FakeDevice:
    """Logits are random numbers seeded by what the groups of state hold of a sequence.

    Keys and values hold tokens, those of them that the group's window shows go into the seed; a recurrent state is a
    chain of hashes over all tokens.
    """

    def __init__(self, blocks: int, block_tokens: int, groups: Sequence[Group] = ALL_KEYS) -> None:
        self.num_blocks, self.block_tokens, self.groups = blocks, block_tokens, groups
        self.slots: list[tuple[int, int] | None] = [None] * (blocks * block_tokens)
        self.chains: list[tuple[bytes, int] | None] = [None] * blocks
        self.steps = self.computed = 0
        self.fail_at: int | None = None

    def step(self, batch: StepBatch) -> np.ndarray:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RequestError("the device failed")
        self.computed += len(batch.tokens)
        arrays = [getattr(batch, f.name) for f in fields(batch)]
        assert all(a.flags.c_contiguous for a in arrays if isinstance(a, np.ndarray))
        writes = [*batch.slots.reshape(-1).tolist(), *(-1 - p for p in batch.pages[..., 1].reshape(-1).tolist())]
        assert len(set(writes)) == len(writes)
        touched = {s // self.block_tokens for s in writes if s >= 0}
        assert touched.isdisjoint(-1 - w for w in writes if w < 0)
        for table in batch.slots:
            for slot, token, position in zip(table, batch.tokens, batch.positions, strict=True):
                self.slots[slot] = int(token), int(position)
        for block in touched:
            self.chains[block] = None
        for table in batch.pages:
            for (read, write), begin, end, length in zip(table, batch.seq_starts, batch.seq_starts[1:], batch.kv_lens):
                self._advance(int(read), int(write), batch.tokens[begin:end], int(length))
        rows = []
        for row in batch.logit_rows:
            seq = int(np.searchsorted(batch.seq_starts, row, side="right")) - 1
            assert row == batch.seq_starts[seq + 1] - 1 or not batch.pages.size
            rows.append(self._logits(batch, seq, int(batch.positions[row])))
        return np.array(rows, np.float32).reshape(len(batch.logit_rows), VOCAB)

    def _advance(self, read: int, write: int, tokens: np.ndarray, length: int) -> None:
        chain, count = (b"", 0) if length == len(tokens) else self.chains[read] or (b"", -1)
        assert count == length - len(tokens)
        for token in tokens.tolist():
            chain = hashlib.sha256(chain + token.to_bytes(4, "little")).digest()
        self.chains[write] = chain, length
        size = self.block_tokens
        self.slots[write * size:(write + 1) * size] = [None] * size

    def _logits(self, batch: StepBatch, seq: int, last: int) -> np.ndarray:
        digest, size, table, page = hashlib.sha256(), self.block_tokens, 0, 0
        for group in self.groups:
            for _ in range(group.tables):
                if group.recurrent:
                    held = self.chains[batch.pages[page, seq, 1]]
                    assert held is not None and held[1] == last + 1
                    digest.update(held[0])
                    page += 1
                    continue
                for position in range(max(0, last - group.window + 1) if group.window else 0, last + 1):
                    found = self.slots[batch.block_tables[table, seq, position // size] * size + position % size]
                    assert found is not None and found[1] == position
                    digest.update(found[0].to_bytes(4, "little"))
                table += 1
        return 3 * np.random.default_rng(int.from_bytes(digest.digest()[:8], "little")).standard_normal(VOCAB)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        size = self.block_tokens
        for source, target in pairs:
            self.slots[target * size:(target + 1) * size] = self.slots[source * size:(source + 1) * size]

    @property
    def block_bytes(self) -> int:
        return 8 * self.block_tokens + 40

    def read_block(self, block: int) -> bytes:
        size = self.block_tokens
        held = [(-1, -1) if slot is None else slot for slot in self.slots[block * size:(block + 1) * size]]
        chain, count = self.chains[block] or (bytes(32), -1)
        return np.array(held, "<i4").tobytes() + chain + count.to_bytes(8, "little", signed=True)

    def write_block(self, block: int, data: bytes) -> None:
        assert len(data) == self.block_bytes
        size = self.block_tokens
        held = np.frombuffer(data[:8 * size], "<i4").reshape(size, 2).tolist()
        self.slots[block * size:(block + 1) * size] = [None if t < 0 else (t, p) for t, p in held]
        count = int.from_bytes(data[-8:], "little", signed=True)
        self.chains[block] = None if count < 0 else (data[8 * size:-8], count)

    def close(self) -> None:
        pass


def make_engine(blocks: int = 64, block_tokens: int = 4, tokens: int = 32, seqs: int = 8, length: int = 64,
                groups: tuple[Group, ...] = ALL_KEYS, rows: int | None = None, device: FakeDevice | None = None,
                **options: Any) -> Engine:
    """An engine on a FakeDevice."""
    limits = Limits(tokens, seqs, -(-length // block_tokens), block_tokens, length, groups, rows=rows)
    return Engine(device or FakeDevice(blocks, block_tokens, groups), limits, VOCAB, **{"seed": 0, **options})


def finish(engine: Engine, most: int = 10_000) -> dict[str, RequestOutput]:
    """Step until all requests are done."""
    done = {}
    for _ in range(most):
        if not engine.has_unfinished:
            return done
        done.update({o.request_id: o for o in engine.step() if o.finished})
        engine.check_integrity()
    raise AssertionError("the engine makes no progress")
