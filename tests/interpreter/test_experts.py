"""Linear layers by expert in the interpreter."""

from __future__ import annotations

import pytest

from inferloom.targets.triton.codegen import TritonTarget
from tests.interpreter.single import Kernels
from tests.targets.expert_cases import bodies, check

LOWERING = TritonTarget.lowering
BODIES = bodies(LOWERING.weight_tile, dict(LOWERING.weight_pair), LOWERING.weight_k_multiple)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("experts", BODIES, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("name", BODIES)
def test_matches_reference_whatever_others_chose(kernels: Kernels, name: str) -> None:
    check(kernels, name)
