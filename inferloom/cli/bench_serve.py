"""`inferloom bench serve`: what the users of a server would see."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from inferloom.cli import options
from inferloom.cli.console import emit, out, progress, set_json, table
from inferloom.errors import MissingExtraError, UsageError


def bench_serve(
    base_url: Annotated[str, typer.Option(help="The server; any that speaks OpenAI's API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The model's name there (default: the first).", show_default=False)] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    trace: Annotated[str, typer.Option(help="chat (people) or agent (programs with many turns and pauses).")] = "chat",
    users: Annotated[int, typer.Option(min=1, help="Conversations in all.")] = 32,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each agent.")] = 30,
    rate: Annotated[float | None, typer.Option(help="Open loop: new conversations a second.", show_default=False)] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: conversations at once.",
                                                    show_default=False)] = None,
    scale: Annotated[float, typer.Option(help="Factor on all lengths.")] = 1.0,
    speed: Annotated[float, typer.Option(help="Factor by which agents' pauses are shortened.")] = 1.0,
    hold: Annotated[float | None, typer.Option("--session-hold", show_default=False, help="Make each conversation a session "
                                               "of an inferloom server, and ask it to keep the state so many seconds.")] = None,
    seconds: Annotated[float, typer.Option(help="Nothing new is asked after so long.")] = 600.0,
    slo_first: Annotated[float, typer.Option(help="Goodput counts answers whose first token came within so many "
                                                  "seconds,")] = 2.0,
    slo_gap: Annotated[float, typer.Option(help="and the others within so many on average.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Makes the trace.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="INFERLOOM_API_KEY", show_default=False, help="Sent as bearer.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", show_default=False, help="Write report and timings here as "
                                                                                        "JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(show_default=False, help="Draw the run into this file (png, svg, pdf).")] = None,
    json_: options.Json = False,
) -> None:
    """Load a server as its users would: times to the first token, between tokens and in all, and goodput."""
    set_json(json_)
    if find_spec("httpx") is None:
        raise MissingExtraError("bench serve needs httpx; run: pip install 'inferloom[bench]'")
    import httpx

    from inferloom.benchmarks.serve import report, traces
    from inferloom.benchmarks.serve.client import Client
    from inferloom.benchmarks.serve.load import run

    if endpoint not in ("completions", "chat") or trace not in ("chat", "agent"):
        raise UsageError("--endpoint is completions or chat, --trace is chat or agent")
    if rate is not None and concurrency is not None:
        raise UsageError("--rate and --concurrency exclude each other: an open loop waits for nobody")
    if min(scale, speed, seconds) <= 0 or (rate is not None and rate <= 0) or (hold is not None and hold <= 0):
        raise UsageError("--scale, --speed, --seconds, --rate and --session-hold must be more than 0")
    slo = report.Slo(slo_first, slo_gap)
    conversations = (traces.chat(users, seed, rate, scale) if trace == "chat"
                     else traces.agent(users, turns, seed, speed, scale, rate))

    async def measure() -> tuple[list[Any], str]:
        client = Client(base_url, model or "", endpoint, api_key)
        try:
            if model is None:
                found = await client.models()
                if not found:
                    raise UsageError(f"{base_url} has no model: give --model")
                client.model = found[0]
            return await run(client, conversations, concurrency or (None if rate else users), seconds, say,
                             hold), client.model
        except httpx.HTTPError as error:
            raise UsageError(f"{base_url} cannot be asked: {error}") from None
        finally:
            await client.close()

    with progress(f"asking {base_url}") as say:
        timings, name = asyncio.run(measure())
    made = {"model": name, "endpoint": endpoint, "trace": trace, "users": users, "rate": rate, "concurrency": concurrency,
            "seed": seed, "scale": scale, "speed": speed, "session_hold": hold, **report.summary(timings, slo)}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(made | {"timings": [asdict(t) for t in timings]}, indent=1) + "\n")
    if plot is not None:
        report.plot(timings, slo, plot)
    if json_:
        emit(made)
    else:
        _show(made)


def _show(made: dict[str, Any]) -> None:
    out.print(f"{made['answers']} answers of {made['model']} in {made['seconds']:.1f} s, {sum(made['errors'].values())} errors"
              + (f" ({', '.join(f'{n} x {k}' for k, n in made['errors'].items())})" if made["errors"] else ""))
    rows = table("", "seconds", "mean", "p50", "p90", "p99", right=("mean", "p50", "p90", "p99"))
    for name in ("first_token", "between_tokens", "whole_answer"):
        if name in made:
            rows.add_row(name.replace("_", " "), *(f"{made[name][p]:.3f}" for p in ("mean", "p50", "p90", "p99")))
    out.print(rows)
    out.print(f"{made['tokens_per_second']:.1f} tokens/s, {made['answers_per_second']:.2f} answers/s; goodput "
              f"{made['goodput']:.2f} answers/s ({made['met_slo']:.0%} within {made['slo']['first_token']:g} s and "
              f"{made['slo']['between_tokens']:g} s); {made['cached_tokens']} of {made['prompt_tokens']} prompt tokens cached, "
              f"{made['recomputed_tokens']} computed again")
