"""compressed-tensors: `weight_packed` or an integer or fp8 `weight`, with `weight_scale` beside it.

    weight[n, k] = (q[n, k] - zero_point[n, g]) * weight_scale[n, g]

`config_groups` say which modules have which bits and groups (https://github.com/vllm-project/compressed-tensors). Written by
llm-compressor. Weights are read; activations are quantised at run time or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferloom.compiler.frontends.quantized.weight import Integers, QuantizedWeight, quantized_weight, spread
from inferloom.compiler.frontends.quantized.words import centred, unpack
from inferloom.compiler.frontends.weights import Tensor
from inferloom.compiler.quantization.scheme import Activations
from inferloom.ir.errors import UnsupportedError

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
         "input_zero_point", "output_scale", "output_zero_point")
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Group:
    """How the weights of a config group are stored: `size` columns of each of `rows` rows share a scale, 0 for all."""

    bits: int
    float: bool
    rows: int
    size: int
    symmetric: bool
    activations: Activations
    name: str


def decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The checkpoint's tensors with a float `NAME.weight` for each quantised module, and notes."""
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UnsupportedError(f"compressed-tensors with sparsity format {config['sparsity_config']['format']!r}: only dense "
                               "weights are read")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedError("compressed-tensors with transforms (rotations of activations) are not supported")
    groups, notes = _groups(config)
    if config.get("kv_cache_scheme"):
        notes["the checkpoint's scales of the KV cache are not used: the cache has the artifact's own type"] = None
    made: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        packed, scale = f"{module}.weight_packed" in stored, f"{module}.weight_scale" in stored
        if part == "weight_packed" or (part == "weight" and scale):
            made[f"{module}.weight"] = _module(module, stored, _group_of(module, groups, config), notes)
        elif part not in PARTS:
            made[name] = tensor
        elif part == "weight_scale" and not packed and f"{module}.weight" not in stored:
            raise UnsupportedError(f"{name} has no weight beside it")
    return made, tuple(notes)


def _groups(config: Mapping[str, Any]) -> tuple[dict[str, Group], dict[str, None]]:
    """Config group of each target, and notes."""
    made: dict[str, Group] = {}
    notes: dict[str, None] = {}
    for name, spec in (config.get("config_groups") or {}).items():
        if not isinstance(spec, dict) or not isinstance(spec.get("weights"), dict):
            raise UnsupportedError(f"compressed-tensors: {name} does not say how its weights are quantised")
        form = spec.get("format") or config.get("format")
        if form not in FORMATS:
            raise UnsupportedError(f"compressed-tensors format {form!r} is not read; these are: {', '.join(FORMATS)}")
        group = _group(name, spec, notes)
        made |= {str(target): group for target in spec.get("targets") or ()}
    if not made:
        raise UnsupportedError("compressed-tensors: config_groups names no targets")
    return made, notes


def _group(name: str, spec: Mapping[str, Any], notes: dict[str, None]) -> Group:
    weights, inputs = spec["weights"], spec.get("input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if strategy is None:
        strategy = "group" if weights.get("group_size", -1) not in (None, -1) else "tensor"
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)) or strategy not in ("tensor", "channel", "group", "block"):
        raise UnsupportedError(f"compressed-tensors: {name} has {kind} weights of {bits} bits by {strategy}; int of 4 and 8 "
                               "and float of 8 bits are read, by tensor, channel, group or block")
    rows, size = {"tensor": (0, 0), "channel": (1, 0), "group": (1, weights.get("group_size")),
                  "block": tuple(weights.get("block_structure") or (None, None))}[strategy]
    if not all(isinstance(d, int) and d >= 0 for d in (rows, size)):
        raise UnsupportedError(f"compressed-tensors: {name} has a scale for each {rows} x {size} weights")
    activations: Activations = "none"
    if inputs:
        by_token = inputs.get("dynamic") and inputs.get("strategy") == "token" and inputs.get("symmetric", True)
        if by_token and (kind, bits, inputs.get("type", "int"), inputs.get("num_bits")) == ("int", 8, "int", 8):
            activations = "int8"
        else:
            notes["the checkpoint's scheme of activations is not used: they keep the artifact's own type"] = None
    return Group(bits, kind == "float", rows, size, bool(weights.get("symmetric", True)), activations,
                 f"compressed-tensors {'fp' if kind == 'float' else 'int'}{bits} by {strategy}")


