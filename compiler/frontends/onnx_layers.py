"""ONNX operators that are whole layers: products with weights, norms, rotary embeddings, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from inferloom.compiler.frontends.layout import Traced
from inferloom.compiler.frontends.onnx_file import Op, Tensor
from inferloom.compiler.frontends.onnx_import import KEYS, TOKENS, Cache, Importer, Scores, lowers, show
from inferloom.compiler.frontends.onnx_masks import Band, Mask, MaskRef
from inferloom.compiler.frontends.onnx_ops import axis_of, cached, cut, rows_of
from inferloom.compiler.symbolic import MOVES, Elements, Leaf
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Node, Value
from inferloom.ir.types import Dim, DType, TensorType

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
    made = attend(im, *(_heads(im, x) for x in (s.q, s.k, v)), scale=s.scale * (s.cap or 1.0), masks=s.masks, softcap=s.cap)
    shape = (*s.shape[:-3], made.type.shape[1], TOKENS, v.shape[-1])  # type: ignore[union-attr]
    return Traced(made, shape[-rank:], (rank - 2, rank - 3, rank - 1))


def _heads(im: Importer, x: Traced) -> Value:
    """[..., heads, tokens, dim] as a value [tokens, heads, dim]."""
    rank = len(x.shape)
    return im.layouts.arrange(x, (rank - 2, rank - 3, rank - 1))


def attend(im: Importer, q: Value, k: Value, v: Value, scale: float, masks: tuple[Mask, ...], softcap: float = 0.0,
           sinks: Value | None = None) -> Value:
    """Attention over keys and values as they are stored: heads that were repeated for the queries are not."""
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


@lowers("com.microsoft.MatMulNBits")
def matmul_nbits(im: Importer, op: Op) -> Traced:
    """x @ dequantised weight: [n, k] in blocks along k, unpacked one tensor at a time when the artifact is written."""
    n, k, bits, block = (int(op.attrs[a]) for a in ("N", "K", "bits", "block_size"))
    if bits not in (4, 8) or k % block or im.given(op, 4):
        raise UnsupportedError(f"with bits={bits}, K={k} in blocks of {block}{', g_idx' if im.given(op, 4) else ''}; "
                               "supported are 4 and 8 bits, in whole blocks, without g_idx")
    tensors = [im.graph.tensors.get(op.inputs[i]) if im.given(op, i) else None for i in (1, 2, 3)]
    packed, scales, zeros = tensors
    if packed is None or scales is None or (im.given(op, 3) and zeros is None):
        raise UnsupportedError("whose weights are not stored tensors")
    if packed.dtype != np.uint8 or packed.size * (8 // bits) != n * k or scales.size != n * k // block:
        raise UnsupportedError(f"whose weights {list(packed.shape)} and scales {list(scales.shape)} are not those of [{n}, {k}]")
    source = f"{packed.name}:{n}x{k}"
    if source not in im.sources:
        im.sources[source] = lambda: dequantised(n, k, bits, block, packed, scales, zeros)
        im.env[f"\0{source}"] = Traced(im.builder.param(source, TensorType(DType.F32, (n, k))), (n, k), (0, 1))
    weight = im.need(f"\0{source}").value
    bias = im.optional(op, 5)
    return linear(im, im.operand(op, 0), weight, None if bias is None else bias.value)


def dequantised(n: int, k: int, bits: int, block: int, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> np.ndarray:
    """f32 [n, k] of MatMulNBits: `(q - zero) * scale` in blocks along k; zero is 2^(bits-1) where it is not given."""
    blocks = k // block
    q = _unpacked(packed.read().reshape(n * blocks, -1), bits, block).reshape(n, blocks, block)
    zero: Any = 1 << (bits - 1)
    if zeros is not None and zeros.is_float:
        zero = zeros.read().astype(np.float32).reshape(n, blocks, 1)
    elif zeros is not None:
        zero = _unpacked(zeros.read().reshape(n, -1), bits, blocks).reshape(n, blocks, 1)
    return ((q - zero) * scales.read().astype(np.float32).reshape(n, blocks, 1)).reshape(n, k).astype(np.float32)


def _unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """f32 [rows, count] of rows of bytes, low bits first."""
    if bits == 4:
        data = np.stack([data & 15, data >> 4], -1).reshape(len(data), -1)
    return data[:, :count].astype(np.float32)


# Norms.


def _scaled_norm(im: Importer, op: Op, ir: str, x: Traced, places: tuple[int, ...], eps: float, axis: int = -1) -> Traced:
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
    return _scaled_norm(im, op, "rms_norm", im.operand(op, 0), (1,), op.attrs.get("epsilon", 1e-5), op.attrs.get("axis", -1))


@lowers("LayerNormalization")
def layer_norm(im: Importer, op: Op) -> Traced:
    return _scaled_norm(im, op, "layer_norm", im.operand(op, 0), (1, 2), op.attrs.get("epsilon", 1e-5),
                        op.attrs.get("axis", -1))


@lowers("com.microsoft.SkipSimplifiedLayerNormalization", "com.microsoft.SkipLayerNormalization")
def skip_norm(im: Importer, op: Op) -> tuple[Any, ...]:
    """norm(x + skip + bias); the fourth result is the sum."""
    simple = "Simplified" in op.type
    total = im.elementwise("add", im.operand(op, 0), im.operand(op, 1))
    bias = im.optional(op, 3 if simple else 4)
    total = total if bias is None else im.elementwise("add", total, bias)
    norm = _scaled_norm(im, op, "rms_norm" if simple else "layer_norm", total, (2,) if simple else (2, 3),
                        op.attrs.get("epsilon", 1e-12 if not simple else 1e-6))
    return norm, None, None, total


# Rotary embeddings.


def _rotary(im: Importer, x: Traced, cos: Traced, sin: Traced, op: Op, interleaved: bool) -> Traced:
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


def _tables(im: Importer, op: Op, places: tuple[int, int], positions: Traced, index_name: str,
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
        cos, sin = _tables(im, op, (1, 2), im.operand(op, 3), op.inputs[3], 0)
    else:
        cos, sin = im.operand(op, 1), im.operand(op, 2)
    return _rotary(im, x, cos, sin, op, bool(op.attrs.get("interleaved", 0)))


@lowers("com.microsoft.RotaryEmbedding")
def rotary_microsoft(im: Importer, op: Op) -> Traced:
    if op.attrs.get("scale", 1.0) != 1.0 or op.attrs.get("is_packed_batching", 0):
        raise UnsupportedError("with scale or is_packed_batching")
    x = im.operand(op, 0)
    first = im.structure.everywhere(im.name(op, 1))
    if all(a.shape == (1,) and a.item() == s.past for a, s in zip(first, im.structure.samples)):
        positions, name = Traced(im.positions, (1, TOKENS), (1,)), ""
    else:
        positions, name = im.operand(op, 1), op.inputs[1]
    width = int(op.attrs.get("rotary_embedding_dim", 0)) // 2
    cos, sin = _tables(im, op, (2, 3), positions, name, width)
    return _rotary(im, x, cos, sin, op, bool(op.attrs.get("interleaved", 0)))


# Attention operators.


def _split_heads(im: Importer, x: Traced, heads: int) -> Traced:
    """[batch, tokens, heads * dim] as [batch, heads, tokens, dim]; four axes stay."""
    if len(x.shape) == 4:
        return x
    width = int(str(x.shape[2]))
    if heads < 1 or width % heads:
        raise UnsupportedError(f"{heads} heads do not share the width of {show(x.shape)}")
    wide = im.layouts.view(x, (*x.shape[:2], heads, width // heads))
    shape = (wide.shape[0], wide.shape[2], wide.shape[1], wide.shape[3])
    return wide.renumber(shape, {0: 0, 1: 2, 2: 1, 3: 3})


def _merge_heads(im: Importer, value: Value) -> Traced:
    """[tokens, heads, dim] as [1, tokens, heads * dim]."""
    heads, dim = (int(str(d)) for d in _type(value).shape[1:])
    return im.layouts.view(Traced(value, (1, TOKENS, heads, dim), (1, 2, 3)), (1, TOKENS, heads * dim))


def _past(im: Importer, op: Op, places: tuple[int, int]) -> bool:
    """Whether both cache inputs are given, as caches."""
    given = [im.given(op, p) for p in places]
    if given[0] != given[1] or any(not isinstance(im.raw(op, p), Cache) for p in places if given[0]):
        raise UnsupportedError("past keys and values must both be inputs of the graph")
    return given[0]


def _mask(im: Importer, op: Op, place: int) -> tuple[Mask, ...]:
    if not im.given(op, place):
        return ()
    if op.inputs[place] in im.structure.content:
        raise UnsupportedError(f"the mask {op.inputs[place]!r} depends on what the tokens are")
    return (MaskRef(op.inputs[place]),)


def _refuse(op: Op, **usual: Any) -> None:
    """UnsupportedError for attributes that are not as usual."""
    odd = [f"{name}={op.attrs[name]}" for name, value in usual.items() if op.attrs.get(name, value) != value]
    if odd:
        raise UnsupportedError(f"with {', '.join(odd)}")


@lowers("Attention")
def attention(im: Importer, op: Op) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__Attention.html: q, k, v [batch, heads, tokens, dim] or [batch, tokens, width]."""
    _refuse(op, right_window_size=-1)
    if im.given(op, 6) or (len(op.outputs) > 3 and op.outputs[3]):
        raise UnsupportedError("with nonpad_kv_seqlen or an output of scores")
    heads, shared = int(op.attrs.get("q_num_heads", 0)), int(op.attrs.get("kv_num_heads", 0))
    flat = len(im.operand(op, 0).shape) == 3
    q, k, v = (_split_heads(im, im.operand(op, i), n) for i, n in enumerate((heads, shared, shared)))
    past = _past(im, op, (4, 5))
    masks = _mask(im, op, 3)
    window = int(op.attrs.get("left_window_size", -1)) + 1
    if op.attrs.get("is_causal", 0):
        masks += (Band(window, past),)
    elif window:
        raise UnsupportedError("with left_window_size and without is_causal")
    scale = float(op.attrs.get("scale") or 1 / math.sqrt(int(str(q.shape[3]))))
    made = attend(im, *(_heads(im, x) for x in (q, k, v)), scale=scale, masks=masks,
                  softcap=float(op.attrs.get("softcap", 0.0)))
    out = _merge_heads(im, made) if flat else Traced(made, (1, _type(made).shape[1], TOKENS, _type(made).shape[2]), (2, 1, 3))
    return (out, cached(im, k, 2), cached(im, v, 2), None) if past else (out, k, v, None)


