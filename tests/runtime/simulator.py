"""The engine, its scheduler, blocks, leases and tiers on a virtual clock, through a life of random events.

The model's state is a hash chain of its tokens: what a block holds names the whole sequence before it, so whatever is read
from a wrong block, or was written over, is caught when it is read. A life is a list of events made of a seed; one that
fails is shrunk to the events that matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.engine import Engine
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.scheduler import Limits
from inferloom.runtime.state import ALL_KEYS, Group
from inferloom.runtime.tiers.disk import DiskStore
from inferloom.runtime.tiers.policy import Costs, Rate
from inferloom.runtime.tiers.ram import RamStore
from inferloom.runtime.tiers.tiers import Tiers
from inferloom.runtime.tiers.writer import DiskWriter

VOCAB, SIZE, LENGTH = 16, 4, 48
GROUPS: tuple[tuple[Group, ...], ...] = (
    ALL_KEYS, ALL_KEYS, (Group(2, window=6),), (Group(recurrent=True),), (Group(), Group(2, window=6)),
    (Group(2), Group(1, window=9), Group(recurrent=True)))
_ODD = np.uint64(0x9E3779B97F4A7C15)


def mix(chain: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The chain's next link u64 for each of these tokens."""
    with np.errstate(over="ignore"):
        x = (chain ^ (tokens.astype(np.uint64) + np.uint64(1))) * _ODD
    return x ^ (x >> np.uint64(29))


def stream(prompt: Sequence[int], made: int) -> list[int]:
    """What the model says after a prompt: each token is the chain's last link, modulo the vocabulary."""
    chain, out = np.zeros(1, np.uint64), list[int]()
    for token in prompt:
        chain = mix(chain, np.array([token]))
    for _ in range(made):
        out.append(int(chain[0] % np.uint64(VOCAB)))
        chain = mix(chain, np.array(out[-1:]))
    return out


