"""Drafts from a smaller model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.batch import Batches
from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.device import open_device
from inferloom.runtime.device.base import Device, memory_needed
from inferloom.runtime.errors import RequestError
from inferloom.runtime.pooling import check_task
from inferloom.runtime.prefix_cache import PrefixCache
from inferloom.runtime.request import Sequence
from inferloom.runtime.sampler import best_of, sample
from inferloom.runtime.scheduler import Limits, Scheduler, Work
from inferloom.runtime.speculative import check_speculation
from inferloom.runtime.state import longest

_TOKENIZER = "tokenizer/tokenizer.json"


class DraftModel:
    """Runs a model of `vocab_size` tokens on a device of its own; see `Proposer`.

    Each sequence has a mirror here, with the same tokens and then drafts, which `speculated` counts: a scheduler of its own
    gives mirrors blocks, finds their prefixes in a cache and preempts them. What the mirror has computed of drafts that
    the model did not take is computed again.
    """

    def __init__(self, device: Device, limits: Limits, vocab_size: int, target_vocab_size: int, count: int,
                 prefix_caching: bool = True, salt: bytes = b"") -> None:
        self.device, self.vocab_size, self.bytes = device, vocab_size, 0
        self._count, self._valid = count, min(vocab_size, target_vocab_size)
        self.pool = BlockPool(device.num_blocks)
        cache = PrefixCache(self.pool, limits.block_tokens, salt, limits.groups) if prefix_caching else None
        self.scheduler = Scheduler(self.pool, limits, cache)
        self.longest = longest(limits.groups, device.num_blocks, limits.tokens, limits.block_tokens,
                               min(limits.max_model_len, limits.blocks_per_seq * limits.block_tokens))
        self._batches = Batches(limits)
        self._mirrors: dict[Sequence, Sequence] = {}

    @classmethod
    def open(cls, artifact: Artifact, target: Artifact, count: int, memory_bytes: int, threads: int | None = None,
             gpu: int = 0, prefix_caching: bool = True, pin: bool = False) -> DraftModel:
        """Load an artifact as the draft model of another. RequestError when it cannot be that."""
        m, wanted = artifact.manifest, target.manifest
        check_task(m.task, "generate")
        limits = Limits.of(m)
        check_speculation(limits, f"the draft model {m.model.name}")
        theirs, ours = (x.files[_TOKENIZER].blake3 if _TOKENIZER in x.files else None for x in (wanted, m))
        if theirs != ours or (ours is None and m.model.vocab_size != wanted.model.vocab_size):
            raise RequestError(f"the draft model {m.model.name} has another tokenizer than {wanted.model.name}: drafts are "
                               "tokens, so both must have the same tokenizer.json (without one, vocabularies of one size)")
        device = open_device(artifact, memory_bytes, threads, gpu, pin)
        made = cls(device, limits, m.model.vocab_size, wanted.model.vocab_size, count, prefix_caching,
                   m.files[m.weights.file].blake3.encode())
        made.bytes = memory_needed(m, device.num_blocks)[0]
        return made

    def propose(self, sequences: Seq[Sequence]) -> None:
        fit = [s for s in sequences if len(s.tokens) + self._count <= self.longest and self._knows(s)]
        mirrors = {s: self._mirror(s) for s in fit}
        for gone in self._mirrors.keys() - mirrors.keys():
            self.scheduler.remove(self._mirrors[gone])
        self._mirrors = mirrors
        for _ in range(self._count):
            work = self.scheduler.schedule()
            if not work:
                break
            self._step(work)
        for sequence in sequences:
            mirror = mirrors.get(sequence)
            sequence.draft = [] if mirror is None or not mirror.speculated else mirror.tokens[-mirror.speculated:]
            unknown = next((i for i, token in enumerate(sequence.draft) if token >= self._valid), None)
            del sequence.draft[len(sequence.draft) if unknown is None else unknown:]

    def _knows(self, sequence: Sequence) -> bool:
        """Whether the tokens that the mirror lacks are in the vocabulary here."""
        mirror = self._mirrors.get(sequence)
        begin = 0 if mirror is None else len(mirror.tokens) - mirror.speculated
        return all(token < self.vocab_size for token in sequence.tokens[begin:])

    def _mirror(self, sequence: Sequence) -> Sequence:
        """The sequence's mirror with the tokens that it has now."""
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            mirror = Sequence(sequence.request, sequence.index, list(sequence.tokens))
            self.scheduler.add(mirror)
            return mirror
        old, tokens = mirror.tokens, sequence.tokens
        agreed = len(old) - mirror.speculated
        while agreed < min(len(old), len(tokens)) and old[agreed] == tokens[agreed]:
            agreed += 1
        old[agreed:] = tokens[agreed:]
        # The last token is computed, or computed again, for its logits.
        mirror.speculated, mirror.computed = 0, min(mirror.computed, agreed, len(tokens) - 1)
        return mirror

    def _step(self, work: list[Work]) -> None:
        if self.scheduler.copies:
            self.device.copy_blocks(self.scheduler.copies)
        logits = self.device.step(self._batches.of(work))
        self.scheduler.finish(work)
        sampled = [w.sequence for w in work if w.samples]
        best, finite = best_of(logits)
        for i, mirror in enumerate(sampled):
            request, token = mirror.request, best[i]
            if not request.plain and finite[i]:
                with suppress(RequestError):  # a request's bias may leave no token here
                    token, _ = sample(logits[i], request.params, request.prompt_ids, mirror.output_ids, request.seed,
                                      mirror.index)
            mirror.tokens.append(token)
            mirror.speculated += 1

    def close(self) -> None:
        self.device.close()
