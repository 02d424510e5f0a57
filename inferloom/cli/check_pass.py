"""`inferloom check-pass`: prove an attention variant."""

from __future__ import annotations

from typing import Annotated

import typer

from inferloom.cache import require_compiler
from inferloom.cli import options
from inferloom.cli.console import emit, out, progress, set_json


def check_pass(
    file: Annotated[str, typer.Argument(metavar="FILE|NAME", show_default=False,
                                        help="A pass: a .py file, or one that an installed package offers. Its code runs.")],
    gpu: Annotated[bool, typer.Option(help="Run the GPU's kernels in Triton's interpreter too.")] = True,
    speed: Annotated[bool, typer.Option(help="Time it against plain causal attention.")] = True,
    json_: options.Json = False,
) -> None:
    """Prove a pass: dense reference, prefill and decode, chunks, cache, batches, pages read. Exit status 1 if one fails."""
    set_json(json_)
    require_compiler("checking a pass")
    with progress(f"checking {file}"):
        from inferloom.checks.check_pass import check_pass as check

        results = check(file, gpu, speed)
    failed = [r.name for r in results if r.ok is False]
    if json_:
        emit({"pass": file, "ok": not failed, "results": [r.to_json() for r in results]})
    else:
        for r in results:
            mark = "[dim]    [/]" if r.ok is None else "[green]pass[/]" if r.ok else "[red]FAIL[/]"
            out.print(f"{mark} {r.name:13} {r.text}", soft_wrap=True)
        out.print(f"[red]{len(failed)} of {len(results)} failed[/]" if failed else "[green]proved[/]")
    if failed:
        raise typer.Exit(1)
