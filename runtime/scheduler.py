"""The scheduler: which tokens of which sequences run in the next step. Pure and deterministic.

Continuous batching: every step holds the next token of all running sequences, and as much of the prompts as the
token budget leaves room for (chunked prefill). When blocks run out, the sequence that is last in line gives back
all of its blocks and is computed again later; what it had cached may still be there then.

A recurrent state can be cached only where a step ends, so with one, prompts are cut at the ends of blocks. Prompts whose
tokens see each other are not cut at all, and are cached for requests with the very same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.facts import PREFIX_LEN
from inferloom.runtime.manifest import Manifest
from inferloom.runtime.prefix_cache import PrefixCache
from inferloom.runtime.request import Sequence
from inferloom.runtime.state import ALL_KEYS, Blocks, Group, Held


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step, and one sequence, may hold at most; the groups of state that a sequence has, and the facts that
    kernels ask of its tokens. `rows` of logits come out of a step; None: as many as there are tokens."""

    tokens: int
    seqs: int
    blocks_per_seq: int
    block_tokens: int
    max_model_len: int
    groups: tuple[Group, ...] = ALL_KEYS
    facts: tuple[str, ...] = ()
    rows: int | None = None

    @classmethod
    def of(cls, m: Manifest, tokens: int | None = None, seqs: int | None = None) -> Limits:
        """Those that an artifact was compiled for, or fewer tokens and sequences."""
        return cls(m.dims.tokens if tokens is None else tokens, min(m.dims.seqs, m.dims.rows) if seqs is None else seqs,
                   m.dims.blocks_per_seq, m.state.block_tokens, m.model.max_model_len,
                   tuple(Group.of(g) for g in m.state.groups), m.dims.facts, m.dims.rows)

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt must be computed in one step."""
        return PREFIX_LEN in self.facts


@dataclass(slots=True)
class Work:
    """`count` tokens of a sequence from its first uncomputed one. Logits are wanted of the positions `scored`, and of the
    last `samples` tokens: of none, if this does not reach the sequence's end; else of the end and the drafts behind it."""

    sequence: Sequence
    count: int
    samples: int
    scored: range


