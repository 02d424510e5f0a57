"""What the commands print with: results on stdout, progress and errors on stderr, one JSON value for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from inferloom.cache import Progress

_PIPE_WIDTH = 160  # columns of tables that no terminal shows

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class _Mode:
    """Whether this process was asked for JSON: errors are then JSON too."""

    json = False


def set_json(value: bool) -> None:
    """Remember `--json` of the command that runs."""
    _Mode.json = value


def emit(value: Any) -> None:
    """Write `value` to stdout as one JSON document."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def fail(message: str, kind: str) -> None:
    """Report an error: text on stderr, and a JSON document on stdout if one was asked for."""
    if _Mode.json:
        emit({"error": {"type": kind, "message": message}})
    err.print(f"[bold red]error:[/] {_escape(message)}")


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A callback that shows stages as they start: a spinner on terminals, a line with the time elsewhere."""
    start = time.perf_counter()

    def line(stage: str) -> None:
        err.print(f"[dim]{time.perf_counter() - start:6.1f} s[/]  {_escape(stage)}")

    if err.is_terminal:
        with err.status(_escape(title)) as status:
            def stage(text: str) -> None:
                line(text)
                status.update(_escape(text))

            yield stage
    else:
        yield line


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style; columns named in `right` are right-aligned."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold",
                 title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def human_bytes(count: float) -> str:
    """`1234567` as `1.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def quantized(manifest: dict[str, Any]) -> str:
    """What a manifest says of quantised weights: `, 28 weights in int4, 1 in int8`, or nothing."""
    counts = manifest.get("numerics", {}).get("quantized_weights", {})
    return "".join(f", {count} weight{'s' if count > 1 else ''} in {name}" for name, count in counts.items())


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
