"""GPTQ: `qweight` packed along k, `qzeros` packed along n, `scales`, `g_idx`.

    weight[n, k] = (q[k, n] - zero[g, n]) * scale[g, n],   g = g_idx[k]

`checkpoint_format` "gptq" stores zero - 1, "gptq_v2" the zero itself. Written by AutoGPTQ, GPTQModel and transformers'
GPTQConfig; https://github.com/ModelCloud/GPTQModel says how the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inferloom.compiler.frontends.quantized.weight import Integers, QuantizedWeight, quantized_weight
from inferloom.compiler.frontends.quantized.words import centred, unpack
from inferloom.compiler.frontends.weights import Tensor
from inferloom.ir.errors import UnsupportedError

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The checkpoint's tensors with `NAME.weight` for each quantised module, and notes."""
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"GPTQ checkpoint_format {form!r} is laid out for other kernels; gptq and gptq_v2 are read")
    bits, group = config.get("bits"), config.get("group_size", 128)
    if bits not in (4, 8) or not isinstance(group, int) or (group < 1 and group != -1):
        raise UnsupportedError(f"GPTQ with bits={bits!r}, group_size={group!r}: 4 or 8 bits are read, in groups of 1 or "
                               "more, or -1 for a group of all")
    made: dict[str, Tensor] = {name: t for name, t in stored.items() if name.rpartition(".")[2] not in PARTS}
    notes: dict[str, None] = {}
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            made[f"{module}.weight"] = _module(module, stored, form, bool(config.get("dynamic")), bits, group, notes)
        elif part in PARTS and f"{module}.qweight" not in stored:
            raise UnsupportedError(f"{name} has no {module}.qweight beside it")
    return made, tuple(notes)


def _module(module: str, stored: Mapping[str, Tensor], form: str, mixed: bool, bits: int, group: int,
            notes: dict[str, None]) -> QuantizedWeight:
    found = {part: stored.get(f"{module}.{part}") for part in PARTS}
    qweight, qzeros, scales, g_idx = found.values()
    if qweight is None or qzeros is None or scales is None:
        raise UnsupportedError(f"{module} lacks {', '.join(p for p in PARTS[:3] if found[p] is None)} of GPTQ")
    shapes = [t.shape for t in (qweight, qzeros, scales)]
    if any(len(s) != 2 or 0 in s for s in shapes) or (qweight.dtype, qzeros.dtype) != ("I32", "I32") \
            or scales.dtype not in ("F16", "BF16", "F32"):
        raise UnsupportedError(f"{module}: qweight, qzeros and scales of shapes {shapes} are not GPTQ's")
    (words, n), (groups, zero_words) = qweight.shape, qzeros.shape
    if mixed and zero_words * 32 // n in (4, 8):  # `dynamic` gives modules bits and groups of their own
        bits = zero_words * 32 // n
        group = -(-words * 32 // bits // groups)
    k = words * 32 // bits
    group = k if group == -1 else group
    if scales.shape != (groups, n) or zero_words * 32 != n * bits or (g_idx is None and groups != -(-k // group)):
        raise UnsupportedError(f"{module}: qweight, qzeros and scales of shapes {shapes} do not fit {bits} bits in groups of "
                               f"{group}")
    columns, in_order = np.arange(k) // group, k % group == 0 or groups == 1
    if g_idx is not None:
        if g_idx.shape != (k,) or g_idx.dtype not in ("I32", "I64"):
            raise UnsupportedError(f"{module}.g_idx is {g_idx.dtype} {list(g_idx.shape)}, expected integers [{k}]")
        given = np.asarray(g_idx.read(), np.int64)
        if given.min() < 0 or given.max() >= groups:
            raise UnsupportedError(f"{module}.g_idx names groups {given.min()} to {given.max()} of {groups}")
        if not np.array_equal(given, columns):
            columns, in_order = given, False
            notes["GPTQ with desc_act: groups of scattered columns (g_idx) are rounded anew to int8"] = None
    zero = _zeros(qzeros, form, bits)
    if form == "gptq" and int(zero.max()) == 2**bits:
        notes["GPTQ v1 with a zero point past its bits: taken as its kernels take it, stored value + 1"] = None
    symmetric = bool((zero == 2 ** (bits - 1)).all())

    def integers() -> Integers:
        values = centred(unpack(qweight.read(), bits, 0), bits).T
        scale = np.ascontiguousarray(scales.read().astype(np.float32).T)
        offsets = None if symmetric else scale * (2 ** (bits - 1) - _zeros(qzeros, form, bits).T).astype(np.float32)
        return Integers(np.ascontiguousarray(values), scale, offsets, None if in_order else columns)

    name = f"GPTQ int{bits} in groups of {group}{'' if in_order else ', scattered'}"
    return quantized_weight((n, k), "int8" if bits == 8 else "int4", groups, symmetric, name, integers, in_order=in_order)


def _zeros(qzeros: Tensor, form: str, bits: int) -> np.ndarray:
    """Zero points, int32 [groups, n]."""
    return unpack(qzeros.read(), bits, 1).astype(np.int32) + (form == "gptq")
