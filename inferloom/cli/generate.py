"""`inferloom run` and `inferloom chat`: text on stdout as it is made."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated, Any

import typer

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
    chip: options.Chip = "cpu",
    dtype: options.Dtype = "bf16",
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
    memory: options.Memory = None,
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
    arguments = _arguments(chip, dtype, max_model_len, threads, memory)
    if json_ or n > 1:
        _run_whole(model, text, params, arguments, start, echo, stats, json_)
    else:
        asyncio.run(_run_stream(model, text, params, arguments, start, echo, stats))


def _run_whole(model: Any, text: str, params: dict[str, Any], arguments: dict[str, Any], start: float,
               echo: bool, stats: bool, json_: bool) -> None:
    from inferloom.api import LLM, SamplingParams

    with progress(f"loading {model}") as report, LLM(model, progress=report, **arguments) as llm:
        loaded = time.perf_counter()
        result = _checked(llm.generate([text], SamplingParams(**params))[0])
    ended = time.perf_counter()
    outputs = [{"index": o.index, "text": o.text, "token_ids": list(o.token_ids), "finish_reason": o.finish_reason,
                "logprobs": _logprobs(o.logprobs)} for o in result.outputs]
    made = sum(len(o["token_ids"]) for o in outputs)
    if json_:
        emit({"prompt": text, "outputs": outputs,
              "usage": {"prompt_tokens": len(result.prompt_token_ids), "completion_tokens": made},
              "seconds": {"load": round(loaded - start, 4), "generate": round(ended - loaded, 4)}})
        return
    for output in outputs:
        sys.stdout.write((text if echo else "") + output["text"] + "\n")
    if stats:
        _say_stats(loaded - start, None, ended - loaded, len(result.prompt_token_ids), made)


async def _run_stream(model: Any, text: str, params: dict[str, Any], arguments: dict[str, Any], start: float,
                      echo: bool, stats: bool) -> None:
    from inferloom.api import AsyncLLM, SamplingParams

    with progress(f"loading {model}") as report:
        llm = AsyncLLM(model, progress=report, **arguments)
    try:
        loaded = time.perf_counter()
        if echo:
            sys.stdout.write(text)
        first, shown, last = None, 0, None
        async for last in llm.generate(text, SamplingParams(**params)):
            first = first or time.perf_counter()
            shown = _write_new(_checked(last).outputs[0].text, shown)
        sys.stdout.write("\n")
    finally:
        await llm.close()
    if stats and last is not None and first is not None:
        _say_stats(loaded - start, first - loaded, time.perf_counter() - loaded, len(last.prompt_token_ids),
                   len(last.outputs[0].token_ids))


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
    threads: options.Threads = None,
    memory: options.Memory = None,
) -> None:
    """Talk with a model that has a chat template: /reset starts again, /exit (or end of input) leaves."""
    params = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
              "seed": seed}
    asyncio.run(_chat(model, system, params, _arguments(chip, dtype, max_model_len, threads, memory)))


async def _chat(model: Any, system: str | None, params: dict[str, Any], arguments: dict[str, Any]) -> None:
    from inferloom.api import AsyncLLM, SamplingParams

    with progress(f"loading {model}") as report:
        llm = AsyncLLM(model, progress=report, **arguments)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    try:
        while (line := _ask()) is not None and line.strip() != "/exit":
            if line.strip() == "/reset":
                messages = list(opening)
                continue
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            prompt = llm.tokenizer.apply_chat_template(messages)
            shown, last = 0, None
            async for last in llm.generate(prompt, SamplingParams(**params)):
                shown = _write_new(_checked(last).outputs[0].text, shown)
            sys.stdout.write("\n")
            messages.append({"role": "assistant", "content": last.outputs[0].text if last else ""})
    finally:
        await llm.close()


def _ask() -> str | None:
    if err.is_terminal:
        err.print("[bold cyan]>[/] ", end="")
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _arguments(chip: str, dtype: str, max_model_len: int | None, threads: int | None,
               memory: str | None) -> dict[str, Any]:
    checked = options.compile_options(chip, dtype, max_model_len)
    made: dict[str, Any] = {"chip": checked.chip, "dtype": checked.dtype, "max_model_len": checked.max_model_len}
    if threads is not None:
        made["threads"] = threads
    if memory is not None:
        made["memory"] = options.parse_bytes(memory)
    return made


def _write_new(text: str, shown: int) -> int:
    sys.stdout.write(text[shown:])
    sys.stdout.flush()
    return len(text)


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


def _say_stats(load: float, first: float | None, total: float, prompt: int, made: int) -> None:
    parts = [f"load {load:.2f} s", f"prompt {prompt} tokens"]
    if first is not None:
        parts.append(f"first token {first * 1000:.0f} ms")
        if made > 1:
            parts.append(f"then {(made - 1) / (total - first):.1f} tok/s")
    parts.append(f"{made} tokens in {total:.2f} s")
    err.print(f"[dim]{', '.join(parts)}[/]")
