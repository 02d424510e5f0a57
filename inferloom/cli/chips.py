"""`inferloom chips`: what can be compiled for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inferloom.cache import require_compiler
from inferloom.cli import options
from inferloom.cli.console import emit, out, set_json, table


def chips(json_: options.Json = False) -> None:
    """List the chips that artifacts can be made for; `cpu` is this machine."""
    set_json(json_)
    require_compiler("listing chips")
    from inferloom.targets.chips import CHIPS, host_chip

    host = host_chip()
    if json_:
        emit({"cpu": host.name, "chips": [asdict(chip) for chip in CHIPS.values()]})
        return
    rows = table("Chips", "name", "triple", "features")
    for chip in CHIPS.values():
        here = "  [green]= cpu[/]" if chip.name == host.name else ""
        rows.add_row(chip.name + here, chip.triple, " ".join(chip.features))
    out.print(rows)


def describe(chip: Any) -> str:
    """One line on a chip."""
    return f"{chip.name}: {chip.triple}"
