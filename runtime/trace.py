"""Where the time of steps goes: phases of the engine, kernels of the device."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import NamedTuple

from inferloom.runtime.errors import RequestError
from inferloom.runtime.manifest import Kernel

#: What a step consists of, in order. "kernels" is the call into the device; the rest is Python. Where there are drafts,
#: "draft" comes first.
PHASES = ("schedule", "batch", "inputs", "kernels", "sample", "outputs")


class Span(NamedTuple):
    """From `start`, for `ns` nanoseconds, of step number `step`: a phase, or a kernel of the plan."""

    step: int
    name: str
    start: int
    ns: int
    kernel: Kernel | None


class Timeline:
    """Spans of the steps that run while an engine is traced (`Engine.trace`)."""

    def __init__(self, clock: Callable[[], int] = perf_counter_ns) -> None:
        self.spans: list[Span] = []
        self.steps = 0
        self._clock, self._last = clock, clock()

    def begin(self) -> None:
        """A step begins."""
        self.steps += 1
        self._last = self._clock()

    def mark(self, phase: str) -> None:
        """A phase ends, which began where the one before it ended."""
        now = self._clock()
        self.spans.append(Span(self.steps, phase, self._last, now - self._last, None))
        self._last = now

    def kernels(self, kernels: Iterable[Kernel], ns: Sequence[int]) -> None:
        """The kernels of a step, one after the other, end; with them the phase of this name."""
        at = self._last
        for kernel, time in zip(kernels, ns):
            if time:  # 0: skipped
                self.spans.append(Span(self.steps, kernel.symbol, at, time, kernel))
            at += time
        self.mark("kernels")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what https://ui.perfetto.dev and chrome://tracing read."""
        first = min((s.start for s in self.spans), default=0)
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
            for tid, name in enumerate(("engine", "kernels"))]
        for s in self.spans:
            about = {"step": s.step} if s.kernel is None else {
                "step": s.step, "kind": s.kernel.kind, "source": list(s.kernel.source)}
            events.append({"ph": "X", "pid": 1, "tid": int(s.kernel is not None), "name": s.name,
                           "ts": (s.start - first) / 1000, "dur": s.ns / 1000, "args": about})
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


class Recording:
    """The next `steps` steps of an engine, whose `trace` this is, in a file: written after them, or by `finish`.

    RequestError when the file cannot be written, before anything runs.
    """

    def __init__(self, trace: Callable[[Timeline | None], None], path: str | os.PathLike[str], steps: int) -> None:
        try:
            Path(path).touch()
        except OSError as error:
            raise RequestError(f"the trace cannot be written to {path}: {error.strerror or error}") from None
        self._trace, self._path, self._steps = trace, path, steps
        self._line: Timeline | None = Timeline()
        trace(self._line)

    def tick(self) -> None:
        """A step is over."""
        if self._line is not None and self._line.steps >= self._steps:
            self.finish()

    def finish(self) -> None:
        """Stop and write, once."""
        if self._line is not None:
            self._trace(None)
            self._line.write(self._path)
            self._line = None
