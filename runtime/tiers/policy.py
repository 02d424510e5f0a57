"""Where the state of a paused session waits best: what it costs in bytes held times seconds.

While a session pauses, its state can stay in the pool, wait in memory or on disk, or be thrown away and computed again.
Each wastes memory of the pool for some time (the measure of InferCept, https://arxiv.org/abs/2402.01869):

    keep     its bytes x pause, in so far as the pool is short of room
    move     (its bytes + those of all who run) x (time to copy it out + time to read it back)
    discard  (its bytes + those of all who run) x time to compute its tokens again

Who runs meanwhile has to wait, so that their bytes are wasted as well. All is divided by the session's bytes, so that seconds
are compared. Writing to disk costs no step and is not counted. Speeds are measured where the engine runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PLACES = ("keep", "ram", "disk", "discard")
#: Weight of the newest measurement in a running average.
NEW = 0.2


@dataclass(slots=True)
class Rate:
    """A running average of amount per second; `guess` until something was measured."""

    guess: float
    measured: bool = False

    def add(self, amount: float, seconds: float) -> None:
        if amount <= 0 or seconds <= 0:
            return
        rate = amount / seconds
        self.guess = rate if not self.measured else self.guess + NEW * (rate - self.guess)
        self.measured = True


@dataclass(slots=True)
class Costs:
    """Measured speeds: prompt tokens computed per second, bytes per second to and from memory, and read from disk."""

    compute: Rate
    ram: Rate
    disk: Rate

    @classmethod
    def unknown(cls) -> Costs:
        """Guesses that favour keeping what is there, until the first measurements come in."""
        return cls(Rate(500.0), Rate(4e9), Rate(400e6))

    def seconds(self, place: str, *, tokens: int, bytes: int, pause: float, pressure: float, running: int = 0) -> float:
        """Seconds for which the session's bytes are wasted in `place`, for a pause of so many seconds.

        `pressure`: 0 to 1, the share of the pool that is held or cached for others. `running`: bytes of the pool that
        are held by who runs.
        """
        if place == "keep":
            return pause * pressure
        stall = 1 + running / max(bytes, 1)
        if place == "discard":
            return stall * tokens / self.compute.guess
        return stall * (bytes / self.ram.guess + bytes / (self.ram if place == "ram" else self.disk).guess)

    def order(self, places: Iterable[str], *, tokens: int, bytes: int, pause: float, pressure: float,
              running: int = 0) -> list[str]:
        """The cheapest of `places` first, equals as they are given."""
        return sorted(places, key=lambda place: self.seconds(place, tokens=tokens, bytes=bytes, pause=pause, pressure=pressure,
                                                             running=running))
