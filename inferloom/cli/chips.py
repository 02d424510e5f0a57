"""`inferloom chips`: what can be compiled for."""

from __future__ import annotations

from dataclasses import asdict

from inferloom.cli import options
from inferloom.cli.console import emit, out, set_json, table


def chips(json_: options.Json = False) -> None:
    """List the chips that artifacts can be made for; `cpu` is this machine."""
    set_json(json_)
    from inferloom.errors import UnsupportedError
    from inferloom.targets.chips import CpuChip, host
    from inferloom.targets.chips import chips as known

    try:
        here = host().name
    except UnsupportedError:
        here = None
    if json_:
        emit({"cpu": here, "chips": [asdict(chip) for chip in known().values()]})
        return
    rows = table("Chips", "name", "", "what it is", "needs")
    for chip in known().values():
        rows.add_row(chip.name, "[green]this machine[/]" if chip.name == here else "", chip.description,
                     " ".join(chip.requires) if isinstance(chip, CpuChip) else chip.arch)
    out.print(rows)
