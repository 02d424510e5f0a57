"""Scalar expressions: operators, printing and parsing, evaluation on arrays, errors."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given

from inferloom.ir import expr
from inferloom.ir.errors import VerifyError
from inferloom.ir.expr import Const, Load, Var, call, maximum, minimum, parse, select, tanh
from tests.ir.strategies import EXPRS

A, B = Var("a"), Var("b")


@given(EXPRS)
def test_what_is_printed_parses_back(e: expr.Expr) -> None:
    assert repr(parse(str(e))) == repr(e)


@pytest.mark.parametrize("e,text,want", [
    (A + B, "(add a b)", 10), (2 + A, "(add 2 a)", 9), (A - B, "(sub a b)", 4), (1 - A, "(sub 1 a)", -6),
    (A * B, "(mul a b)", 21), (3 * A, "(mul 3 a)", 21), (A / B, "(div a b)", 7 / 3), (A // B, "(idiv a b)", 2),
    (A % B, "(mod a b)", 1), (A < B, "(lt a b)", False), (A <= B, "(le a b)", False), (A > B, "(lt b a)", True),
    (A >= B, "(le b a)", True), ((A > B) & (A < 8), "(and (lt b a) (lt a 8))", True),
    ((A < B) | (A < 8), "(or (lt a b) (lt a 8))", True), (~(A < B), "(not (lt a b))", True), (-A, "(neg a)", -7),
    (maximum(A, B), "(max a b)", 7), (minimum(A, 2.5), "(min a 2.5)", 2.5), (tanh(Const(0.0)), "(tanh 0.0)", 0),
    (select(A < B, A, B), "(select (lt a b) a b)", 3), (call("abs", -A), "(abs (neg a))", 7),
    (call("eq", A, 7), "(eq a 7)", True), (call("exp", Const(0.0)), "(exp 0.0)", 1),
    (Load("t0", B), "(load t0 b)", 30), (Const(float("-inf")), "-inf", -np.inf), (Const(1e-30), "1e-30", 1e-30),
])
def test_operators(e: expr.Expr, text: str, want: float) -> None:
    assert str(e) == text
    assert repr(parse(text)) == repr(e)
    assert e.evaluate({"a": 7, "b": 3, "t0": np.arange(10) * 10}) == pytest.approx(want, rel=1e-6)


def test_arrays_broadcast() -> None:
    got = (A <= B).evaluate({"a": np.arange(3)[None], "b": np.arange(3)[:, None]})
    np.testing.assert_array_equal(got, np.tril(np.ones((3, 3), bool)))


@pytest.mark.parametrize("text", ["", "(", ")", "()", "(add 1", "(add 1 2", "(add 1)", "(add 1 2 3)", "(wrong 1)",
                                  "1 2", "(load)", "(load t0)", "(load 3 4)", "(load t0 1 2)", "3x", "(add 1 2))",
                                  "-x"])
def test_malformed(text: str) -> None:
    with pytest.raises(VerifyError):
        parse(text)


def test_unknown_function() -> None:
    with pytest.raises(VerifyError, match="no scalar function sin/1; there are: add"):
        call("sin", A)


def test_docstring() -> None:
    assert doctest.testmod(expr).failed == 0
