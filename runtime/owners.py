"""Whose a session is: its name up to the first colon. Where there is no room for all, who has most gives first."""

from __future__ import annotations

from collections.abc import Mapping


def owner_of(name: str) -> str:
    """The owner in a session's name; "" when it names none."""
    return name.partition(":")[0] if ":" in name else ""


def who_gives(held: Mapping[str, int], taker: str, more: int) -> str | None:
    """Who has to give when `taker` wants `more` and there is no room: who has most of what is `held`, if that is more than
    the taker would have. None: it is the taker who has most."""
    most = max(held, key=held.__getitem__, default=taker)
    return most if most != taker and held[most] > held.get(taker, 0) + more else None
