"""Kernels behind a mocked driver: where it is told to launch one, its source runs in the interpreter on the memory
that the launcher passed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from inferloom.checks.interpreter import TORCH, load_module


class Address:
    """A kernel's argument that is an address of the mocked device."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def interpreted(source: str, folder: Path) -> dict[str, Callable[..., None]]:
    """The kernels of an artifact as functions of a grid and addresses."""
    from triton.runtime import interpreter

    # Addresses need no copies to the host and back: they are the host's.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    module = load_module(source, folder)
    made = {}
    for name, comment in re.findall(r"\ndef (\w+)\([^)]*\):\n    # (.*)\n", source):
        types = [TORCH[part.split(": ")[1]] for part in comment.split(", ") if ": *" in part]
        if types:
            made[name] = _function(getattr(module, name), types)
    return made


def _function(kernel: object, types: list[torch.dtype]) -> Callable[..., None]:
    def run(grid: int, *params: int) -> None:
        with np.errstate(all="ignore"):
            kernel[(grid,)](*(Address(p, t) for p, t in zip(params, types)))  # type: ignore[index]

    return run
