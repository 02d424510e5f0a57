"""Where in a model's source an operator comes from."""

from __future__ import annotations

import re

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_NOT_MODEL = ("/torch/", "/inferloom/compiler/frontends/", "/compiler/frontends/")


def location(stack_trace: str) -> str:
    """`modeling_llama.py:123` from a recorded stack trace: the innermost frame of the model's own file."""
    frames = [(f, n) for f, n in _FRAME.findall(stack_trace) if not any(part in f for part in _NOT_MODEL)]
    own = [frame for frame in frames if "/modeling_" in frame[0] and "/transformers/models/" in frame[0]]
    chosen = own or frames
    return f"{chosen[-1][0].rsplit('/', 1)[-1]}:{chosen[-1][1]}" if chosen else ""
