"""Prometheus metrics, under `inferloom_`; those that vLLM has too can be given under its names as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from inferloom.runtime.server.engine import EngineProcess
from inferloom.runtime.server.ticket import Ticket

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_OWN_ONLY = ("inferloom_http_requests", "inferloom_engine_up", "inferloom_engine_restarts", "inferloom_kv_blocks",
             "inferloom_steps", "inferloom_tokens_computed", "inferloom_tier", "inferloom_session")


class Metrics:
    """All metrics of a server. `engines` are asked when somebody reads."""

    def __init__(self, vllm_names: bool) -> None:
        self._vllm, self.engines = vllm_names, list[EngineProcess]()
        self._registry = registry = CollectorRegistry(auto_describe=False)
        model = ["model_name"]

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram("inferloom_" + name, what, model, buckets=buckets, registry=registry)

        def counter(name: str, what: str, labels: list[str] = model) -> Counter:
            return Counter("inferloom_" + name, what, labels, registry=registry)

        self._http = counter("http_requests", "Answers by path and status.", ["path", "status"])
        self._done = counter("request_success", "Requests that ended, by why.", ["model_name", "finished_reason"])
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
        self._queue = histogram("request_queue_time_seconds", "From a request's arrival to its first step.", _SECONDS)
        self._each = histogram("inter_token_latency_seconds", "Mean time between tokens of a request.", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        registry.register(_Engines(self.engines))  # type: ignore[arg-type]

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self._http.labels(path, str(status)).inc()

    def of(self, model: str) -> Callable[[Ticket, str], None]:
        """What counts the end of a model's requests."""

        def observe(ticket: Ticket, reason: str) -> None:
            now = time.monotonic()
            self._done.labels(model, reason).inc()
            self._prompt.labels(model).inc(ticket.prompt_tokens)
            self._generated.labels(model).inc(ticket.generated)
            self._prompts.labels(model).observe(ticket.prompt_tokens)
            self._answers.labels(model).observe(ticket.generated)
            self._whole.labels(model).observe(now - ticket.created)
            if ticket.first:
                self._queue.labels(model).observe(ticket.queued)
                self._first.labels(model).observe(ticket.first - ticket.created)
                each = ticket.generated / ticket.samples - 1
                if each > 0:
                    self._each.labels(model).observe((ticket.last - ticket.first) / each)

        return observe

    async def answer(self, request: Request) -> Response:
        text = generate_latest(self._registry).decode()
        return Response(text + (_aliases(text) if self._vllm else ""), media_type=CONTENT_TYPE_LATEST)


class _Engines:
    """What engines say of themselves, asked when metrics are read."""

    def __init__(self, engines: list[EngineProcess]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, what: str, value: Callable[[EngineProcess], float | None]) -> Metric:
            made = GaugeMetricFamily("inferloom_" + name, what, labels=["model_name"])
            for engine in self._engines:
                if (number := value(engine)) is not None:
                    made.add_metric([engine.model.names[0]], number)
            return made

        def counter(name: str, what: str, value: Callable[[EngineProcess], float | None]) -> Metric:
            made = CounterMetricFamily("inferloom_" + name, what, labels=["model_name"])
            for engine in self._engines:
                if (number := value(engine)) is not None:
                    made.add_metric([engine.model.names[0]], number)
            return made

        def beat(name: str) -> Callable[[EngineProcess], float | None]:
            return lambda e: None if e.beat is None else getattr(e.beat, name)

        def count(name: str) -> Callable[[EngineProcess], float | None]:
            return lambda e: None if e.beat is None else getattr(e.beat.counts, name)

        yield gauge("engine_up", "1 when the engine can answer.", lambda e: float(e.state == "ready"))
        yield counter("engine_restarts", "Times that the engine died and was started again.", lambda e: e.deaths)
        yield gauge("num_requests_running", "Sequences in the batch.", beat("running"))
        yield gauge("num_requests_waiting", "Sequences that wait for room.", beat("waiting"))
        yield gauge("kv_blocks", "Blocks of state.", beat("blocks"))
        yield from self._places()
        yield gauge("kv_cache_usage_perc", "Share of blocks of state that are held.",
                    lambda e: None if e.beat is None else 1 - e.beat.blocks_available / max(e.beat.blocks, 1))
        yield counter("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.",
                      beat("prefix_queries"))
        yield counter("prefix_cache_hits", "Tokens of prompts that were found there.", beat("prefix_hits"))
        yield counter("num_preemptions", "Sequences that gave their blocks back and were computed again.",
                      beat("preemptions"))
        yield gauge("sessions", "Sessions that are remembered.", count("sessions"))
        yield gauge("session_leases", "Sessions whose state is held in the pool.", count("leases"))
        yield gauge("session_leased_blocks", "Blocks of state that they hold.", count("leased_blocks"))
        yield counter("session_save_failures", "Sessions that were not written to disk: they failed, or gave place to others.",
                      count("failed_saves"))
        yield counter("spec_decode_num_draft_tokens", "Tokens that were drafted.", count("drafted"))
        yield counter("spec_decode_num_accepted_tokens", "Drafted tokens that were right.", count("accepted"))
        yield counter("steps", "Steps.", beat("steps"))
        yield counter("tokens_computed", "Tokens that went through the model.", beat("tokens_computed"))

    def _places(self) -> Iterator[Metric]:
        """Where state is: blocks by owner, bytes below the pool."""
        owned = GaugeMetricFamily("inferloom_kv_blocks_owned", "Blocks of state by owner; together they are all blocks.",
                                  labels=["model_name", "owner"])
        held = GaugeMetricFamily("inferloom_tier_bytes", "State below the pool.", labels=["model_name", "place"])
        most = GaugeMetricFamily("inferloom_tier_capacity_bytes", "State that fits below the pool; 0 without such a tier.",
                                 labels=["model_name", "place"])
        fetched = CounterMetricFamily("inferloom_tier_fetches", "Pieces of cached state that came back into the pool.",
                                      labels=["model_name", "place"])
        for engine in self._engines:
            if engine.beat is not None:
                name = engine.model.names[0]
                for owner, blocks in engine.beat.owners().items():
                    owned.add_metric([name, owner], blocks)
                for place, tier in zip(("ram", "disk"), engine.beat.tiers, strict=True):
                    held.add_metric([name, place], tier.bytes)
                    most.add_metric([name, place], tier.capacity)
                for place, number in (("ram", engine.beat.counts.fetched_ram), ("disk", engine.beat.counts.fetched_disk)):
                    fetched.add_metric([name, place], number)
        yield from (owned, held, most, fetched)


def _aliases(text: str) -> str:
    """The metrics that vLLM has, under its names."""
    kept = []
    for line in text.splitlines():
        name = line.split(" ", 3)[2] if line.startswith("#") else line
        if name.startswith("inferloom_") and not name.startswith(_OWN_ONLY):
            kept.append(line.replace("inferloom_", "vllm:", 1))
    return "\n".join(kept) + "\n"
