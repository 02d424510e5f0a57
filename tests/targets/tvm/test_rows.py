"""Row kernels against the interpreter, at sizes that vectorise and sizes that do not, and row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from tests.targets.row_cases import CASES
from tests.targets.single import TOKENS, alone, random_inputs, tensor
from tests.targets.tvm.bodies import Kernels

COUNTS = {"tokens": 11, "rows": 3}
@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("row", CASES)


@pytest.mark.parametrize("name", CASES)
def test_matches_interpreter_and_rows_are_independent(kernels: Kernels, name: str) -> None:
    made = kernels.graphs[name]
    inputs = random_inputs(made, COUNTS)
    got = kernels.check(name, inputs, COUNTS)
    if name == "gather":
        return
    for row in (0, 4, 10):
        single = kernels.run(name, alone(inputs, made, row), {"tokens": 1})
        for whole, one in zip(got, single, strict=True):
            assert np.array_equal(whole[row], one[0], equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9])
def test_any_number_of_rows(kernels: Kernels, tokens: int) -> None:
    counts = {"tokens": tokens}
    kernels.check("norms_40", random_inputs(kernels.graphs["norms_40"], counts, seed=tokens), counts)


def test_one_function_per_argument_of_the_abi(kernels: Kernels) -> None:
    info = kernels.infos["norms_64"]
    assert info.args == tuple(range(10)) and info.grid.dim == 0
    assert kernels.infos["gather"].grid.dim == 2


def test_what_cannot_be_lowered_names_its_line() -> None:
    def body(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, 8))
        return [b.emit("pow", x, b.scalar(1.5), loc="model.py:12")]

    with pytest.raises(UnsupportedError, match="model.py:12.*pow"):
        Kernels("row", {"k": body})


def test_reducing_middle_axes_is_refused() -> None:
    def body(b: Builder) -> Sequence[Value]:
        return [b.emit("sum", b.input("x", tensor(TOKENS, 4, 8, 3)), axes=(2,), loc="model.py:3")]

    with pytest.raises(UnsupportedError, match="model.py:3.*trailing"):
        Kernels("row", {"k": body})
