"""Recurrent kernels in the interpreter."""

from __future__ import annotations

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
    return Shuffled("scan", BODIES, tmp_path_factory.mktemp("scans"))


@pytest.mark.parametrize("name", BODIES)
def test_ragged_batches_in_one_step_and_in_two(kernels: Kernels, name: str) -> None:
    check(kernels, name)