@lowers("com.microsoft.GroupQueryAttention")
def group_query_attention(im: Importer, op: Op) -> tuple[Any, ...]:
    """Causal attention of onnxruntime with a cache, and optionally rotary embeddings; packed or separate q, k, v."""
    _refuse(op, smooth_softmax=0, qk_output=0, kv_cache_bit_width=0, k_quant_type="NONE", v_quant_type="NONE")
    heads, shared = int(op.attrs["num_heads"]), int(op.attrs["kv_num_heads"])
    if any(im.given(op, place) for place in range(12, len(op.inputs))) or (len(op.outputs) > 3 and op.outputs[3]):
        raise UnsupportedError("with quantised caches or an output of scores")
    _past(im, op, (3, 4))
    _lengths(im, op)
    q = im.operand(op, 0)
    if im.given(op, 1) != im.given(op, 2):
        raise UnsupportedError("key and value must both be given, or be packed into query")
    if im.given(op, 1):
        k, v = im.operand(op, 1), im.operand(op, 2)
    else:
        dim = int(str(q.shape[2])) // (heads + 2 * shared)
        bounds = [0, heads * dim, (heads + shared) * dim, (heads + 2 * shared) * dim]
        q, k, v = (cut(im, q, 2, a, b) for a, b in zip(bounds, bounds[1:]))
    q, k, v = (_split_heads(im, x, n) for x, n in ((q, heads), (k, shared), (v, shared)))
    if op.attrs.get("do_rotary", 0):
        positions = im.operand(op, 9) if im.given(op, 9) else Traced(im.positions, (1, TOKENS), (1,))
        cos, sin = _tables(im, op, (7, 8), positions, op.inputs[9] if im.given(op, 9) else "", 0)
        q, k = (_rotary(im, x, cos, sin, op, bool(op.attrs.get("rotary_interleaved", 0))) for x in (q, k))
    window = int(op.attrs.get("local_window_size", -1))
    masks: tuple[Mask, ...] = (*_mask(im, op, 10), Band(max(window, 0)))
    sinks = im.optional(op, 11)
    scale = float(op.attrs.get("scale") or 1 / math.sqrt(int(str(q.shape[3]))))
    made = attend(im, *(_heads(im, x) for x in (q, k, v)), scale=scale, masks=masks,
                  softcap=float(op.attrs.get("softcap", 0.0)),
                  sinks=None if sinks is None else im.layouts.arrange(sinks, (len(sinks.shape) - 1,)))
    return _merge_heads(im, made), cached(im, k, 2), cached(im, v, 2), None


