"""fp8 weights with a scale for each block, or one for all: `weight` and `weight_scale_inv` (or `weight_scale`).

    weight[n, k] = q[n, k] * scale[n // block, k // block]

Written by transformers' FineGrainedFP8Config (DeepSeek-V3, Qwen3-FP8), where "inv" only says that it is multiplied by, and
by vLLM's fp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inferloom.compiler.frontends.quantized.weight import Integers, QuantizedWeight, quantized_weight, spread
from inferloom.compiler.frontends.weights import Tensor
from inferloom.ir.errors import UnsupportedError

SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "activation_scale", "k_scale", "v_scale")


def decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The checkpoint's tensors with a float `NAME.weight` for each fp8 one."""
    block = config.get("weight_block_size")
    if block is not None and (len(block) != 2 or not all(isinstance(d, int) and d > 0 for d in block)):
        raise UnsupportedError(f"fp8 with weight_block_size={block!r}: two numbers of rows and columns are expected")
    made: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and tensor.dtype == "F8_E4M3":
            made[name] = _weight(module, stored, block)
        elif part not in (*SCALES, *_UNUSED):
            made[name] = tensor
    return made, ("the checkpoint's scheme of activations is not used: they keep the artifact's own type",)


def _weight(module: str, stored: Mapping[str, Tensor], block: list[int] | None) -> QuantizedWeight:
    weight = stored[f"{module}.weight"]
    scale = next((stored[f"{module}.{s}"] for s in SCALES if f"{module}.{s}" in stored), None)
    if scale is None or len(weight.shape) != 2 or 0 in weight.shape or scale.dtype not in ("F32", "BF16", "F16"):
        raise UnsupportedError(f"{module}: a matrix of fp8 weights with a {SCALES[0]} is expected")
    n, k = weight.shape
    rows, columns = block or (0, 0)
    scales = spread(module, scale.read().astype(np.float32), n, k, rows, columns)
    where = None if k % (columns or k) == 0 else np.arange(k) // columns

    def integers() -> Integers:
        return Integers(weight.read(), scales, None, where)

    return quantized_weight((n, k), "fp8", scales.shape[1], True, "fp8", integers,
                            in_order=where is None)
