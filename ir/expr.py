"""Scalar expressions: what an attention variant says about one (query, key) pair.

    >>> q, k, s = Var("q_pos"), Var("k_pos"), Var("score")
    >>> visible = (k <= q) & (q - k < 128)
    >>> print(visible)
    (and (le k_pos q_pos) (lt (sub q_pos k_pos) 128))
    >>> parse(str(visible)) == visible
    True
    >>> bool(visible.evaluate({"q_pos": 130, "k_pos": 1}))
    False
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.ir.errors import VerifyError

_FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, np.add), "sub": (2, np.subtract), "mul": (2, np.multiply), "div": (2, np.divide),
    "idiv": (2, np.floor_divide), "mod": (2, np.mod), "min": (2, np.minimum), "max": (2, np.maximum),
    "lt": (2, np.less), "le": (2, np.less_equal), "eq": (2, np.equal),
    "and": (2, np.logical_and), "or": (2, np.logical_or), "not": (1, np.logical_not),
    "neg": (1, np.negative), "abs": (1, np.abs), "exp": (1, np.exp), "tanh": (1, np.tanh),
    "select": (3, np.where),
}


class Expr:
    """A scalar expression; operators build larger ones. `/` is real division, `//` integer division."""

    __slots__ = ()

    def __add__(self, o: Operand) -> Expr:
        return call("add", self, o)

    def __radd__(self, o: Operand) -> Expr:
        return call("add", o, self)

    def __sub__(self, o: Operand) -> Expr:
        return call("sub", self, o)

    def __rsub__(self, o: Operand) -> Expr:
        return call("sub", o, self)

    def __mul__(self, o: Operand) -> Expr:
        return call("mul", self, o)

    def __rmul__(self, o: Operand) -> Expr:
        return call("mul", o, self)

    def __truediv__(self, o: Operand) -> Expr:
        return call("div", self, o)

    def __floordiv__(self, o: Operand) -> Expr:
        return call("idiv", self, o)

    def __mod__(self, o: Operand) -> Expr:
        return call("mod", self, o)

    def __lt__(self, o: Operand) -> Expr:
        return call("lt", self, o)

    def __le__(self, o: Operand) -> Expr:
        return call("le", self, o)

    def __gt__(self, o: Operand) -> Expr:
        return call("lt", o, self)

    def __ge__(self, o: Operand) -> Expr:
        return call("le", o, self)

    def __and__(self, o: Operand) -> Expr:
        return call("and", self, o)

    def __or__(self, o: Operand) -> Expr:
        return call("or", self, o)

    def __invert__(self) -> Expr:
        return call("not", self)

    def __neg__(self) -> Expr:
        return call("neg", self)

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        """The value under `env` (variables: numbers or arrays that broadcast; tables: arrays)."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Expr, ...]:
        """The expressions that this one is made of."""
        return ()

    def variables(self) -> frozenset[str]:
        """The names of all variables in it."""
        return frozenset().union(*(p.variables() for p in self.parts))

    def substitute(self, old: Expr, new: Expr) -> Expr:
        """This expression with `new` wherever `old` stands in it."""
        return new if self == old else self


Operand = Expr | int | float


@dataclass(frozen=True, slots=True)
class Const(Expr):
    """A number; ints stay ints."""

    value: int | float

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        return np.float32(self.value) if isinstance(self.value, float) else self.value

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, slots=True)
class Var(Expr):
    """A variable: `score`, `q_pos`, `k_pos`, `head` or `token`."""

    name: str

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        return env[self.name]

    def variables(self) -> frozenset[str]:
        return frozenset({self.name})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Load(Expr):
    """`table[index]`; tables are the extra operands of the attention node, named t0, t1, ..."""

    table: str
    index: Expr

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        return env[self.table][self.index.evaluate(env)]

    @property
    def parts(self) -> tuple[Expr, ...]:
        return (self.index,)

    def substitute(self, old: Expr, new: Expr) -> Expr:
        return new if self == old else Load(self.table, self.index.substitute(old, new))

    def __str__(self) -> str:
        return f"(load {self.table} {self.index})"


@dataclass(frozen=True, slots=True)
class Call(Expr):
    """A function of expressions."""

    function: str
    args: tuple[Expr, ...]

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        return _FUNCTIONS[self.function][1](*(a.evaluate(env) for a in self.args))

    @property
    def parts(self) -> tuple[Expr, ...]:
        return self.args

    def substitute(self, old: Expr, new: Expr) -> Expr:
        return new if self == old else Call(self.function, tuple(a.substitute(old, new) for a in self.args))

    def __str__(self) -> str:
        return f"({self.function} {' '.join(map(str, self.args))})"


def call(function: str, *args: Operand) -> Expr:
    """Apply a named function; numbers become constants. VerifyError on an unknown name or wrong count."""
    if function not in _FUNCTIONS or _FUNCTIONS[function][0] != len(args):
        raise VerifyError(f"no scalar function {function}/{len(args)}; there are: {', '.join(_FUNCTIONS)}")
    return Call(function, tuple(a if isinstance(a, Expr) else Const(a) for a in args))


def tanh(x: Operand) -> Expr:
    return call("tanh", x)


def select(condition: Expr, then: Operand, other: Operand) -> Expr:
    return call("select", condition, then, other)


def maximum(a: Operand, b: Operand) -> Expr:
    return call("max", a, b)


def minimum(a: Operand, b: Operand) -> Expr:
    return call("min", a, b)


def parse(text: str) -> Expr:
    """The expression that `str` printed; VerifyError when malformed."""
    tokens = re.findall(r"[()]|[^\s()]+", text)
    expr, rest = _parse(tokens, text)
    if rest:
        raise VerifyError(f"trailing text in expression {text!r}")
    return expr


def _parse(tokens: list[str], text: str) -> tuple[Expr, list[str]]:
    if not tokens or tokens[0] == ")":
        raise VerifyError(f"malformed expression {text!r}")
    head, rest = tokens[0], tokens[1:]
    if head != "(":
        if re.fullmatch(r"-?\d+", head):
            return Const(int(head)), rest
        if re.fullmatch(r"-?(inf|nan|\d+(\.\d*)?(e[-+]?\d+)?)", head):
            return Const(float(head)), rest
        if not head.isidentifier():
            raise VerifyError(f"{head!r} is neither a number nor a variable in expression {text!r}")
        return Var(head), rest
    if not rest:
        raise VerifyError(f"malformed expression {text!r}")
    name, rest = rest[0], rest[1:]
    if name == "load":
        if not rest or not rest[0].isidentifier():
            raise VerifyError(f"load needs a table and an index in expression {text!r}")
        table, (index, rest) = rest[0], _parse(rest[1:], text)
        result: Expr = Load(table, index)
    else:
        args = []
        while rest and rest[0] != ")":
            arg, rest = _parse(rest, text)
            args.append(arg)
        result = call(name, *args)
    if not rest or rest[0] != ")":
        raise VerifyError(f"unbalanced parentheses in expression {text!r}")
    return result, rest[1:]
