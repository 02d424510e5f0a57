"""Linear layers by expert in the interpreter."""

from __future__ import annotations

import pytest

from inferloom.targets.triton.codegen import TritonTarget
from tests.interpreter.single import Kernels
from tests.targets.expert_cases import bodies, check

LOWERING = TritonTarget.lowering
BODIES = bodies(LOWERING.weight_tile, dict(LOWERING.weight_pair), LOWERING.weight_k_multiple)


#: Whether a batch must not matter, and the body: each body once, those in bf16 where bits are compared.
QUICK = {(False, "up"), (False, "down_bias"), (False, "odd"), (False, "bf16"), (True, "odd_each"), (True, "bf16"),
         (True, "bf16_each")}


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("experts", BODIES, tmp_path_factory.mktemp("experts"), batch_invariant=request.param)


@pytest.mark.parametrize("kernels,name", [
    pytest.param(invariant, name, marks=() if (invariant, name) in QUICK else pytest.mark.slow)
    for invariant in (False, True) for name in BODIES], indirect=["kernels"])
def test_matches_reference_whatever_others_chose(kernels: Kernels, name: str) -> None:
    # The interpreter's products of float32 depend on where a row lies, a matrix unit's do not.
    check(kernels, name, exact=kernels.target.batch_invariant and name.startswith("bf16"))
