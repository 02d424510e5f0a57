"""`inferloom serve`: an OpenAI- and Anthropic-compatible server."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from inferloom.cache import resolve
from inferloom.cli import options
from inferloom.cli.console import err, human_bytes, progress
from inferloom.errors import MissingExtraError, UsageError

_PACKAGES = ("starlette", "uvicorn", "pydantic", "msgspec", "prometheus_client", "structlog", "llguidance")
_OTEL = "opentelemetry.exporter.otlp.proto.http"


def _option(name: str, help_: str, **more: Any) -> Any:
    """An option that an environment variable can set, too: `INFERLOOM_` and its name in capitals."""
    variable = "INFERLOOM_" + name.removeprefix("--").partition("/")[0].replace("-", "_").upper()
    return typer.Option(name, envvar=variable, help=help_, show_envvar=False, **more)


def serve(
    models: Annotated[list[Path], typer.Argument(metavar="ARTIFACT|CHECKPOINT...", show_default=False,
                                                 help="What to serve; checkpoints are compiled on first use.")],
    host: Annotated[str, _option("--host", "Address to listen on; any but loopback needs --api-key.")] = "127.0.0.1",
    port: Annotated[int, _option("--port", "Port to listen on; 0 for a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[list[str] | None, _option("--api-key", "Key that clients must give; may be repeated.",
                                                 show_default=False)] = None,
    served_model_name: Annotated[list[str] | None, _option(
        "--served-model-name", "Name for clients instead of the folder's; may be repeated. With several models, one "
        "each, in their order.", show_default=False)] = None,
    max_num_seqs: Annotated[int | None, _option("--max-num-seqs", "Sequences in a batch at most.", min=1,
                                                show_default=False)] = None,
    max_num_batched_tokens: Annotated[int | None, _option("--max-num-batched-tokens", "Tokens in a step at most.", min=1,
                                                          show_default=False)] = None,
    enable_prefix_caching: Annotated[bool, _option("--enable-prefix-caching/--no-enable-prefix-caching",
                                                   "Share the state of equal beginnings.")] = True,
    seed: Annotated[int | None, _option("--seed", "Makes sampling repeatable.", show_default=False)] = None,
    tool_call_parser: Annotated[str, _option("--tool-call-parser", "How the model writes tool calls: auto, none, hermes, "
                                             "qwen, llama3_json, mistral.")] = "auto",
    reasoning_parser: Annotated[str, _option("--reasoning-parser", "How the model writes thoughts: auto, none, "
                                             "think.")] = "auto",
    max_queue: Annotated[int, _option("--max-queue", "Sequences that may wait; more get 429.", min=0)] = 256,
    max_body: Annotated[str, _option("--max-body", "Longest request.", metavar="BYTES")] = "8MiB",
    max_logprobs: Annotated[int, _option("--max-logprobs", "Log-probabilities a token at most.", min=0, max=1024)] = 20,
    allowed_hosts: Annotated[list[str] | None, _option("--allowed-hosts", "Host names that requests may ask for; may be "
                                                       "repeated.", show_default=False)] = None,
    allowed_origins: Annotated[list[str] | None, _option("--allowed-origins", "Origins of web pages that may ask; may be "
                                                         "repeated.", show_default=False)] = None,
    drain_timeout: Annotated[float, _option("--drain-timeout", "Seconds that running requests get at the end.")] = 30.0,
    stall_timeout: Annotated[float, _option("--stall-timeout", "Seconds that a step may take; then the engine counts "
                                            "as stalled, and after twice that it is started again.")] = 300.0,
    keep_alive: Annotated[float, _option("--keep-alive", "Seconds without a token until a stream gets a comment.")] = 10.0,
    send_timeout: Annotated[float, _option("--send-timeout", "Seconds that a client may leave what is sent to it "
                                           "unread.")] = 30.0,
    ram_bytes: Annotated[str | None, _option("--ram-bytes", "Memory beside the pool for state that leaves it, e.g. 8GiB; none "
                                             "if not given.", metavar="BYTES", show_default=False)] = None,
    state_dir: Annotated[Path | None, _option("--state-dir", "Folder where sessions are saved; each artifact has one of its "
                                              "own in it.", metavar="DIR", show_default=False)] = None,
    disk_bytes: Annotated[str | None, _option("--disk-bytes", "Most that saved sessions take of --state-dir, for each "
                                              "artifact; 16GiB if not given.", metavar="BYTES", show_default=False)] = None,
    speculative: Annotated[str | None, _option("--speculative", "Draft tokens and check several at once: from the text itself, "
                                               "or with a smaller model of the same tokenizer.", metavar="ngram|MODEL",
                                               show_default=False)] = None,
    num_speculative_tokens: Annotated[int | None, _option("--num-speculative-tokens", "Most tokens drafted at once; 4 if not "
                                                          "given.", min=1, show_default=False)] = None,
    vllm_metrics: Annotated[bool, _option("--vllm-metrics", "Give metrics under vLLM's names, too.")] = False,
    otel_endpoint: Annotated[str | None, _option(
        "--otel-endpoint", "OpenTelemetry collector (OTLP over HTTP) that gets a span for each request; also "
        "OTEL_EXPORTER_OTLP_ENDPOINT.", metavar="URL", show_default=False)] = None,
    trace: Annotated[Path | None, _option("--trace", "Write phases and kernels of the first steps as a trace for "
                                          "https://ui.perfetto.dev; with several models, one file each.",
                                          metavar="FILE", show_default=False)] = None,
    trace_steps: Annotated[int, _option("--trace-steps", "Steps that --trace writes; fewer if the server ends before.",
                                        min=1)] = 1000,
    log_level: Annotated[str, _option("--log-level", "debug, info, warning or error.")] = "info",
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    quant: options.Quant = None,
    quant_head: options.QuantHead = None,
    quant_embedding: options.QuantEmbedding = None,
    quant_activations: options.QuantActivations = None,
    kv_dtype: options.KvDtype = None,
    task: options.Task = "generate",
    pooling: options.Pooling = None,
    normalize: options.Normalize = None,
    threads: options.Threads = None,
    pin: options.Pin = False,
    gpu: options.Gpu = 0,
    memory: options.Memory = None,
) -> None:
    """Serve models over HTTP. Each option can be set by an environment variable: --max-queue by INFERLOOM_MAX_QUEUE."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"serving needs {', '.join(missing)}; run: pip install 'inferloom[serve]'")
    from inferloom.llm import resolve_draft
    from inferloom.runtime.llm import DEFAULT_DISK_BYTES
    from inferloom.runtime.server.logs import LEVELS
    from inferloom.runtime.server.serve import serve as run
    from inferloom.runtime.server.settings import ModelSettings, Settings

    if log_level not in LEVELS:
        raise UsageError(f"log level {log_level!r} is not known; choose one of {', '.join(LEVELS)}")
    if disk_bytes is not None and state_dir is None:
        raise UsageError("--disk-bytes needs --state-dir")
    if not enable_prefix_caching and (ram_bytes or state_dir):
        raise UsageError("--ram-bytes and --state-dir keep cached state, and --no-enable-prefix-caching leaves none")
    collects = collector(otel_endpoint)
    settings = Settings(
        host=host, port=port, api_keys=tuple(api_key or ()), allowed_hosts=tuple(allowed_hosts or ()),
        allowed_origins=tuple(allowed_origins or ()), max_queue=max_queue, max_body_bytes=options.parse_bytes(max_body),
        max_logprobs=max_logprobs, drain_timeout=drain_timeout, keep_alive=keep_alive,
        send_timeout=send_timeout, stall_timeout=stall_timeout, vllm_metrics=vllm_metrics,
        log_level=log_level, otel_endpoint=collects)
    compiled_before = "torch" in sys.modules
    compiling = options.compile_options(chip, dtype, max_model_len, quant, quant_head, quant_embedding, quant_activations,
                                        kv_dtype, task, pooling, normalize)
    wanted: list[ModelSettings] = []
    for path, names in zip(models, _names(models, served_model_name or []), strict=True):
        with progress(f"opening {path}") as report:
            artifact = resolve(path, compiling, report)
            drafts = resolve_draft(options.speculative(speculative, num_speculative_tokens), compiling, report)
        wanted.append(ModelSettings(
            str(artifact), names, None if memory is None else options.parse_bytes(memory), threads, gpu, max_num_seqs,
            max_num_batched_tokens, enable_prefix_caching, seed, tool_call_parser, reasoning_parser,
            0 if ram_bytes is None else options.parse_bytes(ram_bytes), None if state_dir is None else str(state_dir),
            DEFAULT_DISK_BYTES if disk_bytes is None else options.parse_bytes(disk_bytes), drafts, pin,
            None if trace is None else str(_numbered(trace, len(wanted), len(models))), trace_steps))
    if "torch" in sys.modules and not compiled_before:  # what compiling took of memory a server does not need
        os.execv(sys.executable, sys.orig_argv)  # it starts again, and finds its artifacts in the cache
    run(wanted, settings, _say)


