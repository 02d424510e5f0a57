"""ONNX operators that are whole layers: products with weights, norms, rotary embeddings, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from inferloom.compiler.frontends.layout import Traced
from inferloom.compiler.frontends.onnx.file import Op
from inferloom.compiler.frontends.onnx.importer import KEYS, TOKENS, Cache, Importer, Scores, lowers, show
from inferloom.compiler.frontends.onnx.masks import Band, Mask, MaskRef
from inferloom.compiler.frontends.onnx.moves import axis_of, cached, cut, rows_of
from inferloom.compiler.symbolic import MOVES, Elements, Leaf
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Node, Value
from inferloom.ir.types import Dim, TensorType

# Products with weights.


def linear(im: Importer, x: Traced, weight: Value, bias: Value | None = None) -> Traced:
    """`x @ weight.T + bias` over the last axis of x; weight [n, k]."""
    last = len(x.shape) - 1
    x = im.layouts.last(x, last)
    made = im.emit("linear", x.value, weight, bias)
    return Traced(made, (*x.shape[:-1], made.type.shape[-1]), (*x.axes[:-1], last))  # type: ignore[union-attr]


@lowers("MatMul")
def matmul(im: Importer, op: Op) -> Any:
    probabilities = im.raw(op, 0)
    if isinstance(probabilities, Scores):
        return _weighted(im, probabilities, im.operand(op, 1))
    x, tied = im.operand(op, 0), _tied(im, op.inputs[1])
    if tied:
        return linear(im, x, im.need(tied).value)
    y = im.operand(op, 1)
    rank = len(y.shape)
    if y.token_axis is None and rank >= 2 and all(d == 1 for d in y.shape[:-2]) and x.token_axis != len(x.shape) - 1:
        return linear(im, x, im.layouts.arrange(y, (rank - 1, rank - 2)))
    if x.shape[-1] == 1 and len(x.shape) == rank:
        return im.elementwise("mul", x, y)
    if rank == len(x.shape) >= 3 and x.shape[-2] is TOKENS and y.shape[-1] in (TOKENS, KEYS) and x.shape[-1] == y.shape[-2]:
        k = y.renumber((*y.shape[:-2], y.shape[-1], y.shape[-2]), {a: a for a in range(rank - 2)} | {
            rank - 1: rank - 2, rank - 2: rank - 1})
        return Scores(x, k, (*x.shape[:-1], y.shape[-1]))
    raise UnsupportedError(f"a product of {show(x.shape)} and {show(y.shape)} that is neither with a weight nor attention")


def _tied(im: Importer, name: str) -> str:
    """The embedding table whose transpose a weight is, as exporters write tied weights; "" if it is none."""
    weight = im.graph.tensors.get(name)
    for table in im.token_rows if weight is not None and len(weight.shape) == 2 else ():
        stored = im.graph.tensors.get(table)
        if stored is None or weight is None or stored.shape != weight.shape[::-1] or stored.dtype != weight.dtype:
            continue
        a, b, step = stored.read(), weight.read(), 4096
        if all(np.array_equal(a[i:i + step], b[:, i:i + step].T) for i in range(0, len(a), step)):
            return table
    return ""


@lowers("Softmax")
def softmax(im: Importer, op: Op) -> Scores:
    s = im.raw(op, 0)
    axis = op.attrs.get("axis", -1 if im.graph.opset >= 13 else 1)
    if not isinstance(s, Scores) or s.softmax or axis_of(axis, len(s.shape)) != len(s.shape) - 1:
        raise UnsupportedError("softmax other than over the keys of attention scores")
    return replace(s, softmax=True)


def _weighted(im: Importer, s: Scores, v: Traced) -> Traced:
    """Probabilities times values: the attention op. q, k, v are [..., heads, tokens, dim]."""
    rank = len(s.shape)
    if not s.softmax or len(v.shape) != rank or v.shape[-2] is not s.shape[-1]:
        raise UnsupportedError(f"a product of attention scores and {show(v.shape)} that are not its values, after a softmax")
    if any(d != 1 for d in s.shape[:-3]):
        raise UnsupportedError(f"attention over {show(s.shape)}; one axis of heads is supported")
    made = attend(im, s.q, s.k, v, scale=s.scale * (s.cap or 1.0), masks=s.masks, softcap=s.cap)
    shape = (*s.shape[:-3], made.type.shape[1], TOKENS, v.shape[-1])  # type: ignore[union-attr]
    return Traced(made, shape[-rank:], (rank - 2, rank - 3, rank - 1))


def attend(im: Importer, queries: Traced, keys: Traced, values: Traced, *, scale: float, masks: tuple[Mask, ...],
           softcap: float = 0.0, sinks: Value | None = None) -> Value:
    """Attention [tokens, heads, dim] of [..., heads, tokens, dim]; heads of keys that were repeated are stored once."""
    q, k, v = (im.layouts.arrange(x, (len(x.shape) - 2, len(x.shape) - 3, len(x.shape) - 1)) for x in (queries, keys, values))
    (q, a), (k, b) = _unscaled(im, q), _unscaled(im, k)
    fewer = [_ungrouped(im, x) for x in (k, v)]
    if _type(fewer[0]).shape[1] == _type(fewer[1]).shape[1]:
        k, v = fewer
    heads, k_heads, v_heads = (int(str(_type(x).shape[1])) for x in (q, k, v))
    if k_heads != v_heads or heads % k_heads:
        raise UnsupportedError(f"attention with {heads} query, {k_heads} key and {v_heads} value heads")
    return im.attention(q, k, v, scale * a * b, masks, softcap, sinks)


def _type(value: Value) -> TensorType:
    if not isinstance(value.type, TensorType):
        raise UnsupportedError(f"{value} is not a tensor")
    return value.type


def _producer(im: Importer) -> Callable[[Value], Node | None]:
    return {v: n for n in im.builder.nodes for v in n.results}.get


def _unscaled(im: Importer, value: Value) -> tuple[Value, float]:
    """A value and the number that it was multiplied by."""
    producer = _producer(im)
    node = producer(value)
    if node is not None and node.op == "mul":
        for x, factor in (node.operands, node.operands[::-1]):
            made = producer(factor) if factor is not None else None
            if x is not None and made is not None and made.op == "constant" and x.type == value.type:
                return x, float(str(made.attrs["value"]))
    return value, 1.0


def _ungrouped(im: Importer, value: Value) -> Value:
    """The [tokens, h, dim] whose heads `value` [tokens, H, dim] repeats in groups of H/h, or `value` itself."""
    producer = _producer(im)
    tokens, heads, dim = _type(value).shape
    best, at = value, value
    while (node := producer(at)) is not None and node.op in MOVES and node.operands[0] is not None:
        at = node.operands[0]
        shape = _type(at).shape
        few: Dim = shape[1] if len(shape) == 3 else 1
        if shape[:1] != (tokens,) or shape[-1] != dim or len(shape) not in (2, 3) or int(str(few)) >= int(str(heads)):
            continue
        if int(str(heads)) % int(str(few)) == 0 and _repeats(Elements(at, producer), at, value, int(str(few))):
            best = at
    return im.layouts.reshape(best, (tokens, _type(best).shape[1] if _type(best).rank == 3 else 1, dim))


def _repeats(elements: Elements, source: Value, value: Value, few: int) -> bool:
    """Whether element (h, d) of `value` is element (h // group, d) of `source`."""
    terms = elements.of(value)
    heads, dim = (int(str(d)) for d in _type(value).shape[1:])
    wanted = np.arange(few * dim).reshape(few, dim).repeat(heads // few, 0)
    return len(terms) == 1 and terms[0].leaves == (Leaf("", source),) and bool(
        (terms[0].coef == 1).all() and np.array_equal(terms[0].factors[0][1].reshape(heads, dim), wanted))


@lowers("Gemm")
def gemm(im: Importer, op: Op) -> Traced:
    x, weight = im.operand(op, 0), im.operand(op, 1)
    if weight.token_axis is not None or op.attrs.get("transA", 0) or len(x.shape) != 2:
        raise UnsupportedError("with a transposed first operand, or with two that depend on tokens")
    made = linear(im, x, im.layouts.arrange(weight, (0, 1) if op.attrs.get("transB", 0) else (1, 0)))
    if op.attrs.get("alpha", 1.0) != 1.0:
        made = im.elementwise("mul", made, im.constant_like(op.attrs["alpha"]))
    bias = im.optional(op, 2)
    if bias is None or op.attrs.get("beta", 1.0) == 0:
        return made
    if op.attrs.get("beta", 1.0) != 1.0:
        bias = im.elementwise("mul", bias, im.constant_like(op.attrs["beta"]))
    plain = op.attrs.get("alpha", 1.0) == 1.0 and bias.token_axis is None and bias.shape in (made.shape[1:], (1, *made.shape[1:]))
    if plain:
        node = im.builder.nodes[-1]
        value = im.emit("linear", *node.operands[:2], im.layouts.arrange(bias, (len(bias.shape) - 1,)))
        return Traced(value, made.shape, made.axes)
    return im.elementwise("add", made, bias)


# Norms.


def norm(im: Importer, op: Op, ir: str, x: Traced, places: tuple[int, ...], eps: float, axis: int = -1) -> Traced:
    rank = len(x.shape)
    if axis_of(axis, rank) != rank - 1:
        raise UnsupportedError(f"a norm over axes {axis}.. of {show(x.shape)}; over the last one is supported")
    x = im.layouts.last(x, rank - 1)
    scales = []
    for place in places:
        scale = im.optional(op, place)
        scales.append(None if scale is None else im.layouts.arrange(scale, (len(scale.shape) - 1,)))
    return Traced(im.emit(ir, x.value, *scales, eps=float(eps)), x.shape, x.axes)


@lowers("RMSNormalization", "SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
def rms_norm(im: Importer, op: Op) -> Traced:
    return norm(im, op, "rms_norm", im.operand(op, 0), (1,), op.attrs.get("epsilon", 1e-5), op.attrs.get("axis", -1))


@lowers("LayerNormalization")
def layer_norm(im: Importer, op: Op) -> Traced:
    return norm(im, op, "layer_norm", im.operand(op, 0), (1, 2), op.attrs.get("epsilon", 1e-5),
                        op.attrs.get("axis", -1))


# Rotary embeddings.


def rotate(im: Importer, x: Traced, cos: Traced, sin: Traced, op: Op, interleaved: bool) -> Traced:
    """x [batch, heads, tokens, dim] or [batch, tokens, heads * dim] turned by cos, sin [batch, tokens, r/2]."""
    if len(x.shape) == 3:
        heads, width = int(op.attrs.get("num_heads", 0)), int(str(x.shape[2]))
        if not heads:
            heads = width // (2 * int(str(cos.shape[-1])))  # com.microsoft: whole heads are turned
        if heads < 1 or width % heads:
            raise UnsupportedError(f"turns {heads} heads of {show(x.shape)}; num_heads must be given and divide the width")
        split = im.layouts.view(x, (*x.shape[:2], heads, width // heads))
        turned = _turn(im, im.layouts.arrange(split, (1, 2, 3)), cos, sin, interleaved)
        return im.layouts.view(Traced(turned, split.shape, (1, 2, 3)), x.shape)
    return Traced(_turn(im, im.layouts.arrange(x, (2, 1, 3)), cos, sin, interleaved), x.shape, (2, 1, 3))


def _turn(im: Importer, x: Value, cos: Traced, sin: Traced, interleaved: bool) -> Value:
    tables = [im.layouts.arrange(t, (len(t.shape) - 2, len(t.shape) - 1)) for t in (cos, sin)]
    return im.emit("rotary", x, *tables, interleaved=interleaved)


def tables(im: Importer, op: Op, places: tuple[int, int], positions: Traced, index_name: str,
            width: int) -> tuple[Traced, Traced]:
    """Rows of the cos and sin caches [most, r/2] for positions, cut to `width` columns (0: all)."""
    made = []
    for place in places:
        table = im.operand(op, place)
        if table.token_axis is not None or len(table.shape) != 2:
            raise UnsupportedError(f"a cache {op.inputs[place]!r} of shape {show(table.shape)}; expected [positions, columns]")
        rows = rows_of(im, table, positions, op.inputs[place], index_name)
        made.append(cut(im, rows, len(rows.shape) - 1, 0, width) if width else rows)
    return made[0], made[1]


@lowers("RotaryEmbedding")
def rotary(im: Importer, op: Op) -> Traced:
    x = im.operand(op, 0)
    if im.given(op, 3):
        cos, sin = tables(im, op, (1, 2), im.operand(op, 3), op.inputs[3], 0)
    else:
        cos, sin = im.operand(op, 1), im.operand(op, 2)
    return rotate(im, x, cos, sin, op, bool(op.attrs.get("interleaved", 0)))


# Attention operators.


def split_heads(im: Importer, x: Traced, heads: int) -> Traced:
    """[batch, tokens, heads * dim] as [batch, heads, tokens, dim]; four axes stay."""
    if len(x.shape) == 4:
        return x
    width = int(str(x.shape[2]))
    if heads < 1 or width % heads:
        raise UnsupportedError(f"{heads} heads do not share the width of {show(x.shape)}")
    wide = im.layouts.view(x, (*x.shape[:2], heads, width // heads))
    shape = (wide.shape[0], wide.shape[2], wide.shape[1], wide.shape[3])
    return wide.renumber(shape, {0: 0, 1: 2, 2: 1, 3: 3})


def merge_heads(im: Importer, value: Value) -> Traced:
    """[tokens, heads, dim] as [1, tokens, heads * dim]."""
    heads, dim = (int(str(d)) for d in _type(value).shape[1:])
    return im.layouts.view(Traced(value, (1, TOKENS, heads, dim), (1, 2, 3)), (1, TOKENS, heads * dim))


def past_operands(im: Importer, op: Op, places: tuple[int, int]) -> bool:
    """Whether both cache inputs are given, as caches."""
    given = [im.given(op, p) for p in places]
    if given[0] != given[1] or any(not isinstance(im.raw(op, p), Cache) for p in places if given[0]):
        raise UnsupportedError("past keys and values must both be inputs of the graph")
    return given[0]


def mask_operand(im: Importer, op: Op, place: int) -> tuple[Mask, ...]:
    if not im.given(op, place):
        return ()
    if op.inputs[place] in im.structure.content:
        raise UnsupportedError(f"the mask {op.inputs[place]!r} depends on what the tokens are")
    return (MaskRef(op.inputs[place]),)


def refuse(op: Op, **usual: Any) -> None:
    """UnsupportedError for attributes that are not as usual."""
    odd = [f"{name}={op.attrs[name]}" for name, value in usual.items() if op.attrs.get(name, value) != value]
    if odd:
        raise UnsupportedError(f"with {', '.join(odd)}")


@lowers("Attention")
def attention(im: Importer, op: Op) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__Attention.html: q, k, v [batch, heads, tokens, dim] or [batch, tokens, width]."""
    refuse(op, right_window_size=-1)
    if im.given(op, 6) or (len(op.outputs) > 3 and op.outputs[3]):
        raise UnsupportedError("with nonpad_kv_seqlen or an output of scores")
    heads, shared = int(op.attrs.get("q_num_heads", 0)), int(op.attrs.get("kv_num_heads", 0))
    flat = len(im.operand(op, 0).shape) == 3
    q, k, v = (split_heads(im, im.operand(op, i), n) for i, n in enumerate((heads, shared, shared)))
    past = past_operands(im, op, (4, 5))
    masks = mask_operand(im, op, 3)
    window = int(op.attrs.get("left_window_size", -1)) + 1
    if op.attrs.get("is_causal", 0):
        masks += (Band(window, past),)
    elif window:
        raise UnsupportedError("with left_window_size and without is_causal")
    scale = float(op.attrs.get("scale") or 1 / math.sqrt(int(str(q.shape[3]))))
    made = attend(im, q, k, v, scale=scale, masks=masks,
                  softcap=float(op.attrs.get("softcap", 0.0)))
    out = merge_heads(im, made) if flat else Traced(made, (1, _type(made).shape[1], TOKENS, _type(made).shape[2]), (2, 1, 3))
    return (out, cached(im, k, 2), cached(im, v, 2), None) if past else (out, k, v, None)
