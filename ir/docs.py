"""Writes docs/ops.md from the op declarations: `python -m inferloom.ir.docs [--check] [PATH]`."""

from __future__ import annotations

import argparse
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any

from inferloom.ir import op as ops
from inferloom.ir.types import STATES, DType, RecurrentType, StateType, TensorType

_FAMILIES = {"pointwise": "Pointwise", "shape": "Data movement and reductions", "nn": "Layers", "quant": "Quantised layers",
             "attention": "Attention and state", "data": "Packing", "kernel": "Kernels"}


def render() -> str:
    """The whole page, from the declarations alone."""
    declared = list(ops.all_ops().values())
    parts = ["# Ops\n", "Made by `python -m inferloom.ir.docs`; CI fails when it is out of date. "
             f"{len(declared)} ops. Shapes are `[a, b]`; `?` marks operands that may be absent, `*` any number. "
             "An op whose levels include `kernel` may stand in the body of a kernel. The tolerance is "
             "how far an implementation may stray from the NumPy reference: `|got - want| <= atol + rtol * |want|`; "
             f"rounding to bf16 adds {ops.BF16_RELATIVE} of the largest magnitude.\n"]
    families: dict[str, list[ops.OpDef]] = {name: [] for name in _FAMILIES}
    for op in declared:
        families.setdefault(op.infer.__module__.rpartition(".")[2], []).append(op)
    for name, members in families.items():
        if members:
            parts.append(f"## {_FAMILIES.get(name, name)}\n")
            parts.extend(_section(op) for op in members)
    return "\n".join(parts)


def _section(op: ops.OpDef) -> str:
    lines = [f"### `{op.name}`\n", op.doc + "\n"]
    operands = [_operand(p, op.operand_types[p.name]) for p in op.operands]
    lines.append(f"- operands: {', '.join(operands) or 'none'}")
    for name, parameter in op.attrs.items():
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"default {_value(parameter.default)}"
        lines.append(f"- attribute `{name}`: {_type(op.attr_types[name])}, {default}")
    lines.append(f"- levels: {', '.join(op.levels)}")
    tolerance = op.tolerance
    lines.append("- tolerance: " + (f"rtol {tolerance.rtol:g}, atol {tolerance.atol:g}"
                                    if tolerance.rtol or tolerance.atol else "exact"))
    traits = [t for t, holds in (("pointwise", op.pointwise), ("evaluated at compile time when all operands are known",
                                                               op.foldable)) if holds]
    if traits:
        lines.append(f"- traits: {'; '.join(traits)}")
    return "\n".join(lines) + "\n"


def _operand(parameter: inspect.Parameter, wanted: Any) -> str:
    absent = type(None) in typing.get_args(wanted)
    mark = "*" if parameter.kind is parameter.VAR_POSITIONAL else "?" if absent else ""
    return f"`{parameter.name}{mark}`" + (" (state)" if wanted in STATES else "")


def _value(value: object) -> str:
    if value is None:
        return "`none`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if isinstance(value, DType) else f"`{value!r}`".replace("'", '"')


_TYPES = {str: "string", DType: "element type", TensorType: "tensor", StateType: "state", RecurrentType: "state",
          type(None): "none"}


def _type(wanted: Any) -> str:
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        return " or ".join(_type(w) for w in typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)[0]
        return "shape" if typing.get_origin(inner) in (types.UnionType, typing.Union) else f"list of {_type(inner)}"
    return _TYPES.get(wanted) or {"Expr": "scalar expression", "Graph": "graph"}.get(wanted.__name__, wanted.__name__)


def main(arguments: list[str] | None = None) -> int:
    """Write the page (`-`: to standard output), or with `--check` fail when the file differs."""
    parser = argparse.ArgumentParser(prog="python -m inferloom.ir.docs", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/ops.md"), help="default: docs/ops.md")
    parser.add_argument("--check", action="store_true", help="fail when the file is out of date")
    options = parser.parse_args(arguments)
    if str(options.path) == "-":
        print(render(), end="")
        return 0
    if not options.check:
        options.path.write_text(render(), encoding="utf-8")
        return 0
    if options.path.is_file() and options.path.read_text(encoding="utf-8") == render():
        return 0
    print(f"{options.path} is out of date: run `python -m inferloom.ir.docs {options.path}`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
