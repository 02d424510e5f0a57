"""A GPU's kernels that choose blocks of keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpreter.single import Kernels
from tests.interpreter.test_attention import pack
from tests.targets.block_cases import CASES, bodies, check


@pytest.mark.parametrize("name", CASES)
def test_means_and_scores(name: str, tmp_path: Path) -> None:
    check(Kernels("blocks", bodies(CASES[name]), tmp_path), CASES[name], pack, lambda starts: starts)
