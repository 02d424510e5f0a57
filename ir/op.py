"""Op declarations: one class holds an op's type rule, attributes, NumPy reference, tolerance and meaning.

    @op("relu", pointwise=True)
    class Relu:
        "max(x, 0)."
        def infer(x: TensorType) -> TensorType: ...
        def reference(x): ...

Keyword-only parameters of `infer` are the op's attributes, with their types and defaults; positional ones are
its operands, optional where annotated `| None`, repeated where starred.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.ir.errors import UnsupportedError, VerifyError
from inferloom.ir.expr import Expr
from inferloom.ir.types import STATES, Affine, DType, RecurrentType, Shape, StateType, Sym, TensorType, Type

if typing.TYPE_CHECKING:
    from inferloom.ir.graph import Graph

Attr = typing.Union[int, float, str, bool, DType, Expr, tuple[int, ...], tuple[str, ...], Shape, "Graph", None]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an implementation may stray: |got - want| <= atol + rtol * |want|, all in float32."""

    rtol: float = 1e-5
    atol: float = 1e-5


#: What rounding operands or results to bf16 adds, relative to the largest magnitude of the result.
BF16_RELATIVE = 2.0**-7


@dataclass(frozen=True, slots=True)
class OpDef:
    """A declared op; made by the `op` decorator."""

    name: str
    doc: str
    operands: tuple[inspect.Parameter, ...]
    operand_types: Mapping[str, Any]
    attrs: Mapping[str, inspect.Parameter]
    attr_types: Mapping[str, Any]
    infer: Callable[..., Any]
    reference: Callable[..., Any] | None
    tolerance: Tolerance
    levels: tuple[str, ...]
    pointwise: bool
    foldable: bool

    def may_be_absent(self, operand: str) -> bool:
        """Whether None may stand for an operand."""
        return type(None) in typing.get_args(self.operand_types[operand])

    def check_attrs(self, attrs: dict[str, Attr]) -> dict[str, Attr]:
        """Fill in defaults; unknown, missing or wrongly typed attributes raise VerifyError."""
        for name in attrs:
            if name not in self.attrs:
                raise VerifyError(f"{self.name} has no attribute {name!r}; it has: {', '.join(self.attrs) or 'none'}")
        full: dict[str, Attr] = {}
        for name, spec in self.attrs.items():
            if name not in attrs and spec.default is inspect.Parameter.empty:
                raise VerifyError(f"{self.name} needs attribute {name!r}")
            value = attrs.get(name, spec.default)
            if not _is_a(value, self.attr_types[name]):
                raise VerifyError(f"{self.name}: attribute {name}={value!r} is not a {self.attr_types[name]}")
            full[name] = _plain(value, self.attr_types[name])
        return full


def _plain(value: Any, wanted: Any) -> Attr:
    """Numbers given for a float become one, so that equal attributes print alike."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    floats = wanted is float or (float in typing.get_args(wanted) and int not in typing.get_args(wanted))
    return float(value) if is_number and floats else value


def _is_a(value: object, wanted: Any) -> bool:
    origin = typing.get_origin(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, w) for w in typing.get_args(wanted))
    if wanted is type(None):
        return value is None
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(v, typing.get_args(wanted)[0]) for v in value)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


_OPS: dict[str, OpDef] = {}
MODEL, SERVING, KERNEL = "model", "serving", "kernel"


def op(name: str, *, tolerance: Tolerance = Tolerance(), levels: Sequence[str] = (MODEL, SERVING, KERNEL),
       pointwise: bool = False, foldable: bool = True) -> Callable[[type], type]:
    """Declare an op from a class with `infer` and `reference` (see the module's docstring).

    `pointwise` ops compute each output element from the operands' elements at the same (broadcast) place.
    `foldable` ops may be evaluated at compile time when all operands are known.
    """

    def declare(cls: type) -> type:
        if name in _OPS:
            raise VerifyError(f"op {name} is declared twice")
        infer_fn = cls.__dict__["infer"]
        reference = cls.__dict__.get("reference")
        params = inspect.signature(infer_fn).parameters.values()
        hints = typing.get_type_hints(infer_fn, vars(inspect.getmodule(cls)) | _HINT_SCOPE)
        attrs = {p.name: p for p in params if p.kind is p.KEYWORD_ONLY}
        operands = tuple(p for p in params if p.kind is not p.KEYWORD_ONLY)
        _OPS[name] = OpDef(
            name, inspect.getdoc(cls) or "", operands, {p.name: hints[p.name] for p in operands}, attrs,
            {k: hints[k] for k in attrs}, infer_fn, reference, tolerance, tuple(levels), pointwise, foldable)
        return cls

    return declare


_HINT_SCOPE: dict[str, Any] = {"DType": DType, "Expr": Expr, "Sym": Sym, "Affine": Affine, "Shape": Shape,
                               "TensorType": TensorType, "StateType": StateType, "RecurrentType": RecurrentType}


def register_hint(name: str, value: object) -> None:
    """Let op declarations name a type that is defined after this module."""
    _HINT_SCOPE[name] = value


def get(name: str) -> OpDef:
    """The declaration of an op; UnsupportedError when there is none."""
    import inferloom.ir.ops  # noqa: F401  (declares all ops on first use)

    if name not in _OPS:
        raise UnsupportedError(f"no op is called {name!r}; docs/ops.md lists the ops that are declared")
    return _OPS[name]


def all_ops() -> dict[str, OpDef]:
    """Every declared op by name, sorted."""
    get("add")
    return dict(sorted(_OPS.items()))


def infer(name: str, operands: Sequence[Type | None], attrs: Mapping[str, Attr], loc: str = "") -> tuple[Type, ...]:
    """Result types of an op; VerifyError, with the op and its operands, when the type rule does not hold."""
    declared = get(name)
    shown = ", ".join("_" if t is None else str(t) for t in operands)
    where = f"{name} {shown}" + (f"  (from {loc})" if loc else "")
    required = sum(1 for p in declared.operands if p.kind is not p.VAR_POSITIONAL and p.default is p.empty)
    repeated = any(p.kind is p.VAR_POSITIONAL for p in declared.operands)
    if len(operands) < required or (len(operands) > len(declared.operands) and not repeated):
        raise VerifyError(f"{where}: takes {required} to {len(declared.operands)} operands, got {len(operands)}")
    for i, value in enumerate(operands):
        param = declared.operands[min(i, len(declared.operands) - 1)]
        if value is None and not declared.may_be_absent(param.name):
            raise VerifyError(f"{where}: operand {param.name} is required")
        if not _is_a(value, declared.operand_types[param.name]):
            wanted = "state" if declared.operand_types[param.name] in STATES else "a tensor"
            raise VerifyError(f"{where}: operand {param.name} must be {wanted}")
    try:
        made = declared.infer(*operands, **attrs)
    except VerifyError as error:
        raise VerifyError(f"{where}: {error}") from None
    return made if isinstance(made, tuple) else (made,)


def run_reference(name: str, operands: Sequence[Any], attrs: Mapping[str, Attr]) -> tuple[np.ndarray, ...]:
    """The op's NumPy reference on arrays (state: `KVArrays`)."""
    declared = get(name)
    if declared.reference is None:
        raise UnsupportedError(f"op {name} has no NumPy reference")
    made = declared.reference(*operands, **attrs)
    return made if isinstance(made, tuple) else (made,)
