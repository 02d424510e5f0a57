"""The CPU's kernels that choose blocks of keys."""

from __future__ import annotations

import pytest

from tests.targets.block_cases import CASES, bodies, check
from tests.targets.tvm.bodies import Kernels
from tests.targets.tvm.test_attention import pack, tiles


@pytest.mark.parametrize("name", CASES)
def test_means_and_scores(name: str) -> None:
    check(Kernels("blocks", bodies(CASES[name])), CASES[name], pack, tiles)
