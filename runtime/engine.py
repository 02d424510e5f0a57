"""The engine: requests in, steps on the device, outputs out. Synchronous, single-threaded, no global state."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from inferloom.runtime.batch import Batches
from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.detokenizer import Detokenizer, Pieces, Tokenizer
from inferloom.runtime.device.base import Device
from inferloom.runtime.errors import RequestError
from inferloom.runtime.facts import Facts
from inferloom.runtime.guide import Guide
from inferloom.runtime.leases import Leases
from inferloom.runtime.outputs import CompletionOutput, Logprob, RequestOutput, TokenIds
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.pooling import Pool, check_task
from inferloom.runtime.prefix_cache import Below, PrefixCache
from inferloom.runtime.request import Request, Sequence
from inferloom.runtime.sampler import Rows, best_of, sample, token_logprobs
from inferloom.runtime.scheduler import Limits, Scheduler, Work
from inferloom.runtime.sessions import Sessions, check_name, check_place
from inferloom.runtime.speculative import Proposer, check_speculation
from inferloom.runtime.state import longest
from inferloom.runtime.tiers.tiers import Tiers
from inferloom.runtime.top import TopRow
from inferloom.runtime.trace import Timeline


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the engine started; `prefix_queries` and `prefix_hits` are tokens, as are those that were `drafted`,
    and of these `accepted`. `prompt_tokens` went through the model as parts of prompts.

    Of the blocks, `blocks_cached` are free and hold what can be found again, `blocks_kept` of these under lease. The last
    step had `batch_seqs` sequences with `batch_tokens`."""

    steps: int
    tokens_computed: int
    tokens_generated: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    blocks: int
    blocks_available: int
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0
    blocks_cached: int = 0
    blocks_kept: int = 0
    batch_seqs: int = 0
    batch_tokens: int = 0


