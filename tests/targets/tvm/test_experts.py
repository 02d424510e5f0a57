"""Linear layers by expert on CPUs."""

from __future__ import annotations

import pytest

from inferloom.targets.tvm.codegen import CpuTarget
from tests.targets.expert_cases import bodies, check
from tests.targets.tvm.bodies import Kernels

LOWERING = CpuTarget.lowering
BODIES = bodies(LOWERING.weight_tile, dict(LOWERING.weight_pair), LOWERING.weight_k_multiple)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("experts", BODIES)


@pytest.mark.parametrize("name", BODIES)
def test_matches_reference_whatever_others_chose(kernels: Kernels, name: str) -> None:
    check(kernels, name)
