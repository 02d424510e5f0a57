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
from inferloom.ir.op import KERNEL, MODEL, SERVING, Tolerance, op
from inferloom.ir.types import DType, RecurrentType, TensorType, cast_array

PAGED = "paged_"
CLOSE = Tolerance(1e-4, 1e-4)
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
                own = (a[begin:end] if j in rows and a is not None else a for j, a in enumerate(args))
                out, last = scan(start, *own, **attrs)
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
    """Depthwise convolution over the last `width` tokens: x [tokens, channels], weight [width, channels] -> f32 like x.

    The last row of `weight` meets the token itself. The state holds the last width - 1 tokens, oldest first.
    """

    def infer(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:  # type: ignore[misc]
        if x.rank != 2 or weight.rank != 2 or weight.shape[1] != x.shape[1]:
            raise VerifyError(f"x must be [tokens, channels] and weight [width, channels], got {x} and {weight}")
        if bias is not None and bias.shape != (x.shape[1],):
            raise VerifyError(f"bias must be [{x.shape[1]}], got {bias}")
        return TensorType(DType.F32, x.shape)

    def state(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> RecurrentType:  # type: ignore[misc]
        return RecurrentType(DType.F32, (int(str(weight.shape[0])) - 1, int(str(x.shape[1]))))

    def scan(state, x, weight, bias=None):  # type: ignore[no-untyped-def, misc]
        seen = np.concatenate([state, x])
        out = sum(seen[i:i + len(x)] * row for i, row in enumerate(weight))
        out = out if bias is None else out + bias
        return np.asarray(out, np.float32), seen[len(x):]


@recurrence("linear_attention", ragged=("q", "k", "v", "decay", "beta"))
class LinearAttention:
    """Attention without softmax, as a recurrence over a matrix S [dk, dv] for each head: a token first scales it,
    S = exp(decay) S, then adds to it, S += k u, and reads it, o = q S.

    q, k [tokens, groups, dk], v [tokens, heads, dv]; head h reads group h * groups // heads. decay is f32 [tokens, heads],
    or [tokens, heads, dk] for each row of S. With `beta` f32 [tokens, heads], u = beta * v; with `delta`,
    u = beta * (v - k S), what the state does not hold of v yet. Covers Mamba-2 (Dao & Gu 2024), gated delta networks
    (Yang et al. 2024), Kimi delta attention and lightning attention. State: [heads, dk, dv].
    """

    def infer(q: TensorType, k: TensorType, v: TensorType, decay: TensorType, beta: TensorType | None = None,  # type: ignore[misc]
              *, delta: bool = False) -> TensorType:
        if q.rank != 3 or q.shape != k.shape or v.rank != 3 or int(str(v.shape[1])) % int(str(q.shape[1])):
            raise VerifyError(f"q and k must be [tokens, groups, dk], v [tokens, heads, dv], got {q}, {k} and {v}")
        if decay.shape not in (v.shape[:2], (*v.shape[:2], k.shape[2])):
            raise VerifyError(f"decay must be [tokens, heads] or [tokens, heads, dk], got {decay}")
        if beta is None and delta or beta is not None and beta.shape != v.shape[:2]:
            raise VerifyError("the delta rule needs beta, which is [tokens, heads]")
        return TensorType(DType.F32, v.shape)

    def state(q: TensorType, k: TensorType, v: TensorType, decay: TensorType, beta: TensorType | None = None,  # type: ignore[misc]
              *, delta: bool = False) -> RecurrentType:
        heads, dk, dv = (int(str(d)) for d in (v.shape[1], k.shape[2], v.shape[2]))
        return RecurrentType(DType.F32, (heads, dk, dv))

    def scan(state, q, k, v, decay, beta=None, *, delta):  # type: ignore[no-untyped-def, misc]
        heads = v.shape[1]
        q, k = (np.repeat(x, heads // x.shape[1], 1) for x in (q, k))
        out, kept = np.zeros(v.shape, np.float32), np.exp(decay if decay.ndim == 3 else decay[..., None])
        for t in range(len(v)):
            state = state * kept[t][..., None]
            u = v[t] - np.einsum("hk,hkv->hv", k[t], state) if delta else v[t]
            state = state + np.einsum("hk,hv->hkv", k[t], u if beta is None else u * beta[t][:, None])
            out[t] = np.einsum("hk,hkv->hv", q[t], state)
        return out, state


@recurrence("selective_scan", ragged=("x", "dt", "b", "c"))
class SelectiveScan:
    """The state-space layer of Mamba (Gu & Dao 2023): h = exp(dt a) h + dt x b, y = h c, for each channel.

    x, dt [tokens, channels], a [n, channels], b, c [tokens, n] -> f32 like x. State: h [n, channels].
    """

    def infer(x: TensorType, dt: TensorType, a: TensorType, b: TensorType, c: TensorType) -> TensorType:  # type: ignore[misc]
        if x.rank != 2 or dt.shape != x.shape or a.rank != 2 or a.shape[1] != x.shape[1]:
            raise VerifyError(f"x and dt must be [tokens, channels], a [n, channels], got {x}, {dt} and {a}")
        if b.shape != c.shape or b.shape != (x.shape[0], a.shape[0]):
            raise VerifyError(f"b and c must be [tokens, {a.shape[0]}], got {b} and {c}")
        return TensorType(DType.F32, x.shape)

    def state(x: TensorType, dt: TensorType, a: TensorType, b: TensorType, c: TensorType) -> RecurrentType:  # type: ignore[misc]
        return RecurrentType(DType.F32, (int(str(a.shape[0])), int(str(a.shape[1]))))

    def scan(state, x, dt, a, b, c):  # type: ignore[no-untyped-def, misc]
        out = np.zeros(x.shape, np.float32)
        for t in range(len(x)):
            state = np.exp(dt[t] * a) * state + (dt[t] * x[t]) * b[t][:, None]
            out[t] = c[t] @ state
        return out, state


@recurrence("linear_recurrence", ragged=("x", "a"))
class LinearRecurrence:
    """h = a h + x for each channel: x, a [tokens, channels] -> f32 like x. State: h [channels]."""

    def infer(x: TensorType, a: TensorType) -> TensorType:  # type: ignore[misc]
        if x.rank != 2 or a.shape != x.shape:
            raise VerifyError(f"x and a must be [tokens, channels], got {x} and {a}")
        return TensorType(DType.F32, x.shape)

    def state(x: TensorType, a: TensorType) -> RecurrentType:  # type: ignore[misc]
        return RecurrentType(DType.F32, (int(str(x.shape[1])),))

    def scan(state, x, a):  # type: ignore[no-untyped-def, misc]
        out = np.zeros(x.shape, np.float32)
        for t in range(len(x)):
            state = a[t] * state + x[t]
            out[t] = state
        return out, state


@recurrence("wkv", ragged=("k", "v"))
class Wkv:
    """The attention of RWKV-4 (Peng et al. 2023): for each channel, the mean of v so far, the token before the last
    weighing exp(k), older ones less by exp(decay) a token, and the token itself exp(k + bonus).

    k, v [tokens, channels], decay (below 0), bonus [channels] -> f32 like k. State: [3, channels], sums of exp(k - top) v and of
    exp(k - top), and top; without tokens the second is 0.
    """

    def infer(k: TensorType, v: TensorType, decay: TensorType, bonus: TensorType) -> TensorType:  # type: ignore[misc]
        if k.rank != 2 or v.shape != k.shape or decay.shape != k.shape[1:] or bonus.shape != k.shape[1:]:
            raise VerifyError(f"k and v must be [tokens, channels], decay and bonus [channels], got {k}, {v}, {decay}, {bonus}")
        return TensorType(DType.F32, k.shape)

    def state(k: TensorType, v: TensorType, decay: TensorType, bonus: TensorType) -> RecurrentType:  # type: ignore[misc]
        return RecurrentType(DType.F32, (3, int(str(k.shape[1]))))

    def scan(state, k, v, decay, bonus):  # type: ignore[no-untyped-def, misc]
        total, weight, top = np.asarray(state, np.float32)
        top = np.where(weight > 0, top, np.float32(-1e38))
        out = np.zeros(k.shape, np.float32)
        for t in range(len(k)):
            high = np.maximum(top, k[t] + bonus)
            old, new = np.exp(top - high), np.exp(k[t] + bonus - high)
            out[t] = (old * total + new * v[t]) / (old * weight + new)
            high = np.maximum(top + decay, k[t])
            old, new = np.exp(top + decay - high), np.exp(k[t] - high)
            total, weight, top = old * total + new * v[t], old * weight + new, high
        return out, np.stack([total, weight, top])
