from __future__ import annotations

import itertools

import pytest

from inferloom.compiler.quantization.scheme import FORMATS, GROUPS, Scheme, parse
from inferloom.ir.errors import UnsupportedError


@pytest.mark.parametrize(("name", "scheme"), [
    ("int8", Scheme("int8")),
    ("int8-wo", Scheme("int8", activations="none")),
    ("int4", Scheme("int4", 32)),
    ("int4-channel", Scheme("int4", 0)),
    ("int4-g128-asym", Scheme("int4", 128, symmetric=False)),
    ("int4-g64-wo", Scheme("int4", 64, activations="none")),
    ("fp8", Scheme("fp8", activations="none")),
])
def test_names(name: str, scheme: Scheme) -> None:
    assert parse(name) == scheme
    assert str(scheme) == name


def test_every_scheme_has_a_name_that_parses_back() -> None:
    for format, group, symmetric, activations in itertools.product(FORMATS, (0, *GROUPS), (True, False), ("int8", "none")):
        if format == "fp8" and (not symmetric or activations == "int8"):
            continue
        scheme = Scheme(format, group, symmetric, activations)
        assert parse(scheme.name) == scheme


@pytest.mark.parametrize("name", ["", "int3", "int8-g48", "int4-g32-g64", "int4-asym-asym", "int8_wo", "fp8-asym"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError):
        parse(name)


@pytest.mark.parametrize("fields", [{"format": "int2"}, {"group": 48}, {"activations": "fp8"},
                                    {"format": "fp8"}, {"format": "fp8", "activations": "none", "symmetric": False}])
def test_other_schemes_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError):
        Scheme(**fields)  # type: ignore[arg-type]


def test_groups_divide_rows() -> None:
    assert Scheme("int4", 32).groups(96) == 3 and Scheme("int8").groups(97) == 1
    with pytest.raises(UnsupportedError, match="whole groups of 64"):
        Scheme("int4", 64).groups(96)


def test_bits() -> None:
    assert [parse(name).bits for name in ("int8", "int4", "fp8")] == [8, 4, 8]
