"""Mixture of experts: choosing experts for each token, and linear layers whose weight depends on that choice."""

from __future__ import annotations

import numpy as np

from inferloom.ir.errors import VerifyError
from inferloom.ir.op import KERNEL, MODEL, SERVING, Tolerance, op
from inferloom.ir.types import DType, TensorType


@op("topk", tolerance=Tolerance(0.0, 0.0))
class TopK:
    """The `k` largest elements of the last axis, largest first, and where they are: f32 and i32 [..., k].

    Of equal elements the first comes first.
    """

    def infer(x: TensorType, *, k: int) -> tuple[TensorType, TensorType]:  # type: ignore[misc]
        last = x.shape[-1] if x.rank else 0
        if x.dtype is not DType.F32 or not isinstance(last, int) or not 1 <= k <= last:
            raise VerifyError(f"needs f32 with at least k={k} elements in the last axis")
        shape = (*x.shape[:-1], k)
        return TensorType(DType.F32, shape), TensorType(DType.I32, shape)

    def reference(x, *, k):  # type: ignore[no-untyped-def, misc]
        places = np.argsort(-x, axis=-1, kind="stable")[..., :k]
        return np.take_along_axis(x, places, -1), places.astype(np.int32)


@op("take", tolerance=Tolerance(0.0, 0.0))
class Take:
    """`x[..., places[..., i]]`: elements of the last axis of x [..., n] at places i32 [..., k] -> [..., k]."""

    def infer(x: TensorType, places: TensorType) -> TensorType:  # type: ignore[misc]
        if places.dtype is not DType.I32 or places.shape[:-1] != x.shape[:-1]:
            raise VerifyError("places must be i32, and equal x in all dims but the last")
        return x.with_shape(places.shape)

    def reference(x, places):  # type: ignore[no-untyped-def, misc]
        return np.take_along_axis(x, places, -1)


def expert_result(x: TensorType, choice: TensorType, experts: int, n: int, bias: TensorType | None) -> TensorType:
    """The type of a linear layer by expert; VerifyError where operands do not fit each other."""
    if x.rank != 3 or choice.rank != 2 or choice.dtype is not DType.I32 or x.shape[0] != choice.shape[0]:
        raise VerifyError("x must be [tokens, 1 or choices, k] and choice i32 [tokens, choices]")
    if x.shape[1] not in (1, choice.shape[1]):
        raise VerifyError(f"x must have 1 or {choice.shape[1]} rows a token, got {x.shape[1]}")
    if bias is not None and bias.shape != (experts, n):
        raise VerifyError(f"bias must be [{experts}, {n}], got {bias}")
    return TensorType(DType.F32, (*choice.shape, n))


def expert_product(x: np.ndarray, weight: np.ndarray, choice: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x [tokens, 1 or choices, k] by weight [experts, n, k] of each choice, plus its bias."""
    out = np.zeros((*choice.shape, weight.shape[1]), np.float32)
    rows = np.broadcast_to(x, (*choice.shape, x.shape[-1]))
    for expert in np.unique(choice):
        picked = choice == expert
        out[picked] = np.asarray(rows[picked], np.float32) @ np.asarray(weight[expert], np.float32).T
        if bias is not None:
            out[picked] += bias[expert]
    return out


@op("expert_linear", levels=(MODEL, SERVING), tolerance=Tolerance(1e-5, 1e-4))
class ExpertLinear:
    """`x[t, i] @ weight[choice[t, i]].T + bias[choice[t, i]]`: a linear layer by the expert of each token's choices.

    x [tokens, 1 or choices, k], weight [experts, n, k] ([experts, k, n] if `transposed`), choice i32 [tokens, choices],
    bias f32 [experts, n] -> f32 [tokens, choices, n].
    """

    def infer(x: TensorType, weight: TensorType, choice: TensorType, bias: TensorType | None = None,  # type: ignore[misc]
              *, transposed: bool = False) -> TensorType:
        if weight.rank != 3 or x.shape[2:] != weight.shape[1 if transposed else 2:][:1]:
            raise VerifyError("the last dim of x must be the weight's k")
        if x.dtype not in (weight.dtype, DType.F32):
            raise VerifyError("x has neither the weight's element type nor f32; insert a cast")
        return expert_result(x, choice, int(str(weight.shape[0])), int(str(weight.shape[2 if transposed else 1])), bias)

    def reference(x, weight, choice, bias=None, *, transposed):  # type: ignore[no-untyped-def, misc]
        return expert_product(x, weight.transpose(0, 2, 1) if transposed else weight, choice, bias)


@op("pack_experts", tolerance=Tolerance(0.0, 0.0))
class PackExperts:
    """`pack_linear` of each expert's weight: [experts, n, k] ([experts, k, n] if `transposed`) ->
    [experts, n/tile, k/pair, tile, pair]."""

    def infer(weight: TensorType, *, tile: int, pair: int, k_multiple: int, transposed: bool = False) -> TensorType:  # type: ignore[misc]
        if weight.rank != 3 or not weight.is_static:
            raise VerifyError(f"weight must be static [experts, n, k], got {weight}")
        if min(tile, pair, k_multiple) < 1 or k_multiple % pair:
            raise VerifyError("tile, pair and k_multiple must be positive, k_multiple a multiple of pair")
        experts, n, k = (int(str(d)) for d in weight.shape)
        n, k = (k, n) if transposed else (n, k)
        return weight.with_shape((experts, -(-n // tile), -(-k // k_multiple) * k_multiple // pair, tile, pair))

    def reference(weight, *, tile, pair, k_multiple, transposed):  # type: ignore[no-untyped-def, misc]
        weight = weight.transpose(0, 2, 1) if transposed else weight
        experts, n, k = weight.shape
        padded = np.zeros((experts, -(-n // tile) * tile, -(-k // k_multiple) * k_multiple), weight.dtype)
        padded[:, :n, :k] = weight
        return padded.reshape(experts, -1, tile, padded.shape[2] // pair, pair).transpose(0, 1, 3, 2, 4)


@op("packed_expert_linear", levels=(SERVING, KERNEL), tolerance=Tolerance(1e-5, 1e-4), foldable=False)
class PackedExpertLinear:
    """`expert_linear` over weights of `pack_experts`, of which each expert's is [n, k]."""

    def infer(x: TensorType, packed: TensorType, choice: TensorType, bias: TensorType | None = None,  # type: ignore[misc]
              *, n: int, k: int) -> TensorType:
        if packed.rank != 5 or x.shape[2:] != (k,) or x.dtype not in (packed.dtype, DType.F32):
            raise VerifyError(f"x must be [tokens, 1 or choices, {k}] in the element type of the weights or f32")
        return expert_result(x, choice, int(str(packed.shape[0])), n, bias)

    def reference(x, packed, choice, bias=None, *, n, k):  # type: ignore[no-untyped-def, misc]
        experts, tiles, steps, tile, pair = packed.shape
        weight = packed.transpose(0, 1, 3, 2, 4).reshape(experts, tiles * tile, steps * pair)[:, :n, :k]
        return expert_product(x, weight, choice, bias)
