"""The engine: requests in, steps on the device, outputs out. Synchronous, single-threaded, no global state."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from inferloom.runtime.blocks import BlockPool
from inferloom.runtime.detokenizer import Detokenizer, Tokenizer
from inferloom.runtime.device.base import Device, StepBatch
from inferloom.runtime.errors import RequestError
from inferloom.runtime.facts import Facts
from inferloom.runtime.guide import Guide
from inferloom.runtime.leases import Leases
from inferloom.runtime.outputs import CompletionOutput, RequestOutput
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.prefix_cache import Below, PrefixCache
from inferloom.runtime.request import Request, Sequence
from inferloom.runtime.sampler import sample, token_logprobs
from inferloom.runtime.scheduler import Limits, Scheduler, Work
from inferloom.runtime.sessions import Sessions, check_name
from inferloom.runtime.state import fill_tables, longest
from inferloom.runtime.tiers.tiers import Tiers
from inferloom.runtime.top import TopRow


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the engine started; `prefix_queries` and `prefix_hits` are tokens."""

    steps: int
    tokens_computed: int
    tokens_generated: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    blocks: int
    blocks_available: int


class Engine:
    """Runs requests on a device.

    `salt` separates prefix caches; without `prefix_caching` nothing is shared. `tiers` are the places for state below the
    pool; leases together hold at most the share `leased` of it. Not thread-safe: see AsyncLLM.
    """

    def __init__(self, device: Device, limits: Limits, vocab_size: int, tokenizer: Tokenizer | None = None,
                 eos_token_ids: Seq[int] = (), prefix_caching: bool = True, salt: bytes = b"",
                 seed: int | None = None, tiers: Tiers | None = None, leased: float = 0.5,
                 clock: Callable[[], float] = time.monotonic) -> None:
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
        self._texts: dict[Sequence, Detokenizer] = {}
        self._seeds: dict[str, int] = {}
        self._arrivals, self._steps, self._computed, self._generated = itertools.count(), 0, 0, 0
        self._seed = secrets.randbits(64) if seed is None else seed

    def add_request(self, request_id: str, prompt_ids: Seq[int], params: SamplingParams, prompt: str | None = None,
                    priority: int = 0, salt: bytes = b"", guide: Callable[[], Guide] | None = None, session: str | None = None,
                    hold: float = 0.0) -> None:
        """Queue a request; `guide` makes what holds each of its sequences to a grammar.

        `session` remembers what it has computed under that name, and `hold` lets that wait for so many seconds, where it
        costs least. RequestError when it can never run; nothing is queued then.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        if not len(prompt_ids):
            raise RequestError("the prompt is empty: give at least one token")
        if not all(isinstance(t, (int, np.integer)) for t in prompt_ids):
            raise RequestError("token ids must be integers")
        bad = [t for t in prompt_ids if not 0 <= t < self.vocab_size]
        if bad:
            raise RequestError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")
        if any(not 0 <= t < self.vocab_size for t in (*params.logit_bias, *params.stop_token_ids)):
            raise RequestError(f"logit_bias and stop_token_ids must be inside the vocabulary of {self.vocab_size}")
        if len(prompt_ids) >= self.longest:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens; with room for one more, at most "
                               f"{self.longest - 1} fit (max_model_len {self.limits.max_model_len}, "
                               f"{self.device.num_blocks} blocks of {self.limits.block_tokens} tokens)")
        if self.limits.whole_prompts and len(prompt_ids) > self.limits.tokens:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens, which see each other and so must be computed in "
                               f"one step, and a step has room for {self.limits.tokens}: compile with a larger max_tokens")
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
        arrival = next(self._arrivals)
        request = Request(request_id, prompt, tuple(int(t) for t in prompt_ids), params, arrival, priority, salt, session,
                          hold)
        for sequence in request.sequences:
            sequence.guide = None if guide is None else guide()
        self._requests[request_id] = request
        self._seeds[request_id] = params.seed if params.seed is not None else (self._seed + arrival) % 2**64
        for sequence in request.sequences:
            if self.limits.facts:
                sequence.facts = Facts(self.limits.facts, len(request.prompt_ids), self.eos)
            if self.tokenizer is not None:
                self._texts[sequence] = Detokenizer(self.tokenizer, request.prompt_ids, params.stop,
                                                    params.skip_special_tokens, params.include_stop_str_in_output)
            self.scheduler.add(sequence)

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
        if self.sessions is not None:
            self.sessions.tick()
        work = self.scheduler.schedule()
        if not work:
            return []
        rows = [(i, position) for i, w in enumerate(work) for position in w.rows]
        try:
            if self.scheduler.copies:
                self.device.copy_blocks(self.scheduler.copies)
            start = time.perf_counter()
            logits = self.device.step(self._batch(work, rows))
            if not all(w.samples for w in work):  # most of such a step are tokens of prompts
                self.tiers.costs.compute.add(sum(w.count for w in work), time.perf_counter() - start)
        except Exception as error:
            return self._fail(work, str(error) or repr(error))
        self._steps += 1
        self._computed += sum(w.count for w in work)
        self.scheduler.finish(work)
        touched: dict[str, Request] = {}
        for (i, position), row in zip(rows, logits, strict=True):
            sequence, request = work[i].sequence, work[i].sequence.request
            of_prompt = position + 1 < len(request.prompt_ids)
            if not of_prompt:
                touched[request.id] = request
            if sequence.finish_reason is not None:
                continue  # ended by the failure of another sample of its request
            try:
                if of_prompt:
                    token = request.prompt_ids[position + 1]
                    request.prompt_logprobs.append(token_logprobs(row, token, request.params.prompt_logprobs or 0))
                else:
                    self._advance(sequence, row)
            except Exception as error:  # the request's own: the others of the batch go on
                request.error = str(error) or repr(error)
                self._end_all(request)
        return [self._output(r) for r in touched.values()]

    def _batch(self, work: list[Work], wanted: list[tuple[int, int]]) -> StepBatch:
        """The step's arrays; `wanted` are its rows of logits, as (index in `work`, position)."""
        size, counts = self.limits.block_tokens, [w.count for w in work]
        starts = np.zeros(len(work) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        tokens, positions = (np.empty(int(starts[-1]), np.int32) for _ in range(2))
        lens = np.empty(len(work), np.int32)
        facts = np.empty((len(self.limits.facts), len(tokens)), np.int32)
        for i, item in enumerate(work):
            s, part = item.sequence, slice(starts[i], starts[i + 1])
            positions[part] = np.arange(s.computed, s.computed + item.count, dtype=np.int32)
            tokens[part] = s.tokens[s.computed:s.computed + item.count]
            lens[i] = s.computed + item.count
            if s.facts is not None:
                facts[:, part] = s.facts.of(s.tokens, s.computed, int(lens[i]))
        tables, pages = fill_tables(self.limits.groups, [w.sequence.held for w in work], self.limits.blocks_per_seq)
        blocks = tables[:, np.repeat(np.arange(len(work)), counts), positions // size]
        slots = np.ascontiguousarray(blocks * size + positions % size)
        rows = np.array([starts[i] + at - work[i].sequence.computed for i, at in wanted], np.int32)
        params = [work[i].sequence.request.params for i, _ in wanted]
        sharpness = np.array([1.0 if p.greedy else 1 / p.temperature for p in params], np.float32)
        return StepBatch(tokens=tokens, positions=positions, slots=slots, seq_starts=starts, kv_lens=lens,
                         block_tables=tables, logit_rows=rows, pages=pages, sharpness=sharpness, facts=facts)

    def _advance(self, sequence: Sequence, row: np.ndarray | TopRow) -> None:
        """Sample the sequence's next token and see whether it ends."""
        request, params = sequence.request, sequence.request.params
        early = sequence.generated < params.min_tokens
        banned = [*self.eos, *params.stop_token_ids] if early else []
        if not (row.finite if isinstance(row, TopRow) else np.isfinite(row).all()):
            raise RequestError("the model's logits are not finite")
        guide = sequence.guide
        token, logprobs = sample(row, params, request.prompt_ids, sequence.output_ids, self._seeds[request.id],
                                 sequence.index, banned, None if guide is None else guide.allowed())
        sequence.tokens.append(token)
        self._generated += 1
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        text = self._texts.get(sequence)
        is_stop = not early and (token in params.stop_token_ids or (token in self.eos and not params.ignore_eos))
        if text is not None and not is_stop:
            text.append(token, may_stop=not early)
        if guide is not None and not is_stop:
            guide.accept(token)
        if is_stop:
            self._end(sequence, "stop", token if token in params.stop_token_ids else None)
        elif text is not None and text.stopped_by is not None:
            self._end(sequence, "stop", text.stopped_by)
        elif guide is not None and guide.finished:
            self._end(sequence, "stop", None)
        elif sequence.generated == params.max_tokens or len(sequence.tokens) >= self.longest:
            self._end(sequence, "length", None)

    def _end(self, sequence: Sequence, reason: str, stop: str | int | None) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop
        request, computed, root = sequence.request, sequence.tokens[:sequence.computed], self.scheduler.root(sequence)
        self.scheduler.remove(sequence)
        if self.sessions is not None and request.session is not None and sequence.index == 0 and computed:
            self.sessions.remember(request.session, computed, root)
            if request.hold:
                self.sessions.pause(request.session, request.hold)
        text = self._texts.get(sequence)
        if text is not None:
            text.finish()

    def _end_all(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._end(sequence, "abort", None)

    def _fail(self, work: list[Work], message: str) -> list[RequestOutput]:
        requests = {w.sequence.request.id: w.sequence.request for w in work}
        for request in requests.values():
            request.error = message
        return [out for out in (self.abort(name) for name in requests) if out is not None]

    def _output(self, request: Request) -> RequestOutput:
        """The request as it stands; a finished one is forgotten."""
        samples = []
        for s in request.sequences:
            detokenizer = self._texts.get(s)
            text = "" if detokenizer is None else detokenizer.text if s.finish_reason else detokenizer.visible
            samples.append(CompletionOutput(s.index, text, tuple(s.output_ids),
                                            None if request.params.logprobs is None else tuple(s.logprobs),
                                            s.finish_reason, s.stop_reason))
        if request.finished:
            del self._requests[request.id], self._seeds[request.id]
            for s in request.sequences:
                self._texts.pop(s, None)
        return RequestOutput(request.id, request.prompt, request.prompt_ids, tuple(samples), request.finished,
                             request.cached_tokens, request.error,
                             None if request.params.prompt_logprobs is None else tuple(request.prompt_logprobs))

    def stats(self) -> Stats:
        cache = self.cache
        return Stats(self._steps, self._computed, self._generated, self.scheduler.preemptions,
                     cache.queries if cache else 0, cache.hits if cache else 0, self.pool.size, self.pool.available)

    def check_integrity(self) -> None:
        """Raise ValueError when blocks leak or books disagree."""
        self.scheduler.check_integrity()
        self.leases.check_integrity()
        queued = len(self.scheduler.waiting) + len(self.scheduler.running)
        open_ = sum(s.finish_reason is None for r in self._requests.values() for s in r.sequences)
        if queued != open_:
            raise ValueError(f"{queued} sequences are queued, {open_} are unfinished")