def _names(models: list[Path], given: list[str]) -> list[tuple[str, ...]]:
    """What each model is called. UsageError when names and models do not match."""
    if len(models) == 1 and given:
        return [tuple(given)]
    if given and len(given) != len(models):
        raise UsageError(f"{len(models)} models came with {len(given)} --served-model-name: give one each")
    return [(name,) for name in given] if given else [(path.resolve().name,) for path in models]


def collector(endpoint: str | None) -> str | None:
    """Where spans go: to `endpoint`, or where OpenTelemetry's own variables say; None for nowhere. MissingExtraError."""
    env = os.environ
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    endpoint = endpoint or env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
    if endpoint is not None:
        try:
            import_module(_OTEL)
        except ModuleNotFoundError:
            raise MissingExtraError(f"spans for {endpoint} need OpenTelemetry; run: pip install 'inferloom[otel]', or set "
                                    "OTEL_SDK_DISABLED=true") from None
    return endpoint


def _numbered(file: Path, at: int, count: int) -> Path:
    """The file of one model of several."""
    return file if count == 1 else file.with_stem(f"{file.stem}-{at + 1}")


def _say(summaries: list[dict[str, object]], host: str, port: int) -> None:
    """What is served, for a person who has started it."""
    if not err.is_terminal:
        return  # the logs say it
    for s in summaries:
        state, weights = int(str(s["state_bytes"])), int(str(s["weights_bytes"]))
        err.print(f"[bold]{s['model']}[/]: {s['architecture']} in {s['dtype']} on {s['chip']}, weights "
                  f"{human_bytes(weights)}, workspace {human_bytes(int(str(s['workspace_bytes'])))}, state "
                  f"{human_bytes(state)} ({s['blocks']} blocks of {s['block_tokens']} tokens), up to {s['max_model_len']} "
                  f"tokens, {s['max_num_seqs']} sequences, loaded in {s['load_seconds']} s")
        more = []
        if ram := int(str(s["ram_bytes"])):
            more.append(f"{human_bytes(ram)} of memory for state beside the pool")
        if s["state_dir"]:
            more.append(f"sessions saved in {s['state_dir']}, up to {human_bytes(int(str(s['disk_bytes'])))}")
        if s["speculative"]:
            more.append(f"up to {s['num_speculative_tokens']} tokens drafted by {s['speculative']}")
        if more:
            err.print("  " + "; ".join(more))
    err.print(f"serving on [bold]http://{f'[{host}]' if ':' in host else host}:{port}[/]")
