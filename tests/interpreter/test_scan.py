"""Recurrent kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.interpreter.single import Kernels
from tests.targets.scan_cases import BODIES, check


class Shuffled(Kernels):
    """Programs in random order, in a grid for more sequences than there are."""

    def run(self, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        return super().run(*args, **kwargs, shuffle=1, padded={"seqs": 7})


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Shuffled("scan", BODIES, tmp_path_factory.mktemp("scans"), batch_invariant=True)


@pytest.mark.parametrize("name", BODIES)
def test_ragged_batches_in_one_step_and_in_two(kernels: Kernels, name: str) -> None:
    check(kernels, name)


#: Token after token at level 2.
WITHOUT = {"selective_odd", "linear", "wkv_odd", "delta_rows"}


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", ["ssd", "ssd_bf16", "delta", "delta_rows", "beta", "selective_odd", "linear", "wkv_odd",
                                  "conv_odd"])
def test_chunks_of_tokens(name: str, level: int, tmp_path: Path) -> None:
    """Long sequences by chunks, and what is left after the last whole one."""
    kernels = Shuffled("scan", {name: BODIES[name]}, tmp_path, level=level)
    (kernel,) = kernels.picked.kernels
    assert ("rest" in kernel.text()) == (not name.startswith("conv") and not (level and name in WITHOUT))
    check(kernels, name, counts=(70, 1, 150, 3), exact=name.startswith("conv"))