class Engine:
    """Runs requests on a device.

    `salt` separates prefix caches; without `prefix_caching` nothing is shared. `tiers` are the places for state below the
    pool; leases together hold at most the share `leased` of it. A `proposer` makes drafts of what comes next, see
    runtime/speculative.py. What the device gives is for the `task`: logits to "generate", or hidden states to
    "embed". Not thread-safe: see AsyncLLM.
    """

    def __init__(self, device: Device, limits: Limits, vocab_size: int, tokenizer: Tokenizer | None = None,
                 eos_token_ids: Seq[int] = (), prefix_caching: bool = True, salt: bytes = b"",
                 seed: int | None = None, tiers: Tiers | None = None, leased: float = 0.5,
                 clock: Callable[[], float] = time.monotonic, proposer: Proposer | None = None,
                 task: str = "generate") -> None:
        if proposer is not None:
            check_speculation(limits, "the model")
        self.task = task
        self._proposer, self._drafted, self._accepted = proposer, 0, 0
        self.device, self.limits, self.vocab_size, self.tokenizer = device, limits, vocab_size, tokenizer
        self.eos = frozenset(eos_token_ids)
        self.pool = BlockPool(device.num_blocks)
        self.tiers = tiers or Tiers()
        below = Below(self.tiers, device.read_block, device.write_block, self.tiers.worth)
        self.cache = PrefixCache(self.pool, limits.block_tokens, salt, limits.groups, below) if prefix_caching else None
        self.leases = Leases(self.pool, int(leased * device.num_blocks))
        self.sessions = Sessions(self.cache, self.leases, self.tiers, clock) if self.cache is not None else None
        self.scheduler = Scheduler(self.pool, limits, self.cache)
        self.longest = longest(limits.groups, device.num_blocks, limits.tokens, limits.block_tokens,
                               min(limits.max_model_len, limits.blocks_per_seq * limits.block_tokens))
        self._requests: dict[str, Request] = {}
        self._batches = Batches(limits)
        self._timeline: Timeline | None = None
        self._pieces = [Pieces(tokenizer, skip_special) for skip_special in (False, True)] if tokenizer is not None else []
        self._arrivals, self._steps, self._computed, self._generated = itertools.count(), 0, 0, 0
        self._prompted, self._last = 0, (0, 0)
        self._seed = secrets.randbits(64) if seed is None else seed

    def add_request(self, request_id: str, prompt_ids: Seq[int], params: SamplingParams, prompt: str | None = None,
                    priority: int = 0, salt: bytes = b"", guide: Callable[[], Guide] | None = None, session: str | None = None,
                    hold: float = 0.0, place: str = "auto") -> None:
        """Queue a request; `guide` makes what holds each of its sequences to a grammar.

        `session` remembers what it has computed under that name, and `hold` lets that wait for so many seconds, in `place`
        (see Sessions.hold); its last output has the outcome. RequestError when it can never run; nothing is queued then.
        """
        self._check(request_id, prompt_ids, "generate")
        if any(not 0 <= t < self.vocab_size for t in (*params.logit_bias, *params.stop_token_ids)):
            raise RequestError(f"logit_bias and stop_token_ids must be inside the vocabulary of {self.vocab_size}")
        if len(prompt_ids) >= self.longest:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens; with room for one more, at most "
                               f"{self.longest - 1} fit (max_model_len {self.limits.max_model_len}, "
                               f"{self.device.num_blocks} blocks of {self.limits.block_tokens} tokens)")
        rows = self.limits.rows
        if self.limits.whole_prompts and params.prompt_logprobs is not None and rows is not None and len(prompt_ids) > rows:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens, which see each other, and a step gives {rows} rows "
                               "of logits: compile with a larger max_seqs, or leave prompt_logprobs out")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the artifact has none: use stop_token_ids")
        if session is not None:
            check_name(session)
            if self.sessions is None:
                raise RequestError("sessions need the prefix cache, which is switched off")
        if not hold >= 0 or (hold and session is None):
            raise RequestError("hold is a number of seconds, and needs a session")
        check_place(place)
        arrival = next(self._arrivals)
        seed = params.seed if params.seed is not None else (self._seed + arrival) % 2**64
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        most = self.longest if params.max_tokens is None else min(self.longest, len(prompt_ids) + params.max_tokens)
        request = Request(request_id, prompt, tuple(int(t) for t in prompt_ids), params, arrival, priority, salt, session,
                          hold, place, seed, ends, len(prompt_ids) + params.min_tokens, most)
        self._requests[request_id] = request
        for sequence in request.sequences:
            sequence.guide = None if guide is None else guide()
            if self.limits.facts:
                sequence.facts = Facts(self.limits.facts, len(request.prompt_ids), self.eos)
            if self._pieces:
                sequence.text = Detokenizer(self._pieces[params.skip_special_tokens], request.prompt_ids, params.stop,
                                            params.include_stop_str_in_output)
            self.scheduler.add(sequence)

    def add_embedding(self, request_id: str, prompt_ids: Seq[int], pooling: str = "last", priority: int = 0,
                      salt: bytes = b"") -> None:
        """Queue a prompt to be embedded: its one output has the hidden states of the last token, or the mean of all.

        RequestError when it can never run; nothing is queued then.
        """
        self._check(request_id, prompt_ids, "embed")
        if len(prompt_ids) > self.longest:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens, and at most {self.longest} fit")
        request = Request(request_id, None, tuple(int(t) for t in prompt_ids), SamplingParams(), next(self._arrivals),
                          priority, salt, most=len(prompt_ids), pool=Pool(pooling))
        self._requests[request_id] = request
        (sequence,) = request.sequences
        if self.limits.facts:
            sequence.facts = Facts(self.limits.facts, len(prompt_ids), self.eos)
        self.scheduler.add(sequence)

    def _check(self, request_id: str, prompt_ids: Seq[int], task: str) -> None:
        """RequestError for what is wrong with any request."""
        check_task(self.task, task)
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        if not len(prompt_ids):
            raise RequestError("the prompt is empty: give at least one token")
        if not all(isinstance(t, (int, np.integer)) for t in prompt_ids):
            raise RequestError("token ids must be integers")
        bad = [t for t in prompt_ids if not 0 <= t < self.vocab_size]
        if bad:
            raise RequestError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")
        if self.limits.whole_prompts and len(prompt_ids) > self.limits.tokens:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens, which see each other and so must be computed in "
                               f"one step, and a step has room for {self.limits.tokens}: compile with a larger max_tokens")

    def trace(self, timeline: Timeline | None) -> None:
        """Record the steps from here on there; None stops it."""
        self._timeline = self.device.timeline = timeline

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free what it holds; None when it is not (or no longer) there."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end_all(request)
        return self._output(request)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that made progress. A failing device ends all that took part."""
        line = self._timeline
        if line is not None:
            line.begin()
        if self.sessions is not None:
            self.sessions.tick()
        if self._proposer is not None:
            try:
                self._propose(self._proposer)
            except Exception as error:
                return self._fail(self.scheduler.running, str(error) or repr(error))
            if line is not None:
                line.mark("draft")
        work = self.scheduler.schedule()
        if not work:
            return []
        if line is not None:
            line.mark("schedule")
        try:
            if self.scheduler.copies:
                self.device.copy_blocks(self.scheduler.copies)
            batch = self._batches.of(work)
            if line is not None:
                line.mark("batch")
            start = time.perf_counter()
            logits = self.device.step(batch)
            if not all([w.samples for w in work]):  # most of such a step are tokens of prompts
                self.tiers.costs.compute.add(sum(w.count for w in work), time.perf_counter() - start)
        except Exception as error:
            return self._fail([w.sequence for w in work], str(error) or repr(error))
        self._steps += 1
        count = sum([w.count for w in work])
        self._computed += count
        self._prompted += sum([w.count for w in work if w.sequence.computed < len(w.sequence.request.prompt_ids)])
        self._last = len(work), count
        news = self._sample(work, logits)
        self.scheduler.finish(work)
        for item in work:
            if item.sequence.finish_reason is not None:
                self._let_go(item.sequence)
        if line is not None:
            line.mark("sample")
        outputs = [self._output(r) for r in news]
        if line is not None:
            line.mark("outputs")
        return outputs

    def _propose(self, proposer: Proposer) -> None:
        """Drafts for the sequences that decode, but none that could not be taken."""
        ready = [s for s in self.scheduler.running if len(s.tokens) - s.computed == 1 and len(s.tokens) + 1 < s.request.most]
        proposer.propose(ready)
        for sequence in ready:
            del sequence.draft[sequence.request.most - len(sequence.tokens) - 1:]

    def _sample(self, work: list[Work], logits: Rows) -> Iterable[Request]:
        """The next tokens, and what else was asked of the rows of `logits`; the requests that have news."""
        best, finite = best_of(logits) if any([w.samples and w.sequence.request.plain for w in work]) else ([], [])
        news: dict[Request, None] = {}
        row = 0
        for item in work:
            first, row, sequence = row, row + len(item.scored) + item.samples, item.sequence
            request = sequence.request
            if item.samples:
                news[request] = None
            if sequence.finish_reason is not None:
                continue  # ended by the failure of another sample of its request
            try:
                if request.pool is not None:
                    self._pool(request.pool, item, np.asarray(logits)[first:row])
                    continue
                for position in item.scored:
                    at, token = first + position - item.scored.start, request.prompt_ids[position + 1]
                    request.prompt_logprobs.append(token_logprobs(logits[at], token, request.params.prompt_logprobs or 0))
                if item.samples == 1:
                    self._append(sequence, *self._next(item, logits, row - 1, best, finite))
                elif item.samples:
                    self._take(item, logits, row - item.samples, best, finite)
            except Exception as error:  # the request's own: the others of the batch go on
                news[request] = None
                request.error = str(error) or repr(error)
                self._end_all(request)
        return news

    def _pool(self, pool: Pool, item: Work, rows: np.ndarray) -> None:
        """Take the hidden states that are wanted of the item's tokens."""
        pool.add(rows)
        if item.samples:
            item.sequence.request.embedding = pool.vector()
            self._end(item.sequence, "stop", None)

    def _take(self, item: Work, logits: Rows, row: int, best: list[int], finite: list[bool]) -> None:
        """Sample from the item's rows, of which `row` is the first, as long as the drafts say the same."""
        sequence, taken = item.sequence, 0
        while taken < item.samples:
            token, logprobs = self._next(item, logits, row + taken, best, finite)
            self._append(sequence, token, logprobs)
            taken += 1
            if sequence.finish_reason is not None or taken == item.samples or token != sequence.draft[taken - 1]:
                break
        self._drafted += item.samples - 1
        self._accepted += taken - 1
        item.count -= item.samples - taken  # the rest was computed for tokens that did not come
        sequence.draft = []

    def _next(self, item: Work, logits: Rows, row: int, best: list[int],
              finite: list[bool]) -> tuple[int, dict[int, Logprob] | None]:
        """The token that a row gives, after those that the sequence has."""
        sequence, request = item.sequence, item.sequence.request
        if request.plain and sequence.guide is None and finite[row] and len(sequence.tokens) >= request.least:
            return best[row], None
        return self._draw(sequence, logits[row])

    def _draw(self, sequence: Sequence, row: np.ndarray | TopRow) -> tuple[int, dict[int, Logprob] | None]:
        request, params = sequence.request, sequence.request.params
        if not (row.finite if isinstance(row, TopRow) else np.isfinite(row.max())):
            raise RequestError("the model's logits are not finite")
        banned = [*self.eos, *params.stop_token_ids] if len(sequence.tokens) < request.least else []
        allowed = None if sequence.guide is None else sequence.guide.allowed()
        return sample(row, params, request.prompt_ids, sequence.output_ids, request.seed, sequence.index, banned, allowed)

    def _append(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """Add a sampled token and see whether the sequence ends."""
        request, text, tokens = sequence.request, sequence.text, sequence.tokens
        early = len(tokens) < request.least
        tokens.append(token)
        self._generated += 1
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        if token in request.ends and not early:
            self._end(sequence, "stop", token if token in request.params.stop_token_ids else None)
            return
        if text is not None:
            text.append(token, may_stop=not early)
            if text.stopped_by is not None:
                self._end(sequence, "stop", text.stopped_by)
                return
        if sequence.guide is not None:
            sequence.guide.accept(token)
            if sequence.guide.finished:
                self._end(sequence, "stop", None)
                return
        if len(tokens) >= request.most:
            self._end(sequence, "length", None)

    def _end(self, sequence: Sequence, reason: str, stop: str | int | None) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop
        if sequence.text is not None:
            sequence.text.finish()

    def _let_go(self, sequence: Sequence) -> None:
        """Give back what a sequence that ended holds; a session remembers what it computed."""
        request, computed, root = sequence.request, sequence.tokens[:sequence.computed], self.scheduler.root(sequence)
        self.scheduler.remove(sequence)
        if self.sessions is not None and request.session is not None and sequence.index == 0 and computed:
            self.sessions.remember(request.session, computed, root)
            if request.hold:
                request.held = self.sessions.hold(request.session, request.hold, request.place)

    def _end_all(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._end(sequence, "abort", None)
                self._let_go(sequence)

    def _fail(self, sequences: list[Sequence], message: str) -> list[RequestOutput]:
        requests = {s.request.id: s.request for s in sequences}
        for request in requests.values():
            request.error = message
        return [out for out in (self.abort(name) for name in requests) if out is not None]

    def _output(self, request: Request) -> RequestOutput:
        """The request as it stands; a finished one is forgotten."""
        samples, finished, begin = [], True, len(request.prompt_ids)
        for s in request.sequences:
            finished = finished and s.finish_reason is not None
            text = "" if s.text is None else s.text.text if s.finish_reason else s.text.visible
            logprobs = None if request.params.logprobs is None else tuple(s.logprobs)
            samples.append(CompletionOutput(s.index, text, TokenIds(s.tokens, begin, len(s.tokens)), logprobs,
                                            s.finish_reason, s.stop_reason))
        if finished:
            del self._requests[request.id]
        return RequestOutput(request.id, request.prompt, request.prompt_ids, tuple(samples), finished,
                             request.cached_tokens, request.error,
                             None if request.params.prompt_logprobs is None else tuple(request.prompt_logprobs),
                             request.held, request.embedding)

    def stats(self) -> Stats:
        cache = self.cache
        return Stats(self._steps, self._computed, self._generated, self.scheduler.preemptions,
                     cache.queries if cache else 0, cache.hits if cache else 0, self.pool.size, self.pool.available,
                     self._drafted, self._accepted, self._prompted, self.pool.cached, self.pool.kept, *self._last)

    def check_integrity(self) -> None:
        """Raise ValueError when blocks leak or books disagree."""
        self.scheduler.check_integrity()
        if self.sessions is not None:
            self.sessions.check_integrity()
        queued = len(self.scheduler.waiting) + len(self.scheduler.running)
        open_ = sum(s.finish_reason is None for r in self._requests.values() for s in r.sequences)
        if queued != open_:
            raise ValueError(f"{queued} sequences are queued, {open_} are unfinished")