class Scheduler:
    """Holds waiting and running sequences and their blocks."""

    def __init__(self, pool: BlockPool, limits: Limits, cache: PrefixCache | None) -> None:
        self.pool, self.limits, self.cache = pool, limits, cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.copies: list[tuple[int, int]] = []
        self.preemptions = 0
        self._rows = 0
        self._decoding, self._singles = list[Sequence](), list[Work]()  # what `_single` gave, and for whom
        self.recurrent = any(g.recurrent for g in limits.groups)

    @staticmethod
    def _rank(sequence: Sequence) -> tuple[int, int, int]:
        return sequence.request.priority, sequence.request.arrival, sequence.index

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=self._rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out and give back its blocks."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Work]:
        """The next step; empty when nothing can run. `copies` are the blocks (from, to) to copy before it.

        The list is that of the last step, itself, if the same sequences decode one more token each.
        """
        self.copies = []
        # Each sequence has a row of logits; what is left goes to prompts whose logits are asked for.
        most = self.limits.tokens + self.limits.seqs if self.limits.rows is None else self.limits.rows
        self._rows = most - len(self.running)
        if len(self.running) <= self.limits.tokens and all(
                [len(s.tokens) - s.computed == 1 and s.computed < s.room and not s.draft for s in self.running]):
            work = self._single()
        else:
            work = self._resume(self.limits.tokens)
        started = self._admit(self.limits.tokens - sum([w.count for w in work])) if self.waiting else []
        return work + started if started else work

    def _single(self) -> list[Work]:
        """One token of each running sequence, all of which decode and have room for it."""
        if self._decoding != self.running:
            self._decoding, self._singles = self.running[:], [Work(s, 1, 1, range(0)) for s in self.running]
        return self._singles

    def _resume(self, budget: int) -> list[Work]:
        """What of the running sequences fits into so many tokens."""
        work = list[Work]()
        # A prompt's chunk leaves room for the one token of each sequence behind it, so that none stands still.
        decoding = sum([len(s.tokens) - s.computed == 1 for s in self.running])
        for sequence in self.running[:]:
            missing = len(sequence.tokens) - sequence.computed
            decoding -= missing == 1
            count = min(1, budget) if missing == 1 else self._cut(sequence, min(missing, budget - decoding))
            if not sequence.running or count < 1:
                continue  # preempted by one before it, or no room left
            if sequence.computed + count <= sequence.room or self._grow(sequence, count):
                if sequence.draft:
                    count += self._speculate(sequence, budget - decoding - count)
                work.append(self._work(sequence, count))
                budget -= count
        return work

    def _admit(self, budget: int) -> list[Work]:
        """First tokens of those that wait, as many as fit."""
        work = list[Work]()
        while self.waiting and budget > 0 and self._rows > 0 and len(self.running) < self.limits.seqs:
            sequence = self.waiting[0]
            self._rows -= 1
            if self._must_wait(sequence) or not self._start(sequence, budget):
                break
            self.waiting.pop(0)
            self.running.append(sequence)
            sequence.running = True
            count = self._cut(sequence, min(len(sequence.tokens) - sequence.computed, budget))
            work.append(self._work(sequence, count))
            budget -= count
        if work:
            self.running.sort(key=self._rank)
        return work

    def _cut(self, sequence: Sequence, count: int) -> int:
        """At most `count` tokens, up to the last end of a block if a state is to be cached there; 0 if too few."""
        wanted = sequence.rows(count)
        if len(wanted) > self._rows:
            count = wanted.start + self._rows + (0 if self.limits.whole_prompts else 1) - sequence.computed
        size, end = self.limits.block_tokens, sequence.computed + count
        if self.limits.whole_prompts and sequence.computed < len(sequence.request.prompt_ids):
            return count if end >= len(sequence.request.prompt_ids) else 0
        whole = end // size * size - sequence.computed
        return whole if self.recurrent and self.cache is not None and whole > 0 else count

    def _speculate(self, sequence: Sequence, most: int) -> int:
        """How many of its drafts a decoding sequence may check, `most` at most: guesses preempt nobody."""
        room = sequence.room - len(sequence.tokens)
        count = min(len(sequence.draft), most, self._rows)
        if count > room:
            missing = self._missing(sequence, 1 + count)
            if missing and self.pool.available - missing < len(self.running):
                count = max(room, 0)
            else:
                self._extend(sequence, 1 + count)
        del sequence.draft[count:]
        return count

    def _work(self, sequence: Sequence, count: int) -> Work:
        """The sequence's part of the step, for which it takes rows besides the one it has."""
        samples = max(sequence.computed + count - len(sequence.tokens) + 1, 0)
        made = Work(sequence, count, samples, sequence.rows(count))
        self._rows -= max(len(made.scored) + samples - 1, 0)
        return made

    def finish(self, work: list[Work]) -> None:
        """Record that the step's tokens are computed, and cache the blocks that became full."""
        size, cache = self.limits.block_tokens, self.cache
        for item in work:
            sequence = item.sequence
            if not sequence.running:
                continue  # aborted meanwhile
            sequence.computed += item.count
            if self.recurrent:
                self._move(sequence)
            if cache is None:
                continue
            sure = min(sequence.computed, len(sequence.tokens) - sequence.speculated)
            while (len(sequence.keys) + 1) * size <= sure:
                at = len(sequence.keys)
                before = sequence.keys[-1] if at else self.root(sequence)
                key = cache.key(before, sequence.tokens[at * size:(at + 1) * size])
                sequence.keys.append(key)
                cache.record(sequence.held, at, key, sequence.computed)

    def _move(self, sequence: Sequence) -> None:
        """Recurrent states that were written are those that are read from now on."""
        for held in sequence.held:
            if held.next is not None:
                self._give_back(held.blocks)
                held.blocks, held.next = [held.next], None

    def root(self, sequence: Sequence) -> bytes | None:
        """What the keys of its blocks start from: the request's salt; and state of a prompt whose tokens see each other
        depends on all of it."""
        if self.cache is None:
            return None
        root = self.cache.salted(sequence.request.salt)
        return self.cache.key(root, sequence.request.prompt_ids) if self.limits.whole_prompts else root

    def _must_wait(self, sequence: Sequence) -> bool:
        """Further samples of a request wait for one that is computing the prompt that they will share."""
        prompt = len(sequence.request.prompt_ids)
        return (sequence.generated == 0 and self._donor(sequence) is None
                and any(s.request is sequence.request and s.computed < prompt for s in self.running))

    def _donor(self, sequence: Sequence) -> Sequence | None:
        """A running sample of the same request that still has all that computing the prompt's last token needs."""
        prompt = len(sequence.request.prompt_ids)
        if self.recurrent:  # its state has gone on
            return None
        needed = [g.first(prompt - 1, self.limits.block_tokens) for g in self.limits.groups]
        return next((s for s in self.running if s.request is sequence.request and s.computed >= prompt
                     and all(None not in h.blocks[n:] for h, n in zip(s.held, needed, strict=True))), None)

    def _fork(self, sequence: Sequence, donor: Sequence) -> tuple[int, int]:
        """Share the donor's full blocks of the prompt but its last token; their number, and the tokens that are left."""
        whole, part = divmod(len(sequence.request.prompt_ids) - 1, self.limits.block_tokens)
        sequence.held, sequence.keys = [Held(h.blocks[:whole]) for h in donor.held], donor.keys[:whole]
        for held in sequence.held:
            for blocks in held:
                for block in blocks:
                    self.pool.retain(block)
        return whole, part

    def _start(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence its cached blocks and room for its first tokens, or nothing."""
        donor, shared, part = (self._donor(sequence) if sequence.generated == 0 else None), 0, 0
        if donor is not None:
            shared, part = self._fork(sequence, donor)
        elif self.cache is not None and not sequence.rows(len(sequence.tokens)):
            sequence.held, sequence.keys = self.cache.take(sequence.tokens, self.root(sequence))
            shared = len(sequence.keys)
        else:
            sequence.held = [Held() for _ in self.limits.groups]
        sequence.computed = shared * self.limits.block_tokens + part
        if sequence.generated == 0:
            sequence.request.cached_tokens = max(sequence.request.cached_tokens, sequence.computed)
        count = self._cut(sequence, min(len(sequence.tokens) - sequence.computed, budget))
        if count < 1 or self._missing(sequence, count) > self.pool.available:
            self._release(sequence)
            return False
        self._extend(sequence, count)
        if donor is not None and part:  # copy on write: the block will take the sample's own tokens
            self.copies += [pair for mine, theirs in zip(sequence.held, donor.held, strict=True)
                            for pair in zip(theirs.blocks[shared] or (), mine.blocks[shared] or (), strict=True)]
        elif donor is None and self.cache is not None:
            self.cache.count(len(sequence.tokens), sequence.computed)
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Room for `count` more tokens, taken from the last in line if need be; False: it was itself the last."""
        self._forget(sequence)
        while self._missing(sequence, count) > self.pool.available:
            victim = max(self.running, key=self._rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self._extend(sequence, count)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(victim)
        self._release(victim)
        self.add(victim)

    def _forget(self, sequence: Sequence) -> None:
        """Give back blocks that no token from here on sees."""
        sure = min(sequence.computed, len(sequence.tokens) - sequence.speculated)
        for group, held in zip(self.limits.groups, sequence.held, strict=True):
            first = min(group.first(sure, self.limits.block_tokens), len(held.blocks))
            self._give_back(held.blocks[:first])
            held.blocks[:first] = [None] * first

    def _missing(self, sequence: Sequence, count: int) -> int:
        """Blocks that a step over `count` tokens needs besides those that are held."""
        return sum(self._more(g, h, sequence, count) * g.tables for g, h in zip(self.limits.groups, sequence.held, strict=True))

    def _more(self, group: Group, held: Held, sequence: Sequence, count: int) -> int:
        if not group.recurrent:
            return max(0, -(-(sequence.computed + count) // self.limits.block_tokens) - len(held.blocks))
        # A state that others may find is read, but the new one goes elsewhere.
        (now,) = held.blocks or [None]
        return int(now is None or any(self.pool.is_cached(b) or self.pool.references(b) > 1 for b in now))

    def _extend(self, sequence: Sequence, count: int) -> None:
        for group, held in zip(self.limits.groups, sequence.held, strict=True):
            for _ in range(self._more(group, held, sequence, count)):
                made: Blocks = tuple(self.pool.allocate() for _ in range(group.tables))
                if group.recurrent and held.blocks:
                    held.next = made
                else:
                    held.blocks.append(made)
        # A recurrent state may have to move at any step.
        sequence.room = 0 if self.recurrent else min(
            (len(h.blocks) for h in sequence.held), default=0) * self.limits.block_tokens

    def _give_back(self, blocks: list[Blocks | None]) -> None:
        for each in blocks:
            for block in each or ():
                self.pool.release(block)

    def _release(self, sequence: Sequence) -> None:
        for held in sequence.held:
            # Last block first, so that the start of a prefix outlives its end in the cache.
            self._give_back([held.next, *reversed(held.blocks)])
        sequence.held, sequence.keys, sequence.draft = [], [], []
        sequence.computed, sequence.room, sequence.running = 0, 0, False

    def check_integrity(self) -> None:
        """Raise ValueError unless blocks, queues and counts agree."""
        if any(s.held for s in self.waiting):
            raise ValueError("a waiting sequence holds blocks")
        self.pool.check_integrity(b for s in self.running for held in s.held for blocks in held for b in blocks)
