"""Quantised checkpoints made by plain loops from the formats' descriptions, with the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

Made = tuple[dict[str, np.ndarray], np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def rounded(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned integers [n, k], f16 scales [n, groups] and integer zero points [n, groups] of a weight."""
    n, k = weight.shape
    groups = -(-k // group)
    q = np.zeros((n, k), np.int64)
    scales, zeros = np.zeros((n, groups), np.float16), np.zeros((n, groups), np.int64)
    top = 2**bits - 1
    for i in range(n):
        for g in range(groups):
            part = weight[i, g * group : (g + 1) * group]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = np.float16(2 * np.abs(part).max() / top if symmetric else (high - low) / top)
            zero = (top + 1) // 2 if symmetric else max(1, round(-low / float(scale)))
            scales[i, g], zeros[i, g] = scale, zero
            q[i, g * group : (g + 1) * group] = np.clip(np.rint(part / np.float32(scale)) + zero, 0, top)
    return q, scales, zeros


def dequantised(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray, columns: np.ndarray) -> np.ndarray:
    made = np.zeros(q.shape, np.float32)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            g = columns[j]
            made[i, j] = np.float32(q[i, j] - zeros[i, g]) * np.float32(scales[i, g])
    return made


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Rows of unsigned integers packed into int32 along the last axis; place i of a word holds element order[i]."""
    per = 32 // bits
    made = np.zeros((values.shape[0], -(-values.shape[1] // per)), np.uint32)
    for i in range(values.shape[0]):
        for j in range(made.shape[1]):
            for place in range(per):
                column = j * per + (order[place] if order else place)
                if column < values.shape[1]:
                    made[i, j] |= np.uint32(int(values[i, column]) << (bits * place))
    return made.view(np.int32)


def gptq(name: str, weight: np.ndarray, *, bits: int = 4, group: int = 32, symmetric: bool = True, v2: bool = False,
         order: np.ndarray | None = None, g_idx: bool = True) -> Made:
    """`order`: the columns in the order in which groups were cut (desc_act)."""
    n, k = weight.shape
    order = np.arange(k) if order is None else order
    size = k if group == -1 else group
    q, scales, zeros = rounded(weight[:, order], bits, size, symmetric)
    columns = np.zeros(k, np.int32)
    columns[order] = np.arange(k) // size
    back = np.argsort(order)
    q = q[:, back]
    made = {f"{name}.qweight": np.ascontiguousarray(words(q, bits).T), f"{name}.scales": np.ascontiguousarray(scales.T),
            f"{name}.qzeros": words(np.ascontiguousarray(zeros.T) - (0 if v2 else 1), bits)}
    if g_idx:
        made[f"{name}.g_idx"] = columns
    return made, dequantised(q, scales, zeros, columns)


def awq(name: str, weight: np.ndarray, *, group: int = 32) -> Made:
    n, k = weight.shape
    q, scales, zeros = rounded(weight, 4, group, False)
    made = {f"{name}.qweight": words(q.T, 4, AWQ_ORDER), f"{name}.qzeros": words(zeros.T, 4, AWQ_ORDER),
            f"{name}.scales": np.ascontiguousarray(scales.T)}
    return made, dequantised(q, scales, zeros, np.arange(k) // group)


def packed(name: str, weight: np.ndarray, *, bits: int = 4, group: int = 32, symmetric: bool = True) -> Made:
    """compressed-tensors, pack-quantized; scales in bf16."""
    n, k = weight.shape
    q, scales, zeros = rounded(weight, bits, group, symmetric)
    stored = scales.astype(ml_dtypes.bfloat16)
    made = {f"{name}.weight_packed": words(q, bits), f"{name}.weight_scale": stored,
            f"{name}.weight_shape": np.array([n, k], np.int64)}
    if not symmetric:
        made[f"{name}.weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    return made, dequantised(q, stored.astype(np.float32), zeros, np.arange(k) // group)


def by_channel(name: str, weight: np.ndarray, *, kind: str = "int") -> Made:
    """compressed-tensors, int-quantized or float-quantized: one f32 scale a row."""
    top = 127 if kind == "int" else 448
    scale = (np.abs(weight).max(axis=1, keepdims=True) / top).astype(np.float32)
    q = np.rint(weight / scale).astype(np.int8) if kind == "int" else (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    return {f"{name}.weight": q, f"{name}.weight_scale": scale}, q.astype(np.float32) * scale


def checkpoint(source: Path, out: Path, config: dict, make: Callable[[str, np.ndarray], Made],
               plain: Path | None = None) -> dict[str, np.ndarray]:
    """`source` with its projections made by `make` in `out`, and the same with floats in `plain`; returns all floats."""
    from safetensors.numpy import load_file

    held, floats = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj." in name and name.endswith(".weight"):
            made, floats[name] = make(name.removesuffix(".weight"), weight.astype(np.float32))
            held |= made
        else:
            held[name] = floats[name] = weight
    raw = json.loads((source / "config.json").read_text())
    for folder, tensors, quantization in ((out, held, {"quantization_config": config}), (plain, floats, {})):
        if folder is not None:
            folder.mkdir(parents=True)
            save(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(raw | quantization))
            for beside in source.glob("tokenizer*.json"):
                (folder / beside.name).write_bytes(beside.read_bytes())
    return floats


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """safetensors with bf16 and fp8, which NumPy's writer does not know by ml_dtypes' names."""
    from inferloom.runtime import safetensors

    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int32": "I32", "int64": "I64",
             "int8": "I8"}
    arrays = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    safetensors.write(path, [(name, kinds[a.dtype.name], a.shape) for name, a in arrays.items()],
                      (a.tobytes() for a in arrays.values()))
