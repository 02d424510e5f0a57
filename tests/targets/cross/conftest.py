"""The tiny checkpoint traced once; the same steps on this machine and on the chips that programs stand in for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inferloom.compiler.build import compile_model, load
from inferloom.compiler.frontends.huggingface import TracedModel
from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.manifest import Manifest
from tests.targets.cross.job import batch

LIMITS = {"max_tokens": 64, "max_seqs": 8}
#: Set where the programs must be there: what would be skipped fails.
EXPECTED = "INFERLOOM_EXPECT_EMULATORS"


def missing(what: str) -> None:
    """Skip for want of a program or library; fail where all of them are expected."""
    message = f"{what} is not installed: see docs/add-a-chip.md (Without the chip)"
    if os.environ.get(EXPECTED):
        pytest.fail(f"{EXPECTED} is set, but {message}")
    pytest.skip(message)


@pytest.fixture(scope="session")
def traced(tiny_checkpoint: Path) -> TracedModel:
    return load(tiny_checkpoint)


@pytest.fixture(scope="session")
def compiled(traced: TracedModel, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """`compiled(chip, dtype, quant, kv_dtype)`: the tiny model's artifact for a chip, compiled once."""
    made: dict[tuple[str | None, ...], Artifact] = {}

    def get(chip: str, dtype: str, quant: str | None = None, kv_dtype: str | None = None) -> Artifact:
        options = chip, dtype, quant, kv_dtype
        if options not in made:
            folder = tmp_path_factory.mktemp("cross") / "artifact"
            compile_model(traced, folder, chip=chip, dtype=dtype, quant=quant, kv_dtype=kv_dtype, **LIMITS)  # type: ignore[arg-type]
            made[options] = Artifact.open(folder, check_chip=False)
        return made[options]

    return get


def steps(m: Manifest) -> list[StepBatch]:
    """A prompt in two chunks, beside another one; a token of each; then all of the first as one prompt, elsewhere."""
    a, b = [(7 * i + 3) % 251 for i in range(38)], [(11 * i + 5) % 251 for i in range(6)]
    return [batch(m, (a[:20], 0, 0)), batch(m, (a[20:37], 20, 0), (b[:5], 0, 4)), batch(m, (b[5:], 5, 4), (a[37:], 37, 0)),
            batch(m, (a, 0, 8))]