def _group_of(module: str, groups: Mapping[str, Group], config: Mapping[str, Any]) -> Group:
    """The config group of a module: by its name, else by a pattern, else by its class."""
    def matches(target: str) -> bool:
        return re.match(target[3:], module) is not None if target.startswith("re:") else target == module

    if any(matches(str(target)) for target in config.get("ignore") or ()):
        raise UnsupportedError(f"compressed-tensors: {module} is to be ignored, but is stored quantised")
    named = sorted((t for t in groups if matches(t)), key=lambda t: t.startswith("re:"))
    kind = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
    target = named[0] if named else kind
    if target not in groups:
        raise UnsupportedError(f"compressed-tensors: {module} is stored quantised, but is no target of {', '.join(groups)}")
    return groups[target]


def _module(module: str, stored: Mapping[str, Tensor], group: Group, notes: dict[str, None]) -> QuantizedWeight:
    scale, zero = stored.get(f"{module}.weight_scale"), stored.get(f"{module}.weight_zero_point")
    packed, plain = stored.get(f"{module}.weight_packed"), stored.get(f"{module}.weight")
    weight = packed if packed is not None else plain
    if scale is None or weight is None or len(weight.shape) != 2 or 0 in weight.shape or scale.dtype not in _FLOATS:
        raise UnsupportedError(f"{module}: a matrix of weights with a weight_scale is expected")
    wanted = "I32" if packed is not None else "F8_E4M3" if group.float else "I8"
    if weight.dtype != wanted or (packed is not None and group.float):
        raise UnsupportedError(f"{module} is stored as {weight.dtype}; {group.name} has {wanted}")
    n, k = weight.shape if packed is None else _shape(module, stored, weight, group.bits)
    scales = spread(module, scale.read().astype(np.float32), n, k, group.rows, group.size)
    groups = scales.shape[1]
    if (zero is None) != group.symmetric and zero is None:
        raise UnsupportedError(f"{module} lacks weight_zero_point, and is not symmetric")
    points = None if zero is None or group.symmetric else _points(module, zero, group, n, scales.shape, packed is not None)
    columns = _columns(module, stored, k, group.size, groups, notes)

    def integers() -> Integers:
        if packed is not None:
            words = unpack(packed.read(), group.bits, 1)
            values = centred(np.ascontiguousarray(words[:, :k]), group.bits)
        else:
            values = weight.read()
        return Integers(values, scales, None if points is None else -points * scales, columns)

    return quantized_weight((n, k), "fp8" if group.float else "int8" if group.bits == 8 else "int4", groups,
                            points is None, f"{group.name}{'' if columns is None else ' by g_idx'}", integers,
                            in_order=columns is None, activations=group.activations)


def _shape(module: str, stored: Mapping[str, Tensor], packed: Tensor, bits: int) -> tuple[int, int]:
    """The shape of a packed weight, from `weight_shape`."""
    shape = stored.get(f"{module}.weight_shape")
    given = [] if shape is None or shape.dtype not in ("I64", "I32") else [int(d) for d in shape.read().reshape(-1)]
    if len(given) != 2 or given[0] != packed.shape[0] or packed.shape[1] != -(-given[1] * bits // 32):
        raise UnsupportedError(f"{module}: weight_packed {list(packed.shape)} does not hold a weight of shape {given}")
    return given[0], given[1]


def _points(module: str, zero: Tensor, group: Group, n: int, shape: tuple[int, ...], packed: bool) -> np.ndarray:
    """Zero points, f32 [n, groups]; those of packed weights are packed along n."""
    values = zero.read()
    if packed and zero.dtype == "I32" and zero.shape == (-(-n * group.bits // 32), shape[1]):
        values = centred(np.ascontiguousarray(unpack(values, group.bits, 0)[:n]), group.bits)
    elif values.size == 1:
        values = np.full(shape, values.reshape(()))
    if values.shape != shape or zero.dtype not in ("I8", "I32"):
        raise UnsupportedError(f"{module}: weight_zero_point is {zero.dtype} {list(zero.shape)} beside scales {list(shape)}")
    return values.astype(np.float32)


def _columns(module: str, stored: Mapping[str, Tensor], k: int, size: int, groups: int,
             notes: dict[str, None]) -> np.ndarray | None:
    """The group of each column where groups are scattered (activation order) or of different sizes."""
    plain = np.arange(k) // (size or k)
    g_idx = stored.get(f"{module}.weight_g_idx")
    if g_idx is not None and int(np.min(g_idx.read(), initial=0)) >= 0:  # -1 stands for "not set"
        given = np.asarray(g_idx.read(), np.int64)
        if given.shape != (k,) or given.max() >= groups:
            raise UnsupportedError(f"{module}.weight_g_idx does not name a group of {groups} for each of {k} columns")
        if not np.array_equal(given, plain):
            notes["activation order: groups of scattered columns (g_idx) are rounded anew to int8"] = None
            return given
    return None if k % (size or k) == 0 else plain
