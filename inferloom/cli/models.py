"""`inferloom models`: which architectures compile."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from inferloom.cli import options
from inferloom.cli.console import emit, out, set_json, table


def models(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", show_default=False,
                                                      help="Only architectures whose names hold one of these.")] = None,
    json_: options.Json = False,
) -> None:
    """List the architectures of transformers: which compile for what, and why the others do not."""
    set_json(json_)
    from inferloom.compiler.architectures import MARKS, load

    shown = [a for a in load() if not names or any(n in a.name for n in names)]
    if json_:
        emit({"architectures": [asdict(a) for a in shown]})
        return
    rows = table("Architectures", "name", *MARKS, "state", "why not")
    for a in shown:
        marks = ["[green]yes[/]" if getattr(a, mark) else "[red]no[/]" for mark in MARKS]
        rows.add_row(a.name, *marks, ", ".join(a.state), a.why)
    out.print(rows)
    out.print(", ".join(f"{sum(getattr(a, mark) for a in shown)} {mark}" for mark in MARKS) + f" of {len(shown)}")
