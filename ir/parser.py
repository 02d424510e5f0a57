"""Reading the text form of graphs (see `inferloom.ir.text`)."""

from __future__ import annotations

import json
import re
import typing
from types import MappingProxyType
from typing import Any

from inferloom.ir import expr
from inferloom.ir import op as ops
from inferloom.ir.errors import InferloomError, VerifyError
from inferloom.ir.expr import Expr
from inferloom.ir.graph import Graph, Node, Param, Value
from inferloom.ir.types import Affine, Dim, DType, RecurrentType, StateType, Sym, TensorType, Type

_SPACE = re.compile(r"(\s|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_VALUE = re.compile(r"%[A-Za-z0-9_.]+")
_STRING = re.compile(r'"([^"\\\n]|\\.)*"')
_INT = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?(inf|nan|\d+(\.\d*)?(e[-+]?\d+)?)(?![A-Za-z0-9_.])")
_DTYPES = {d.value: d for d in DType}


def parse_graph(text: str) -> Graph:
    """The graph that `print_graph` printed.

    Result types may be left out and then follow from the ops' type rules. What is written is taken as it stands:
    `verify` says whether the graph is legal. VerifyError, with line and column, when the text is malformed.
    """
    parser = _Parser(text)
    graph = parser.graph()
    parser.skip()
    if parser.at < len(text):
        raise parser.error("trailing text after the graph")
    return graph


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.symbols: dict[str, Sym] = {}
        self.values: dict[str, Value] = {}

    # -- characters

    def error(self, message: str, at: int | None = None) -> VerifyError:
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        shown = self.text.split("\n")[line - 1].strip()
        return VerifyError(f"line {line}, column {column}: {message}\n  {shown}")

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def peek(self, literal: str) -> bool:
        self.skip()
        return self.text.startswith(literal, self.at)

    def accept(self, literal: str) -> bool:
        found = self.peek(literal)
        self.at += len(literal) if found else 0
        return found

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            raise self.error(f"expected {literal!r}")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        self.skip()
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def need(self, pattern: re.Pattern[str], what: str) -> str:
        found = self.match(pattern)
        if found is None:
            raise self.error(f"expected {what}")
        return found

    def string(self) -> str:
        try:
            return str(json.loads(self.need(_STRING, "a quoted string")))
        except ValueError as bad:
            raise self.error(f"bad string: {bad}") from None

    # -- graphs

    def graph(self) -> Graph:
        outer = self.symbols, self.values
        self.symbols, self.values = {}, {}
        if self.need(_NAME, "'graph'") != "graph":
            raise self.error("expected 'graph'")
        name = self.string() if self.peek('"') else self.need(_NAME, "the graph's name")
        self.header()
        inputs: list[Value] = []
        params: list[Param] = []
        nodes: list[Node] = []
        outputs: list[Value] = []
        self.expect("{")
        while True:
            start = self.at
            word = self.match(_NAME)
            if word == "return":
                break
            if word == "input":
                inputs.append(self.declare())
            elif word == "param":
                value = self.declare()
                self.expect("=")
                params.append(Param(value, self.string()))
            elif word is None and not self.peek("%"):
                raise self.error("expected a node, or 'return' and the graph's outputs")
            else:
                self.at = start
                nodes.append(self.node())
        while self.peek("%"):
            outputs.append(self.value())
            if not self.accept(","):
                break
        self.expect("}")
        self.symbols, self.values = outer
        return Graph(name, tuple(inputs), tuple(params), tuple(nodes), tuple(outputs))

    def header(self) -> None:
        self.expect("(")
        while not self.accept(")"):
            name = self.need(_NAME, "a symbol")
            self.expect("<=")
            if name in self.symbols:
                raise self.error(f"symbol {name} is declared twice")
            self.symbols[name] = Sym(name, int(self.need(_INT, "the symbol's bound")))
            if not self.peek(")"):
                self.expect(",")

    def declare(self) -> Value:
        name = self.need(_VALUE, "a value such as %x")
        self.expect(":")
        return self.define(name, self.type())

    def define(self, name: str, type: Type) -> Value:
        if name in self.values:
            raise self.error(f"{name} is defined twice")
        self.values[name] = Value(type, "" if name[1:].isdigit() else name[1:])
        return self.values[name]

    def value(self) -> Value:
        start = self.at
        name = self.need(_VALUE, "a value such as %x")
        if name not in self.values:
            raise self.error(f"{name} is used before it is defined", start)
        return self.values[name]

    # -- nodes

    def node(self) -> Node:
        self.skip()
        start = self.at
        names: list[str] = []
        if self.peek("%"):
            names.append(self.need(_VALUE, "a result"))
            while self.accept(","):
                names.append(self.need(_VALUE, "a result"))
            self.expect("=")
        op = self.need(_NAME, "the name of an op")
        operands: list[Value | None] = []
        if self.peek("%") or self.peek("_"):
            operands.append(None if self.accept("_") else self.value())
            while self.accept(","):
                operands.append(None if self.accept("_") else self.value())
        try:
            declared = ops.get(op)
            attrs = declared.check_attrs(self.attrs(declared) if self.accept("{") else {})
            types = self.types() if self.accept(":") else self.inferred(op, operands, attrs, len(names))
        except InferloomError as error:
            raise error if str(error).startswith("line ") else self.error(str(error), start) from None
        if len(types) != len(names):
            raise self.error(f"{op} has {len(names)} results but {len(types)} types", start)
        loc = self.string() if self.accept("@") else ""
        results = tuple(self.define(n, t) for n, t in zip(names, types))
        return Node(op, tuple(operands), MappingProxyType(attrs), results, loc)

    def inferred(self, op: str, operands: list[Value | None], attrs: dict[str, ops.Attr], results: int) -> list[Type]:
        made = ops.infer(op, [None if v is None else v.type for v in operands], attrs)
        if len(made) != results:
            raise VerifyError(f"{op} makes {len(made)} results, not {results}")
        return list(made)

    def attrs(self, declared: ops.OpDef) -> dict[str, ops.Attr]:
        made: dict[str, ops.Attr] = {}
        while not self.accept("}"):
            name = self.need(_NAME, "the name of an attribute")
            if name in made:
                raise self.error(f"attribute {name} is given twice")
            self.expect("=")
            wanted = declared.attr_types.get(name)
            made[name] = self.expr() if wanted is Expr or Expr in typing.get_args(wanted) else self.attr()
            if not self.peek("}"):
                self.expect(",")
        return made

    def attr(self) -> Any:
        self.skip()
        number = self.match(_NUMBER)
        if number is not None:
            if self.text[self.at:self.at + 1] == "*":  # `2*tokens`
                self.at -= len(number)
                return self.dim()
            return int(number) if _INT.fullmatch(number) else float(number)
        if self.peek('"'):
            return self.string()
        if self.accept("["):
            items = []
            while not self.accept("]"):
                items.append(self.attr())
                if not self.peek("]"):
                    self.expect(",")
            return tuple(items)
        start = self.at
        word = self.need(_NAME, "a value for the attribute")
        if word in _WORDS:
            return _WORDS[word]
        self.at = start
        if word == "graph":
            return self.graph()
        return self.dim()

    def expr(self) -> ops.Attr:
        self.skip()
        start, depth = self.at, 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if depth == 0 and (char in ",}" or char.isspace()):
                break
            depth += (char == "(") - (char == ")")
            self.at += 1
        text = self.text[start:self.at]
        try:
            return None if text == "none" else expr.parse(text)
        except InferloomError as error:
            raise self.error(str(error), start) from None

    # -- types

    def types(self) -> list[Type]:
        made = [self.type()]
        while self.accept(","):
            made.append(self.type())
        return made

    def type(self) -> Type:
        self.skip()
        start = self.at
        word = self.need(_NAME, "a type such as f32[tokens,4]")
        if word in ("kv", "latent"):
            self.expect("<")
            dtype, sizes = self.dtype(self.need(_NAME, "an element type"), start), []
            while self.accept(","):
                sizes.append(int(self.need(_INT, "a number")))
            self.expect(">")
            if len(sizes) != 4:
                raise self.error(f"state is {word}<element type,heads,k_dim,v_dim,block_tokens>", start)
            heads, k_dim, v_dim, block_tokens = sizes
            return StateType(dtype, heads, k_dim, v_dim, block_tokens, latent=word == "latent")
        if word == "rec":
            self.expect("<")
            dtype, shape = self.dtype(self.need(_NAME, "an element type"), start), []
            while self.accept(","):
                shape.append(int(self.need(_INT, "a number")))
            self.expect(">")
            return RecurrentType(dtype, tuple(shape))
        dtype, dims = self.dtype(word, start), []
        self.expect("[")
        while not self.accept("]"):
            dims.append(self.dim())
            if not self.peek("]"):
                self.expect(",")
        return TensorType(dtype, tuple(dims))

    def dtype(self, word: str, start: int) -> DType:
        if word not in _DTYPES:
            raise self.error(f"{word!r} is no element type; there are: {', '.join(_DTYPES)}", start)
        return _DTYPES[word]

    def dim(self) -> Dim:
        """`4`, `tokens`, `2*tokens`, `tokens+1` or `2*tokens+1`."""
        number = self.match(_INT)
        if number is not None and not self.accept("*"):
            return int(number)
        start = self.at
        word = self.need(_NAME, "a dimension")
        if word not in self.symbols:
            raise self.error(f"symbol {word} is not declared in the graph's header", start)
        sym = self.symbols[word]
        offset = int(self.need(_INT, "a number")) if self.accept("+") else 0
        return sym if number is None and offset == 0 else Affine(sym, int(number or 1), offset)


_WORDS: dict[str, ops.Attr] = {"true": True, "false": False, "none": None, **_DTYPES}