def _lengths(im: Importer, op: Op) -> None:
    """seqlens_k and total_sequence_length must say that every key so far counts: no padding."""
    for place, what, less in ((5, "seqlens_k", 1), (6, "total_sequence_length", 0)):
        arrays = im.structure.everywhere(im.name(op, place))
        if any(a.size != 1 or a.item() != s.keys - less for a, s in zip(arrays, im.structure.samples)):
            raise UnsupportedError(f"{what} ({op.inputs[place]!r}) is not the number of tokens so far"
                                   + (" less one" if less else ""))


@lowers("com.microsoft.MultiHeadAttention")
def multi_head_attention(im: Importer, op: Op) -> tuple[Any, ...]:
    """Attention of onnxruntime with as many key as query heads; causal by `unidirectional` or by a mask that is added."""
    odd = [what for place, what in ((3, "bias"), (4, "key_padding_mask"), (8, "past_sequence_length"), (9, "cache_indirection"))
           if im.given(op, place)]
    if odd or not (im.given(op, 1) and im.given(op, 2)):
        raise UnsupportedError(f"with {', '.join(odd) or 'packed query, key and value'}")
    heads = int(op.attrs["num_heads"])
    q, k, v = (_split_heads(im, im.operand(op, i), heads) for i in range(3))
    past = _past(im, op, (6, 7))
    masks: tuple[Mask, ...] = _mask(im, op, 5)
    if op.attrs.get("unidirectional", 0):
        masks += (Band(0, past),)
    scale = float(op.attrs.get("scale") or 1 / math.sqrt(int(str(q.shape[3]))))
    made = _merge_heads(im, attend(im, *(_heads(im, x) for x in (q, k, v)), scale=scale, masks=masks))
    return (made, cached(im, k, 2), cached(im, v, 2)) if past else (made, k, v)
