"""Each pass on small graphs: the text it makes, and that the meaning stays."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

from inferloom.ir.text import print_graph
from tests.compiler.passes.golden import apply, difference, names

PASSES = ("canonicalize", "cse", "dce", "fold_scalars", "recognize_norm", "recognize_rotary", "recognize_activation",
          "merge_linear")


@pytest.mark.parametrize("name", names())
def test_golden(name: str) -> None:
    before, after, wanted, _ = apply(name)
    assert print_graph(after) == wanted, "see tests/compiler/passes/golden.py for how to update goldens"
    assert difference(before, after) <= 1e-5


@pytest.mark.parametrize("name", names())
def test_second_run_changes_nothing(name: str) -> None:
    _, after, _, _ = apply(name)
    module = import_module(f"inferloom.compiler.passes.{name.split('/')[0].replace('-', '_')}")
    assert print_graph(module.run(after)) == print_graph(after)


@pytest.mark.parametrize("name", PASSES)
def test_docstring_and_name(name: str) -> None:
    module = import_module(f"inferloom.compiler.passes.{name}")
    assert module.NAME == name.replace("_", "-")
    assert doctest.testmod(module).attempted > 0 and doctest.testmod(module).failed == 0
    assert any(n.startswith(f"{module.NAME}/") for n in names()), "has no golden"
