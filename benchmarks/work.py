"""The work that engines are timed on, ours and others alike. Imports nothing but the standard library.

An engine is seen as one function: `generate(prompts, new)` gives each prompt, a list of token ids, exactly `new`
further ones, greedily, without stopping at an end token. Prompts are random and all different, so that no prefix is
ever found in a cache.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Generate = Callable[[list[list[int]], int], Sequence[Sequence[int]]]
PROMPT, NEW, PREFILL = 128, 128, 512


class Timed:
    """Times a block, and says which share of the machine other processes used meanwhile."""

    def __enter__(self) -> Timed:
        self._busy, self._own, self._start = _machine_seconds(), _own_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        others = (_machine_seconds() - self._busy) - (_own_seconds() - self._own)
        self.others = max(0.0, others) / (self.seconds * (os.cpu_count() or 1))


class Work:
    """Measurements over one engine; `first` and `last` bound the token ids of prompts (the last one excluded)."""

    def __init__(self, generate: Generate, first: int, last: int, seed: int = 0) -> None:
        self._generate, self._ids, self._random = generate, (first, last), random.Random(seed)
        #: What the latest measurement asked and was given: (prompt, new ids).
        self.made: list[tuple[list[int], list[int]]] = []

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(*self._ids) for _ in range(length)]

    def generate(self, count: int, prompt: int, new: int) -> tuple[float, float]:
        """Seconds, and the share of the machine that others used. ValueError when a request ends early."""
        prompts = [self.prompt(prompt) for _ in range(count)]
        with Timed() as timed:
            made = self._generate(prompts, new)
        if [len(ids) for ids in made] != [new] * count:
            raise ValueError(f"{count} requests for {new} tokens gave {[len(ids) for ids in made]}")
        self.made = [(p, list(ids)) for p, ids in zip(prompts, made)]
        return timed.seconds, timed.others

    def decode(self, batch: int, new: int = NEW) -> tuple[float, float]:
        """Tokens a second, all sequences together, over steps that prefill nothing; share of others."""
        one, _ = self.generate(batch, PROMPT, 1)
        many, others = self.generate(batch, PROMPT, new)
        return batch * (new - 1) / (many - one), others

    def prefill(self, length: int = PREFILL) -> tuple[float, float]:
        """Tokens of one prompt a second, its first new token included; share of others."""
        seconds, others = self.generate(1, length, 1)
        return length / seconds, others

    def requests(self, count: int, new: int = NEW) -> tuple[float, float]:
        """Tokens a second that so many requests at once are given, their prompts computed in the same time; others."""
        seconds, others = self.generate(count, PROMPT, new)
        return count * new / seconds, others


def _machine_seconds() -> float:
    """Seconds, over all cores, that were not idle since boot (stolen ones too)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(os.times()[:4])
