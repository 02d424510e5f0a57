"""The CPU's kernels that choose blocks of keys."""

from __future__ import annotations

import pytest

from inferloom.ir.types import DType
from tests.targets.attention_cases import Case
from tests.targets.block_cases import CASES as SHARED
from tests.targets.block_cases import bodies, check
from tests.targets.tvm.bodies import Kernels
from tests.targets.tvm.test_attention import pack, tiles

CASES = SHARED | {"int8": Case(6, 2, 24, 24, DType.I8), "fp8": Case(6, 2, 24, 24, DType.F8)}


@pytest.mark.parametrize("name", CASES)
def test_means_and_scores(name: str) -> None:
    check(Kernels("blocks", bodies(CASES[name])), CASES[name], pack, tiles)
