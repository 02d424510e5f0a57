"""The command line's tree: one function a command, each in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from inferloom import __version__
from inferloom.cli.bench import bench
from inferloom.cli.bench_serve import bench_serve
from inferloom.cli.check_pass import check_pass
from inferloom.cli.chips import chips
from inferloom.cli.compile import compile_
from inferloom.cli.doctor import doctor
from inferloom.cli.generate import chat, run
from inferloom.cli.inspect import inspect
from inferloom.cli.models import models
from inferloom.cli.serve import serve

app = typer.Typer(
    name="inferloom", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Shell completion: [bold]inferloom --install-completion[/].",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version.")] = False) -> None:
    """Weave any model onto any chip: compile a checkpoint once, run it anywhere with a thin runtime."""


app.command("compile")(compile_)
app.command("run")(run)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("inspect")(inspect)
app.command("chips")(chips)
app.command("models")(models)
app.command("check-pass")(check_pass)
app.command("bench")(bench)
app.command("bench-serve")(bench_serve)
app.command("doctor")(doctor)
