"""Recurrent layers: ops that keep a state of fixed size for each sequence.

Each is declared once, by what one sequence does (`scan`), and becomes two ops: the model's, where all tokens are one
sequence that starts from zeros, and `paged_<name>`, where each sequence of a ragged batch reads its state from one
page and writes it to another, or the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.expr import Expr, Var
from inferloom.ir.op import KERNEL, MODEL, SERVING, Tolerance, op
from inferloom.ir.types import DType, RecurrentType, TensorType, cast_array

PAGED = "paged_"
CLOSE = Tolerance(1e-4, 1e-4)
X = Var("x")
STEP_OPERANDS = ("state", "seq_starts", "kv_lens", "pages")


@dataclass(slots=True)
class RecurrentArrays:
    """State as the NumPy reference holds it: data [pages, *shape], float32."""

    data: np.ndarray
    type: RecurrentType

    @classmethod
    def zeros(cls, type: RecurrentType, pages: int) -> RecurrentArrays:
        return cls(np.zeros((pages, *type.shape), np.float32), type)


#: The type of each recurrent op's state, from the types of its operands and its attributes.
STATE_OF: dict[str, Callable[..., RecurrentType]] = {}


def recurrence(name: str, *, ragged: tuple[str, ...], tolerance: Tolerance = CLOSE) -> Callable[[type], type]:
    """Declare a recurrent op from a class with `infer`, `state` (type rules) and `scan(state, ...) -> (out, state)`.

    `scan` sees one sequence, in float32; `ragged` names the operands that have a row for each token.
    """

    def declare(cls: type) -> type:
        infer, state, scan = (cls.__dict__[k] for k in ("infer", "state", "scan"))
        STATE_OF[name] = state
        parameters = list(inspect.signature(infer).parameters.values())
        operands = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        rows = [i for i, p in enumerate(operands) if p.name in ragged]

        def model_infer(*args: Any, slot: int, **attrs: Any) -> TensorType:
            return infer(*args, **attrs)  # type: ignore[no-any-return]

        def model_reference(*args: Any, slot: int, **attrs: Any) -> np.ndarray:
            size = tuple(TensorType(DType.F32, a.shape) if a is not None else None for a in args)
            return scan(np.zeros(state(*size, **attrs).shape, np.float32), *args, **attrs)[0]  # type: ignore[no-any-return]

        def paged_infer(held: RecurrentType, seq_starts: TensorType, kv_lens: TensorType, pages: TensorType, *args: Any,
                        **attrs: Any) -> tuple[TensorType, RecurrentType]:
            wanted = state(*args, **attrs)
            if held.shape != wanted.shape:
                raise VerifyError(f"the state must be {wanted}, got {held}")
            if any(t.dtype is not DType.I32 for t in (seq_starts, kv_lens, pages)) or pages.rank != 2:
                raise VerifyError("seq_starts, kv_lens and pages [seqs, 2] must be i32")
            return infer(*args, **attrs), held

        def paged_reference(held: RecurrentArrays, seq_starts: np.ndarray, kv_lens: np.ndarray, pages: np.ndarray, *args: Any,
                            **attrs: Any) -> tuple[np.ndarray, RecurrentArrays]:
            data, outs = held.data.copy(), []
            for i, (begin, end) in enumerate(zip(seq_starts[:-1], seq_starts[1:])):
                start = held.data[pages[i, 0]] if kv_lens[i] > end - begin else np.zeros_like(held.data[0])
                out, last = scan(start, *(a[begin:end] if j in rows else a for j, a in enumerate(args)), **attrs)
                outs.append(out)
                data[pages[i, 1]] = cast_array(last, held.type.dtype)
            return np.concatenate(outs), RecurrentArrays(data, held.type)

        doc = inspect.getdoc(cls) or ""
        slot = inspect.Parameter("slot", inspect.Parameter.KEYWORD_ONLY, annotation="int")
        first = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                   annotation="RecurrentType" if n == "state" else "TensorType") for n in STEP_OPERANDS]
        _declare(name, doc, model_infer, [*parameters, slot], model_reference, (MODEL,), tolerance)
        _declare(PAGED + name, f"`{name}` of a ragged batch: sequence i reads its state from page `pages[i, 0]`, or starts "
                 "from zeros where it has\nno tokens before these, and leaves it in `pages[i, 1]`.",
                 paged_infer, [*first, *parameters], paged_reference, (SERVING, KERNEL), tolerance)
        return cls

    return declare


def _declare(name: str, doc: str, infer: Callable[..., Any], parameters: list[inspect.Parameter], reference: Callable[..., Any],
             levels: tuple[str, ...], tolerance: Tolerance) -> None:
    infer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    infer.__annotations__ = {p.name: p.annotation for p in parameters}
    op(name, levels=levels, tolerance=tolerance, foldable=False)(
        type(name, (), {"__doc__": doc, "__module__": __name__, "infer": infer, "reference": reference}))


@recurrence("causal_conv1d", ragged=("x",))
class CausalConv1d:
    """Depthwise convolution of x [tokens, channels] over the last `width` tokens, weight [channels, width] -> f32.

    The last column of `weight` meets the token itself. `activation` maps the sum, a scalar expression over `x`.
    The state holds the last width - 1 tokens, oldest first.
    """

    def infer(x: TensorType, weight: TensorType, bias: TensorType | None = None, *,  # type: ignore[misc]
              activation: Expr = X) -> TensorType:
        if x.rank != 2 or weight.rank != 2 or weight.shape[0] != x.shape[1]:
            raise VerifyError(f"x must be [tokens, channels] and weight [channels, width], got {x} and {weight}")
        if bias is not None and bias.shape != (x.shape[1],):
            raise VerifyError(f"bias must be [{x.shape[1]}], got {bias}")
        return TensorType(DType.F32, x.shape)

    def state(x: TensorType, weight: TensorType, bias: TensorType | None = None, *,  # type: ignore[misc]
              activation: Expr = X) -> RecurrentType:
        return RecurrentType(DType.F32, (int(str(weight.shape[1])) - 1, int(str(x.shape[1]))))

    def scan(state, x, weight, bias=None, *, activation):  # type: ignore[no-untyped-def, misc]
        seen = np.concatenate([state, x])
        width = weight.shape[1]
        out = sum(seen[i:i + len(x)] * weight[:, i] for i in range(width))
        out = out if bias is None else out + bias
        return np.asarray(activation.evaluate({"x": out}), np.float32), seen[len(seen) - width + 1:]
