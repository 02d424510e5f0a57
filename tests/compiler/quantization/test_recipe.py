from __future__ import annotations

import pytest

from inferloom.compiler.quantization.recipe import Recipe, recipe
from inferloom.compiler.quantization.scheme import Scheme, parse
from inferloom.ir.errors import UnsupportedError


@pytest.mark.parametrize("options,linear,head,embedding", [
    ((None,), None, None, None), (("int8",), "int8", "int8", "int8"), (("int4",), "int4", "int8", "int8"),
    (("int4-g128-wo",), "int4-g128-wo", "int8-wo", "int8-wo"), (("int4", "int4", "none"), "int4", "int4", None),
    ((None, "int8"), None, "int8", None), (("fp8",), "fp8", "fp8", "fp8"),
])
def test_what_follows_from_options(options: tuple[str | None, ...], linear: str | None, head: str | None,
                                   embedding: str | None) -> None:
    made = recipe(*options)
    assert [s and s.name for s in (made.linear, made.head, made.embedding)] == [linear, head, embedding]
    assert made.active == any((linear, head, embedding))


def test_schemes_of_a_recipe_are_listed_once() -> None:
    assert recipe("int4", None, "fp8", "none").schemes == (parse("int4-wo"), parse("int8-wo"), parse("fp8"))
    with pytest.raises(UnsupportedError, match="choose int8 or none"):
        recipe("int4", activations="bf16")
    assert recipe("int4", stored={"a": parse("int8"), "b": Scheme("fp8", activations="none")}).schemes == (
        parse("int4"), parse("int8"), parse("fp8"))
    assert Recipe(stored={"a": parse("int8")}).active


def test_unknown_names_are_refused() -> None:
    for options in (("q4",), (None, "q4"), (None, None, "q4")):
        with pytest.raises(UnsupportedError, match="no quantisation is called 'q4'"):
            recipe(*options)
