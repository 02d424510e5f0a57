"""AWQ in the layout of its GEMM kernel: `qweight` and `qzeros` packed along n, `scales`.

    weight[n, k] = (q[k, n] - zero[g, n]) * scale[g, n],   g = k // group_size

The eight columns of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7 (https://github.com/casper-hansen/AutoAWQ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inferloom.compiler.frontends.quantized.weight import Integers, QuantizedWeight, quantized_weight
from inferloom.compiler.frontends.quantized.words import centred, unpack
from inferloom.compiler.frontends.weights import Tensor
from inferloom.ir.errors import UnsupportedError

PARTS = ("qweight", "qzeros", "scales")
BITS = 4
#: Where in a word column i of eight lies: the place of i in the packing order.
_PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The checkpoint's tensors with `NAME.weight` for each quantised module."""
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", BITS))
    if version != "gemm":
        raise UnsupportedError(f"AWQ version {version!r} is packed for another kernel; only gemm is read. Quantise with "
                               "version='gemm'")
    if bits != BITS:
        raise UnsupportedError(f"AWQ with bits={bits!r}: gemm has {BITS}")
    if str(config.get("backend", "autoawq")).lower() != "autoawq":
        raise UnsupportedError(f"AWQ backend {config['backend']!r}: only the layout of autoawq is read")
    made: dict[str, Tensor] = {name: t for name, t in stored.items() if name.rpartition(".")[2] not in PARTS}
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            made[f"{module}.weight"] = _module(module, stored, config.get("group_size", config.get("q_group_size", 128)))
        elif part in PARTS and f"{module}.qweight" not in stored:
            raise UnsupportedError(f"{name} has no {module}.qweight beside it")
    return made, ()


def _module(module: str, stored: Mapping[str, Tensor], group: object) -> QuantizedWeight:
    found = {part: stored.get(f"{module}.{part}") for part in PARTS}
    qweight, qzeros, scales = found.values()
    if qweight is None or qzeros is None or scales is None:
        raise UnsupportedError(f"{module} lacks {', '.join(p for p in PARTS if found[p] is None)} of AWQ")
    shapes = [t.shape for t in (qweight, qzeros, scales)]
    fits = all(len(s) == 2 and 0 not in s for s in shapes)
    if fits:
        (k, words), (groups, n) = qweight.shape, scales.shape
        size = k if group == -1 else group
        fits = qzeros.shape == (groups, words) and words * 8 == n and isinstance(size, int) and groups * size == k
    if not fits or (qweight.dtype, qzeros.dtype) != ("I32", "I32") or scales.dtype not in ("F16", "BF16", "F32"):
        raise UnsupportedError(f"{module}: qweight, qzeros and scales of shapes {shapes} are not AWQ's with group_size={group}")
    symmetric = bool((_values(qzeros) == 8).all())

    def integers() -> Integers:
        scale = np.ascontiguousarray(scales.read().astype(np.float32).T)
        offsets = None if symmetric else scale * (8 - _values(qzeros).astype(np.int32).T).astype(np.float32)
        return Integers(np.ascontiguousarray(centred(_values(qweight), BITS).T), scale, offsets)

    return quantized_weight((n, k), "int4", groups, symmetric, f"AWQ int4 in groups of {k // groups}", integers)


def _values(words: Tensor) -> np.ndarray:
    """[rows, n / 8] words to uint8 [rows, n], columns in order."""
    values = unpack(words.read(), BITS, 1)
    return np.ascontiguousarray(values.reshape(len(values), -1, 8)[:, :, _PLACES].reshape(len(values), -1))
