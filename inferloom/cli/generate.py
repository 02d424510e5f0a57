"""`inferloom run` and `inferloom chat`: text on stdout as it is made."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from inferloom.cache import CompileOptions
from inferloom.cli import options
from inferloom.cli.console import emit, err, progress, set_json
from inferloom.errors import InferloomError, UsageError

Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")]
TopK = Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens; 0 for all.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(show_default=False, help="Makes sampling repeatable.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.", show_default=False)],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Continuations of the prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    logprobs: Annotated[int | None, typer.Option(min=0, max=20, show_default=False,
                                                 help="With --json: log-probabilities of this many tokens.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt too.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say on stderr how long it took.")] = False,
    trace: Annotated[Path | None, typer.Option("--trace", show_default=False, metavar="FILE",
                                               help="Write phases and kernels of all steps as a trace for "
                                                    "ui.perfetto.dev.")] = None,
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    quant: options.Quant = None,
    quant_head: options.QuantHead = None,
    quant_embedding: options.QuantEmbedding = None,
    quant_activations: options.QuantActivations = None,
    kv_dtype: options.KvDtype = None,
    threads: options.Threads = None,
    pin: options.Pin = False,
    gpu: options.Gpu = 0,
    memory: options.Memory = None,
    speculative: options.Speculative = None,
    num_speculative_tokens: options.SpeculativeTokens = None,
    json_: options.Json = False,
) -> None:
    """Continue PROMPT. A checkpoint is compiled on first use, into the cache."""
    set_json(json_)
    if logprobs is not None and not json_:
        raise UsageError("--logprobs needs --json")
    text = sys.stdin.read() if prompt == "-" else prompt
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
                              "min_p": min_p, "seed": seed, "n": n, "stop": tuple(stop or ()), "logprobs": logprobs}
    start = time.perf_counter()
    compiling = options.compile_options(chip, dtype, max_model_len, quant, quant_head, quant_embedding, quant_activations,
                                         kv_dtype)
    arguments = _arguments(compiling, threads, pin, gpu, memory)
    arguments["speculative"] = options.speculative(speculative, num_speculative_tokens)
    from inferloom.llm import LLM, SamplingParams

    wanted = SamplingParams(**params)
    with progress(f"loading {model}") as report:
        llm = LLM(model, progress=report, **arguments)
    loaded = time.perf_counter()
    if echo and not json_ and n == 1:
        sys.stdout.write(text)
    stream = _Stream() if not json_ and n == 1 else None
    with llm, _traced(llm, trace):
        result = _checked(llm.generate([text], wanted, on_output=stream)[0])
    ended = time.perf_counter()
    outputs = [{"index": o.index, "text": o.text, "token_ids": list(o.token_ids), "finish_reason": o.finish_reason,
                "logprobs": _logprobs(o.logprobs)} for o in result.outputs]
    made = sum(len(o.token_ids) for o in result.outputs)
    if json_:
        emit({"prompt": text, "outputs": outputs,
              "usage": {"prompt_tokens": len(result.prompt_token_ids), "completion_tokens": made},
              "seconds": {"load": round(loaded - start, 4), "generate": round(ended - loaded, 4)}})
    elif stream is None:
        for output in result.outputs:
            sys.stdout.write((text if echo else "") + output.text + "\n")
    else:
        sys.stdout.write("\n")
    if stats:
        first = stream.first - loaded if stream is not None and stream.first is not None else None
        _say_stats(loaded - start, first, ended - loaded, len(result.prompt_token_ids), made, llm.stats)


@contextmanager
def _traced(llm: Any, path: Path | None) -> Iterator[None]:
    """Write what the engine does meanwhile to a file, if one is given."""
    if path is None:
        yield
        return
    from inferloom.runtime.trace import Timeline

    timeline = Timeline()
    llm.engine.trace(timeline)
    try:
        yield
    finally:
        timeline.write(path)


class _Stream:
    """Writes what is new of the first sample; remembers when the first output came."""

    def __init__(self) -> None:
        self.shown, self.first = 0, None

    first: float | None

    def __call__(self, output: Any) -> None:
        self.first = self.first or time.perf_counter()
        text = output.outputs[0].text
        sys.stdout.write(text[self.shown:])
        sys.stdout.flush()
        self.shown = len(text)


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(show_default=False, help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    quant: options.Quant = None,
    quant_head: options.QuantHead = None,
    quant_embedding: options.QuantEmbedding = None,
    quant_activations: options.QuantActivations = None,
    kv_dtype: options.KvDtype = None,
    threads: options.Threads = None,
    pin: options.Pin = False,
    gpu: options.Gpu = 0,
    memory: options.Memory = None,
    speculative: options.Speculative = None,
    num_speculative_tokens: options.SpeculativeTokens = None,
) -> None:
    """Talk with a model that has a chat template: /reset starts again, /exit (or end of input) leaves."""
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
                              "min_p": min_p, "seed": seed}
    from inferloom.llm import LLM, SamplingParams

    wanted = SamplingParams(**params)
    compiling = options.compile_options(chip, dtype, max_model_len, quant, quant_head, quant_embedding, quant_activations,
                                         kv_dtype)
    with progress(f"loading {model}") as report:
        llm = LLM(model, progress=report, speculative=options.speculative(speculative, num_speculative_tokens),
                  **_arguments(compiling, threads, pin, gpu, memory))
    with llm:
        if llm.chat_template is None:
            raise UsageError(f"{model} has no chat template; use `inferloom run`")
        _talk(lambda messages: _checked(llm.chat(messages, wanted, on_output=_Stream())).outputs[0].text, system)


def _talk(answer: Callable[[list[dict[str, str]]], str], system: str | None) -> None:
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := _ask()) is not None and line.strip() != "/exit":
        if line.strip() == "/reset":
            messages = list(opening)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": answer(messages)})
            sys.stdout.write("\n")


def _ask() -> str | None:
    if err.is_terminal:
        err.print("[bold cyan]>[/] ", end="")
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _arguments(compiling: CompileOptions, threads: int | None, pin: bool, gpu: int, memory: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {name: getattr(compiling, name) for name in (
        "chip", "dtype", "max_model_len", "quant", "quant_head", "quant_embedding", "quant_activations", "kv_dtype")}
    made["gpu"], made["pin"] = gpu, pin
    if threads is not None:
        made["threads"] = threads
    if memory is not None:
        made["memory_bytes"] = options.parse_bytes(memory)
    return made


def _checked(result: Any) -> Any:
    """The result, unless its request failed."""
    if result.error:
        raise InferloomError(f"the request failed: {result.error}")
    return result


def _logprobs(steps: Any) -> Any:
    """Per token, a map from token id (as text, since it is JSON) to log-probability and rank."""
    if steps is None:
        return None
    return [{str(token): {"logprob": value.logprob, "rank": value.rank} for token, value in step.items()}
            for step in steps]


def _say_stats(load: float, first: float | None, total: float, prompt: int, made: int, engine: Any) -> None:
    parts = [f"load {load:.2f} s", f"prompt {prompt} tokens"]
    if first is not None:
        parts.append(f"first token {first * 1000:.0f} ms")
        if made > 1:
            parts.append(f"then {(made - 1) / (total - first):.1f} tok/s")
    parts.append(f"{made} tokens in {total:.2f} s")
    if engine.drafted:
        parts.append(f"{engine.accepted} of {engine.drafted} drafts accepted, {made / engine.steps:.2f} tokens a step")
    err.print(f"[dim]{', '.join(parts)}[/]")
