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
    name="inferloom", no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich's tables cut the names of options off
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Shell completion: inferloom --install-completion",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version.")] = False) -> None:
    """Weave any model onto any chip: compile a checkpoint once, run it anywhere with a thin runtime."""


app.command("compile", short_help="Compile a checkpoint for a chip.")(compile_)
app.command("run", short_help="Continue a prompt.")(run)
app.command("chat", short_help="Talk with a model.")(chat)
app.command("serve", short_help="Serve models over HTTP.")(serve)
app.command("inspect", short_help="Show what is in an artifact, and why.")(inspect)
app.command("chips", short_help="List the chips to compile for.")(chips)
app.command("models", short_help="List the architectures that compile.")(models)
app.command("check-pass", short_help="Prove a pass of your own.")(check_pass)
app.command("bench", short_help="Measure a model on this machine.")(bench)
app.command("bench-serve", short_help="Load a server and measure it.")(bench_serve)
app.command("doctor", short_help="Check this machine.")(doctor)
