"""Runs a server from start to end: engines up, requests answered, and on SIGTERM the last ones finished."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp

from inferloom.runtime.errors import RequestError
from inferloom.runtime.server import logs
from inferloom.runtime.server.app import make_app, open_models
from inferloom.runtime.server.metrics import Metrics
from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.settings import ModelSettings, Settings

#: Told what is served, and where, once requests are answered.
Started = Callable[[list[dict[str, object]], str, int], None]
_log = structlog.get_logger()


def serve(models: Sequence[ModelSettings], settings: Settings, started: Started | None = None) -> None:
    """Serve until SIGINT or SIGTERM; `started` is told when requests are answered.

    Then no new connections are taken, and those that are open have `drain_timeout` to finish. ArtifactError or
    RequestError when it cannot be served.
    """
    logs.set_up(settings.log_level)
    _raise_file_limit()
    with contextlib.closing(_listen(settings)) as listener:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(models, settings, listener, started))


async def _serve(wanted: Sequence[ModelSettings], settings: Settings, listener: socket.socket,
                 started: Started | None) -> None:
    metrics, spans = Metrics(settings.vllm_metrics), None
    if settings.otel_endpoint is not None:
        from inferloom.runtime.server.spans import Spans  # needs an extra

        spans = Spans(settings.otel_endpoint)
    models = open_models(wanted, settings, metrics, None if spans is None else spans.of)
    try:
        summaries = []
        for model in models.all:
            await model.engine.start()
            summaries.append(summary(model))
            _log.info("model loaded", **summaries[-1])
        app: ASGIApp = make_app(models, settings, metrics)
        config = uvicorn.Config(
            app if spans is None else spans.middleware(app), log_config=None, access_log=False, server_header=False,
            lifespan="off", limit_concurrency=settings.max_connections, timeout_keep_alive=75,
            h11_max_incomplete_event_size=64 << 10, timeout_graceful_shutdown=int(settings.drain_timeout) or 1,
            proxy_headers=False)
        server = _Server(config, lambda host, port: None if started is None else started(summaries, host, port))
        await server.serve(sockets=[listener])
    finally:
        await _stop(models)
        if spans is not None:
            await asyncio.to_thread(spans.close)
    _log.info("stopped")


async def _stop(models: Models) -> None:
    await asyncio.gather(*(model.engine.stop() for model in models.all))


class _Server(uvicorn.Server):
    """Says when it listens; a signal ends it in order, and is not raised again afterwards."""

    def __init__(self, config: uvicorn.Config, said: Callable[[str, int], None]) -> None:
        super().__init__(config)
        self._said = said

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, self.handle_exit, each, None)
        try:
            yield
        finally:
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            _log.info("listening", host=host, port=port)
            self._said(host, port)


def summary(model: Model) -> dict[str, object]:
    """What is served, on what, with how much memory."""
    m, ready, wanted = model.manifest, model.engine.ready, model.engine.model
    drafts = wanted.speculative
    blocks = 0 if ready is None else ready.blocks
    return {"model": model.name, "names": list(model.names), "architecture": m.model.architecture, "dtype": m.model.dtype,
            "chip": m.chip.name, "weights_bytes": m.files[m.weights.file].bytes, "workspace_bytes": m.memory.workspace,
            "inputs_bytes": m.memory.inputs, "blocks": blocks, "block_tokens": m.state.block_tokens,
            "state_bytes": blocks * m.state.bytes_per_block, "max_model_len": model.longest,
            "max_num_seqs": 0 if ready is None else ready.seqs, "tool_parser": model.tool_parser,
            "ram_bytes": wanted.ram_bytes, "state_dir": wanted.state_dir,
            "disk_bytes": 0 if wanted.state_dir is None else wanted.disk_bytes,
            "speculative": None if drafts is None else drafts.method,
            "num_speculative_tokens": 0 if drafts is None else drafts.num_speculative_tokens,
            "reasoning_parser": model.reasoning_parser, "chat_template": model.template is not None,
            "load_seconds": 0.0 if ready is None else round(ready.seconds, 3)}


def _listen(settings: Settings) -> socket.socket:
    """The listening socket, so that a port in use is known before anything is loaded. RequestError then."""
    try:
        info = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(info[0], info[1], info[2])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(info[4])
        listener.set_inheritable(False)
        return listener
    except OSError as error:
        raise RequestError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None


def _raise_file_limit() -> None:
    """A connection is a file: the usual soft limit of 1,024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
