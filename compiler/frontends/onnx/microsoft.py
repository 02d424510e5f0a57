"""Operators of onnxruntime (domain com.microsoft), as onnxruntime-genai's builder and optimum write them.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from inferloom.compiler.frontends.layout import Traced
from inferloom.compiler.frontends.onnx.file import Op, Tensor
from inferloom.compiler.frontends.onnx.importer import TOKENS, Importer, lowers
from inferloom.compiler.frontends.onnx.layers import (
    attend,
    linear,
    mask_operand,
    merge_heads,
    norm,
    past_operands,
    refuse,
    rotate,
    split_heads,
    tables,
)
from inferloom.compiler.frontends.onnx.masks import Band, Mask
from inferloom.compiler.frontends.onnx.moves import cached, cut
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.types import DType, TensorType


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
    source = ":".join(t.name for t in (packed, scales, zeros) if t is not None) + f":{bits}"
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


@lowers("com.microsoft.SkipSimplifiedLayerNormalization", "com.microsoft.SkipLayerNormalization")
def skip_norm(im: Importer, op: Op) -> tuple[Any, ...]:
    """norm(x + skip + bias); the fourth result is the sum."""
    simple = "Simplified" in op.type
    total = im.elementwise("add", im.operand(op, 0), im.operand(op, 1))
    bias = im.optional(op, 3 if simple else 4)
    total = total if bias is None else im.elementwise("add", total, bias)
    made = norm(im, op, "rms_norm" if simple else "layer_norm", total, (2,) if simple else (2, 3),
                        op.attrs.get("epsilon", 1e-12 if not simple else 1e-6))
    return made, None, None, total


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
    cos, sin = tables(im, op, (2, 3), positions, name, width)
    return rotate(im, x, cos, sin, op, bool(op.attrs.get("interleaved", 0)))


@lowers("com.microsoft.GroupQueryAttention")
def group_query_attention(im: Importer, op: Op) -> tuple[Any, ...]:
    """Causal attention of onnxruntime with a cache, and optionally rotary embeddings; packed or separate q, k, v."""
    refuse(op, smooth_softmax=0, qk_output=0, kv_cache_bit_width=0, k_quant_type="NONE", v_quant_type="NONE")
    heads, shared = int(op.attrs["num_heads"]), int(op.attrs["kv_num_heads"])
    window = int(op.attrs.get("local_window_size", -1))
    if op.attrs.get("do_rotary", 0) not in (0, 1) or not (window == -1 or 0 < window < 2**31):
        raise UnsupportedError(f"with do_rotary={op.attrs.get('do_rotary', 0)}, local_window_size={window}")
    if any(im.given(op, place) for place in range(12, len(op.inputs))) or (len(op.outputs) > 3 and op.outputs[3]):
        raise UnsupportedError("with quantised caches or an output of scores")
    past_operands(im, op, (3, 4))
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
    q, k, v = (split_heads(im, x, n) for x, n in ((q, heads), (k, shared), (v, shared)))
    if op.attrs.get("do_rotary", 0):
        positions = im.operand(op, 9) if im.given(op, 9) else Traced(im.positions, (1, TOKENS), (1,))
        cos, sin = tables(im, op, (7, 8), positions, op.inputs[9] if im.given(op, 9) else "", 0)
        q, k = (rotate(im, x, cos, sin, op, bool(op.attrs.get("rotary_interleaved", 0))) for x in (q, k))
    masks: tuple[Mask, ...] = (*mask_operand(im, op, 10), Band(max(window, 0)))
    sinks = im.optional(op, 11)
    scale = float(op.attrs.get("scale") or 1 / math.sqrt(int(str(q.shape[3]))))
    made = attend(im, q, k, v, scale=scale, masks=masks,
                  softcap=float(op.attrs.get("softcap", 0.0)),
                  sinks=None if sinks is None else im.layouts.arrange(sinks, (len(sinks.shape) - 1,)))
    return merge_heads(im, made), cached(im, k, 2), cached(im, v, 2), None


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
    q, k, v = (split_heads(im, im.operand(op, i), heads) for i in range(3))
    past = past_operands(im, op, (6, 7))
    masks: tuple[Mask, ...] = mask_operand(im, op, 5)
    if op.attrs.get("unidirectional", 0):
        masks += (Band(0, past),)
    scale = float(op.attrs.get("scale") or 1 / math.sqrt(int(str(q.shape[3]))))
    made = merge_heads(im, attend(im, q, k, v, scale=scale, masks=masks))
    return (made, cached(im, k, 2), cached(im, v, 2)) if past else (made, k, v)
