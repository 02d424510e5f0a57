"""Recurrent kernels on CPUs."""

from __future__ import annotations

import pytest

from tests.targets.scan_cases import BODIES, check
from tests.targets.tvm.bodies import Kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("scan", BODIES)


@pytest.mark.parametrize("name", BODIES)
def test_ragged_batches_in_one_step_and_in_two(kernels: Kernels, name: str) -> None:
    check(kernels, name)
