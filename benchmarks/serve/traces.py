"""What is asked, by whom and when: made of a seed, the same for every server.

`chat`: people who ask and leave. Lengths are lognormal, around those of shared conversations of chat assistants (about 200
words in, 150 out), and people ask one to four times in a row.

`agent`: programs that share a long system prompt, work through many turns, and wait for tools in between. Pauses are
lognormal with a median of 5.2 s and 81 s at the 99th percentile, as in published traces of coding agents; `speed` shortens
all of them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

#: Median and 99th percentile of an agent's pause, in seconds.
PAUSE_MEDIAN, PAUSE_P99 = 5.2, 81.0
_SIGMA = math.log(PAUSE_P99 / PAUSE_MEDIAN) / 2.326
_SYLLABLES = ("ka", "lo", "mi", "re", "su", "ta", "ve", "no", "pi", "du", "sha", "bor", "lin", "gre")


@dataclass(frozen=True, slots=True)
class Turn:
    """What is said next: `text`, at most `max_tokens` of answer, `pause` seconds after the answer before."""

    text: str
    max_tokens: int
    pause: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """One user's turns, the first at `arrival` seconds (open loop), after what `system` says."""

    name: str
    system: str
    turns: tuple[Turn, ...]
    arrival: float = 0.0


def words(r: random.Random, count: int) -> str:
    """So many made-up words."""
    return " ".join("".join(r.choices(_SYLLABLES, k=r.randrange(1, 4))) for _ in range(count))


def _lognormal(r: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(median * math.exp(r.gauss(0, sigma)))))


def chat(count: int, seed: int = 0, rate: float | None = None, scale: float = 1.0) -> list[Conversation]:
    """So many people; with a `rate`, they arrive at so many a second (Poisson), else all at once."""
    r, arrival, made = random.Random(seed), 0.0, []
    for i in range(count):
        arrival += r.expovariate(rate) if rate else 0.0
        turns = tuple(Turn(words(r, _lognormal(r, 200 * scale, 0.9, round(1000 * scale) or 1)),
                           _lognormal(r, 150 * scale, 0.7, round(600 * scale) or 1), 0.0 if t == 0 else r.uniform(1, 8))
                      for t in range(r.choice((1, 1, 1, 2, 2, 3, 4))))
        made.append(Conversation(f"user-{i}", "", turns, arrival))
    return made


def agent(count: int, turns: int = 30, seed: int = 0, speed: float = 1.0, scale: float = 1.0,
          rate: float | None = None) -> list[Conversation]:
    """So many agents with `turns` turns each, all behind the same system prompt."""
    r, arrival, made = random.Random(seed), 0.0, []
    system = words(r, round(600 * scale) or 1)
    for i in range(count):
        arrival += r.expovariate(rate) if rate else 0.0
        steps = tuple(Turn(words(r, _lognormal(r, 60 * scale, 0.6, round(300 * scale) or 1)),
                           _lognormal(r, 40 * scale, 0.5, round(120 * scale) or 1),
                           0.0 if t == 0 else PAUSE_MEDIAN * math.exp(r.gauss(0, _SIGMA)) / speed) for t in range(turns))
        made.append(Conversation(f"agent-{i}", system, steps, arrival))
    return made