class ChainDevice:
    """State of all groups as links of chains; an AssertionError for every read of what is not the sequence's own."""

    def __init__(self, blocks: int, groups: Sequence[Group]) -> None:
        self.num_blocks, self.groups = blocks, groups
        self.pool: BlockPool | None = None
        self.tokens, self.links = np.full(blocks * SIZE, -1, np.int64), np.zeros(blocks * SIZE, np.uint64)
        self.states, self.counts = np.zeros(blocks, np.uint64), np.full(blocks, -1, np.int64)
        self.page_bytes = 16 * SIZE + 16

    def step(self, batch: StepBatch) -> np.ndarray:
        self._check_writes(batch)
        tables = [g for g in self.groups if not g.recurrent for _ in range(g.tables)]
        last = np.zeros(len(batch.kv_lens), np.uint64)
        for i, (begin, end, length) in enumerate(zip(batch.seq_starts, batch.seq_starts[1:], batch.kv_lens)):
            new = batch.tokens[begin:end]
            for number, group in enumerate(tables):
                table, slots = batch.block_tables[number, i], batch.slots[number, begin:end]
                last[i] = self._keys(table, slots, new, int(length), group.window)
            for read, write in batch.pages[:, i].tolist():
                last[i] = self._state(read, write, new, int(length))
        seqs = np.searchsorted(batch.seq_starts, batch.logit_rows, side="right") - 1
        assert (batch.logit_rows == batch.seq_starts[seqs + 1] - 1).all()
        logits = np.zeros((len(seqs), VOCAB), np.float32)
        logits[np.arange(len(seqs)), (last[seqs] % np.uint64(VOCAB)).astype(np.int64)] = 1
        return logits

    def _check_writes(self, batch: StepBatch) -> None:
        blocks = [np.unique(t // SIZE) for t in batch.slots] + [t[:, 1] for t in batch.pages]
        written = np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
        assert len(np.unique(written)) == len(written), "a block is written by two"
        assert self.pool is not None
        for block in written.tolist():
            assert self.pool.references(block) == 1, f"block {block} is written and has {self.pool.references(block)} holders"

    def _keys(self, table: np.ndarray, slots: np.ndarray, new: np.ndarray, length: int, window: int) -> np.uint64:
        """Write the new tokens' links, then read back all that the last of them sees."""
        start = length - len(new)
        where = table[np.arange(length) // SIZE] * SIZE + np.arange(length) % SIZE
        assert (where[start:] == slots).all()
        before = self.links[where[start - 1]] if start else np.uint64(0)
        for slot, token in zip(slots.tolist(), new.tolist()):
            before = mix(before, np.int64(token))
            self.tokens[slot], self.links[slot] = token, before
        first = max(0, min(start, length) - window + 1) if window else 0
        seen = where[first:]
        links, tokens = self.links[seen], self.tokens[seen]
        assert (tokens >= 0).all() and (links[1:] == mix(links[:-1], tokens[1:])).all(), "state of another sequence"
        assert first or links[0] == mix(np.uint64(0), tokens[0])
        return np.uint64(links[-1])

    def _state(self, read: int, write: int, new: np.ndarray, length: int) -> np.uint64:
        link, count = (self.states[read], int(self.counts[read])) if length > len(new) else (np.uint64(0), 0)
        assert count == length - len(new), f"a state after {count} tokens is read for one after {length - len(new)}"
        for token in new.tolist():
            link = mix(link, np.int64(token))
        self.states[write], self.counts[write] = link, length
        return np.uint64(link)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.write_block(target, self.read_block(source))

    def read_block(self, block: int) -> bytes:
        part = slice(block * SIZE, (block + 1) * SIZE)
        return (self.tokens[part].tobytes() + self.links[part].tobytes() + self.states[block].tobytes()
                + self.counts[block].tobytes())

    def write_block(self, block: int, data: bytes) -> None:
        part, words = slice(block * SIZE, (block + 1) * SIZE), np.frombuffer(data, np.int64)
        self.tokens[part], self.links[part] = words[:SIZE], words[SIZE:2 * SIZE].view(np.uint64)
        self.states[block], self.counts[block] = words[-2:-1].view(np.uint64)[0], words[-1]

    def close(self) -> None:
        pass


class _Known(Rate):
    """A speed that is not measured, so that a life that is lived again is the same one."""

    def add(self, amount: float, seconds: float) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens, and how many steps run after it."""

    kind: str
    numbers: tuple[int, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class World:
    """What a life is lived in."""

    groups: int
    blocks: int
    tokens: int
    seqs: int
    ram: int
    disk: bool
    writer: bool = False


KINDS = ("add", "abort", "pause", "resume", "close", "wait", "restart")
WEIGHTS = (60, 12, 12, 4, 3, 8, 0.3)


def world(seed: int) -> World:
    r = random.Random(seed)
    groups, tokens = r.randrange(len(GROUPS)), r.randrange(1, 24)
    least = sum(g.most(LENGTH, tokens, SIZE) for g in GROUPS[groups])
    return World(groups, least + r.randrange(40), tokens, r.randrange(1, 7), r.choice([0, 500, 5000]), r.random() < 0.5,
                 r.random() < 0.5)


def events(seed: int, count: int) -> list[Event]:
    r = random.Random(seed)
    return [Event(r.choices(KINDS, WEIGHTS)[0], tuple(r.randrange(1 << 16) for _ in range(6)), r.randrange(8))
            for _ in range(count)]


class Life:
    """One engine and those who use it."""

    def __init__(self, world: World, folder: Path, make_pool: Callable[[Engine], None] = lambda engine: None) -> None:
        self.world, self.folder, self._make_pool = world, folder, make_pool
        self.now, self.steps, self.count, self.restarts = 0.0, 0, 0, 0
        self.open: dict[str, tuple[list[int], int]] = {}
        self.ended = self.hits = 0
        self._start()

    def _start(self) -> None:
        w, groups = self.world, GROUPS[self.world.groups]
        self.device = ChainDevice(w.blocks, groups)
        disk = DiskStore(self.folder, "chain", self.device.page_bytes, 200 * self.device.page_bytes) if w.disk else None
        costs = Costs(_Known(100.0), _Known(1e5), _Known(1e4))
        self.engine = Engine(self.device, Limits(w.tokens, w.seqs, -(-LENGTH // SIZE), SIZE, LENGTH, groups), VOCAB, seed=0,
                             tiers=Tiers(self.device.page_bytes, RamStore(w.ram) if w.ram else None, disk, costs,
                                         DiskWriter(disk) if w.writer and disk is not None else None),
                             clock=lambda: self.now)
        self._make_pool(self.engine)
        self.device.pool = self.engine.pool

    def live(self, event: Event) -> None:
        """Let the event happen, then so many steps."""
        a, b, c, d, e, f = event.numbers
        sessions, name = self.engine.sessions, f"{'abb'[a % 3]}:s{a % 5}"
        assert sessions is not None
        known = {info.name for info in sessions.list()}
        if event.kind == "add":
            base = [(b % 4 + i) % VOCAB for i in range(1 + c % 30)]
            prompt = base + ([d % VOCAB] if d % 3 else [])
            made, n = 1 + d % 9, 1 + (e % 8 == 0)
            self.count += 1
            self.open[str(self.count)] = prompt, made
            self.engine.add_request(str(self.count), prompt, SamplingParams(n=n, temperature=0, max_tokens=made), None, e % 3,
                                    session=name if e % 2 else None, hold=float(f % 30) if e % 2 and f % 4 == 0 else 0.0)
        elif event.kind == "abort" and self.open:
            self._end(self.engine.abort(sorted(self.open)[a % len(self.open)]))
        elif event.kind == "pause" and name in known:
            outcome = sessions.pause(name, 1.0 + b % 60, place=("auto", "keep", "ram", "disk", "discard")[c % 5])
            assert outcome.status in ("accepted", "clipped", "rejected", *(["deferred"] if self.world.writer else []))
        elif event.kind == "resume" and name in known:
            sessions.resume(name)
        elif event.kind == "close":
            sessions.close(name)
        elif event.kind == "wait":
            self.now += a % 40
        elif event.kind == "restart":
            for request in list(self.open):
                self._end(self.engine.abort(request))
            self.check()
            self.engine.tiers.close()
            self.restarts += 1
            self._start()
        for _ in range(event.steps):
            self.step()

    def step(self) -> None:
        self.steps += 1
        self.now += 0.01
        for output in self.engine.step():
            if output.finished:
                self._end(output)

    def _end(self, output: object) -> None:
        prompt, made = self.open.pop(output.request_id)  # type: ignore[attr-defined]
        self.ended += 1
        assert output.error is None, output.error  # type: ignore[attr-defined]
        for sample in output.outputs:  # type: ignore[attr-defined]
            room = min(made, LENGTH - len(prompt))
            assert list(sample.token_ids) == stream(prompt, room)[:len(sample.token_ids)], "tokens of another sequence"
            assert sample.finish_reason == "abort" or len(sample.token_ids) == room

    def check(self) -> None:
        """Books agree: no block leaked, none is held twice, tiers are within their bounds."""
        self.engine.check_integrity()
        if self.engine.tiers.ram is not None:
            self.engine.tiers.ram.check_integrity()
        if self.engine.tiers.writer is not None:
            self.engine.tiers.writer.flush()
        if self.engine.tiers.disk is not None:
            self.engine.tiers.disk.check_integrity()

    def finish(self) -> None:
        """Everybody goes home: each request ended once, and no block is held."""
        for _ in range(100_000):
            if not self.engine.has_unfinished:
                break
            self.step()
        self.check()
        assert not self.open and self.ended == self.count
        assert self.engine.pool.available == self.engine.pool.size
        self.engine.tiers.close()


def live(world: World, happenings: Sequence[Event], folder: Path,
         make_pool: Callable[[Engine], None] = lambda engine: None) -> Life:
    """A whole life; an exception when something is wrong."""
    life = Life(world, folder, make_pool)
    for number, event in enumerate(happenings):
        life.live(event)
        if number % 16 == 0:
            life.check()
    life.finish()
    return life


def shrink(fails: Callable[[Sequence[Event]], bool], happenings: Sequence[Event]) -> list[Event]:
    """As few of the events as still fail, in their order (delta debugging)."""
    left, size = list(happenings), max(1, len(happenings) // 2)
    while size:
        at = 0
        while at < len(left):
            fewer = left[:at] + left[at + size:]
            if fails(fewer):
                left = fewer
            else:
                at += size
        size //= 2
    return left
