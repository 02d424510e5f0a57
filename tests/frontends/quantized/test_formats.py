"""GPTQ, AWQ and compressed-tensors: what is decoded equals what plain loops made; what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inferloom.compiler.frontends import huggingface
from inferloom.compiler.frontends.quantized.formats import DECODERS, decode
from inferloom.compiler.frontends.quantized.weight import QuantizedWeight
from inferloom.compiler.frontends.weights import read_checkpoint
from inferloom.ir.errors import UnsupportedError
from tests.frontends.quantized import makers

RNG = np.random.default_rng(5)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}


def compressed(form: str, bits: int, strategy: str, size: int | None = None, **more: object) -> dict:
    weights = {"num_bits": bits, "type": "float" if form.startswith("float") else "int", "strategy": strategy,
               "group_size": size, "symmetric": more.pop("symmetric", True)}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if form == "int-quantized" else None}
    made = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    return made | more


def stored(tensors: dict[str, np.ndarray], folder: Path) -> dict:
    makers.save(tensors, folder / "model.safetensors")
    return dict(read_checkpoint(folder))


def weight(n: int = 16, k: int = 96) -> np.ndarray:
    return (RNG.standard_normal((n, k)) * 0.1 + 0.01).astype(np.float32)


def scattered(k: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(k)


def one(config: dict, made: makers.Made, folder: Path) -> tuple[QuantizedWeight, tuple[str, ...]]:
    """The decoded weight of a module called x, after it was compared with the expected one."""
    held, notes = decode(config, stored(made[0], folder), folder)
    found = held["x.weight"]
    assert isinstance(found, QuantizedWeight) and set(held) == {"x.weight"} and found.shape == made[1].shape
    assert np.array_equal(found.read(), made[1])
    kept = found.quantized()
    assert kept.scheme == found.scheme
    if found.exact:
        np.testing.assert_allclose(kept.dequantize(), made[1], rtol=1e-6, atol=1e-7)
    else:
        assert np.abs(kept.dequantize() - made[1]).max() < 0.005 * np.abs(made[1]).max()
    return found, notes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("v2", [True, False])
def test_gptq(bits: int, symmetric: bool, v2: bool, tmp_path: Path) -> None:
    config = GPTQ | {"bits": bits, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    found, notes = one(config, makers.gptq("x", weight(), bits=bits, symmetric=symmetric, v2=v2), tmp_path)
    assert found.exact and not notes
    assert str(found.scheme) == {4: "int4", 8: "int8-g32"}[bits] + ("" if symmetric else "-asym") + "-wo"


@pytest.mark.parametrize(("group", "k", "scheme"), [(-1, 96, "int4-channel-wo"), (64, 128, "int4-g64-wo"),
                                                    (256, 512, "int4-g128-wo"), (128, 128, "int4-channel-wo")])
def test_gptq_groups(group: int, k: int, scheme: str, tmp_path: Path) -> None:
    found, _ = one(GPTQ | {"group_size": group}, makers.gptq("x", weight(k=k), group=group, g_idx=False), tmp_path)
    assert found.exact and str(found.scheme) == scheme


def test_gptq_groups_that_have_no_kernel_are_rounded_to_finer_ones(tmp_path: Path) -> None:
    found, _ = one(GPTQ | {"group_size": 16}, makers.gptq("x", weight(), group=16), tmp_path)
    assert not found.exact and str(found.scheme) == "int8-g32-wo"
    found, _ = one(GPTQ | {"group_size": 64}, makers.gptq("x", weight(k=96), group=64), tmp_path)
    assert not found.exact and found.stored_as == "GPTQ int4 in groups of 64, scattered"


def test_gptq_in_the_order_of_activations(tmp_path: Path) -> None:
    found, notes = one(GPTQ | {"desc_act": True}, makers.gptq("x", weight(), order=scattered(96)), tmp_path)
    assert not found.exact and "scattered" in found.stored_as and "g_idx" in notes[0]


def test_gptq_modules_of_their_own(tmp_path: Path) -> None:
    made, floats = makers.gptq("x", weight(), bits=8, group=96)
    found, _ = one(GPTQ | {"dynamic": {"+:x": {"bits": 8}}}, (made, floats), tmp_path)
    assert str(found.scheme) == "int8-wo"


def test_gptq_zero_points_past_their_bits_are_said(tmp_path: Path) -> None:
    made, _ = makers.gptq("x", weight())
    made["x.qzeros"] = np.full_like(made["x.qzeros"], -1)
    held, notes = decode(GPTQ, stored(made, tmp_path), tmp_path)
    assert "stored value + 1" in notes[0]
    values = held["x.weight"].read() / made["x.scales"].astype(np.float32).T.repeat(32, axis=1)
    assert values.min() >= -16.01 and values.max() <= 0


def test_awq(tmp_path: Path) -> None:
    found, _ = one(AWQ, makers.awq("x", weight()), tmp_path)
    assert found.exact and str(found.scheme) == "int4-asym-wo"


@pytest.mark.parametrize(("bits", "symmetric", "k"), [(4, True, 96), (4, False, 96), (8, True, 96), (8, False, 96),
                                                    (4, True, 100)])
def test_packed(bits: int, symmetric: bool, k: int, tmp_path: Path) -> None:
    size = 32 if k == 96 else 25
    config = compressed("pack-quantized", bits, "group", size, symmetric=symmetric)
    found, _ = one(config, makers.packed("x", weight(k=k), bits=bits, group=size, symmetric=symmetric), tmp_path)
    assert found.exact == (k == 96) and found.scheme.activations == "none"


@pytest.mark.parametrize(("form", "kind", "scheme"), [("int-quantized", "int", "int8"), ("naive-quantized", "int", "int8-wo"),
                                                      ("float-quantized", "float", "fp8")])
def test_by_channel(form: str, kind: str, scheme: str, tmp_path: Path) -> None:
    found, _ = one(compressed(form, 8, "channel"), makers.by_channel("x", weight(), kind=kind), tmp_path)
    assert found.exact and str(found.scheme) == scheme


def test_scales_of_tensors_and_of_blocks(tmp_path: Path) -> None:
    made, _ = makers.by_channel("x", weight(10, 96), kind="float")
    values = made["x.weight"].astype(np.float32)
    made["x.weight_scale"] = np.array([0.5], np.float32)
    one(compressed("float-quantized", 8, "tensor"), (made, values * 0.5), tmp_path)
    scale = RNG.random((3, 3)).astype(np.float32)  # blocks of 4 x 32; the last rows are not whole
    made["x.weight_scale"] = scale
    config = compressed("float-quantized", 8, "block")
    config["config_groups"]["group_0"]["weights"]["block_structure"] = [4, 32]
    expected = np.array([[values[i, j] * scale[i // 4, j // 32] for j in range(96)] for i in range(10)], np.float32)
    found, _ = one(config, (made, expected), tmp_path)
    assert found.exact and str(found.scheme) == "fp8-g32"


def test_packed_in_the_order_of_activations(tmp_path: Path) -> None:
    order = scattered(96)
    made, floats = makers.packed("x", weight())
    columns = np.argsort(order) // 32  # any assignment of columns to groups
    scales = made["x.weight_scale"].astype(np.float32)
    q = floats / scales[:, np.arange(96) // 32]
    made["x.weight_g_idx"] = columns.astype(np.int32)
    floats = (q * scales[:, columns]).astype(np.float32)
    found, notes = one(compressed("pack-quantized", 4, "group", 32), (made, floats), tmp_path)
    assert not found.exact and "g_idx" in notes[0]


def test_targets_by_name_pattern_and_class(tmp_path: Path) -> None:
    config = compressed("pack-quantized", 4, "group", 32)
    by_name = compressed("int-quantized", 8, "channel")["config_groups"]["group_0"] | {"format": "int-quantized"}
    config["config_groups"]["group_1"] = by_name | {"targets": ["re:.*down$", "x.up"]}
    names = ("x.down", "x.up", "x.gate")
    made = makers.by_channel(names[0], weight())[0] | makers.by_channel(names[1], weight())[0]
    held, _ = decode(config, stored(made | makers.packed(names[2], weight())[0], tmp_path), tmp_path)
    assert [str(held[f"{n}.weight"].scheme) for n in names] == ["int8", "int8", "int4-wo"]  # type: ignore[attr-defined]


BROKEN: list[tuple[dict, Callable[[dict[str, np.ndarray]], object], str]] = [
    (GPTQ | {"bits": 3}, lambda t: None, "bits=3"),
    (GPTQ | {"group_size": 0}, lambda t: None, "group_size=0"),
    (GPTQ | {"checkpoint_format": "marlin"}, lambda t: None, "marlin"),
    (GPTQ | {"bits": 8}, lambda t: None, "do not fit 8 bits"),
    (GPTQ | {"group_size": 48}, lambda t: t.pop("x.g_idx"), "in groups of 48"),
    (GPTQ, lambda t: t.pop("x.scales"), "lacks scales"),
    (GPTQ, lambda t: t.pop("x.qweight"), "no x.qweight"),
    (GPTQ, lambda t: t.update({"x.g_idx": np.full(96, 9, np.int32)}), "groups 9 to 9 of 3"),
    (GPTQ, lambda t: t.update({"x.g_idx": np.zeros(7, np.int32)}), "expected integers"),
    (GPTQ, lambda t: t.update({"x.qzeros": np.zeros((3, 4), np.int32)}), "do not fit"),
    (GPTQ, lambda t: t.update({"x.qweight": np.zeros((0, 16), np.int32)}), "are not GPTQ's"),
    (GPTQ, lambda t: t.update({"x.qweight": t["x.qweight"].astype(np.float32)}), "are not GPTQ's"),
]


@pytest.mark.parametrize(("config", "change", "message"), BROKEN)
def test_damaged_gptq_is_refused(config: dict, change: Callable, message: str, tmp_path: Path) -> None:
    made, _ = makers.gptq("x", weight())
    change(made)
    with pytest.raises(UnsupportedError, match=message):
        decode(config, stored(made, tmp_path), tmp_path)


@pytest.mark.parametrize(("config", "change", "message"), [
    (AWQ | {"version": "gemv"}, lambda t: None, "only gemm"),
    (AWQ | {"bits": 8}, lambda t: None, "bits=8"),
    (AWQ | {"backend": "llm-awq"}, lambda t: None, "llm-awq"),
    (AWQ | {"group_size": 64}, lambda t: None, "group_size=64"),
    (AWQ, lambda t: t.pop("x.qzeros"), "lacks qzeros"),
    (AWQ, lambda t: t.pop("x.qweight"), "no x.qweight"),
    (AWQ, lambda t: t.update({"x.scales": np.zeros((3, 8), np.float16)}), "are not AWQ's"),
])
def test_damaged_awq_is_refused(config: dict, change: Callable, message: str, tmp_path: Path) -> None:
    made, _ = makers.awq("x", weight())
    change(made)
    with pytest.raises(UnsupportedError, match=message):
        decode(config, stored(made, tmp_path), tmp_path)


PACKED = compressed("pack-quantized", 4, "group", 32)


@pytest.mark.parametrize(("config", "change", "message"), [
    (PACKED | {"format": "marlin-24"}, lambda t: None, "marlin-24"),
    (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, lambda t: None, "sparse-24-bitmask"),
    (PACKED | {"transform_config": {"config_groups": {"R1": {}}}}, lambda t: None, "transforms"),
    (PACKED | {"config_groups": {}}, lambda t: None, "names no targets"),
    (PACKED | {"config_groups": {"a": {"targets": ["Linear"]}}}, lambda t: None, "a does not say"),
    (PACKED | {"config_groups": 3}, lambda t: None, "is damaged"),
    (PACKED | {"ignore": ["re:x"]}, lambda t: None, "to be ignored"),
    (compressed("pack-quantized", 4, "group", 32) | {"config_groups": {
        "a": PACKED["config_groups"]["group_0"] | {"targets": ["y"]}}}, lambda t: None, "no target of y"),
    (compressed("pack-quantized", 2, "channel"), lambda t: None, "int weights of 2 bits"),
    (compressed("pack-quantized", 4, "group", None), lambda t: None, "a scale for each"),
    (compressed("pack-quantized", 4, "group", 48), lambda t: None, "the scales are"),
    (compressed("pack-quantized", 4, "group", 32, symmetric=False), lambda t: None, "lacks weight_zero_point"),
    (PACKED, lambda t: t.pop("x.weight_packed"), "no weight beside it"),
    (PACKED, lambda t: t.pop("x.weight_scale"), "a weight_scale is expected"),
    (PACKED, lambda t: t.pop("x.weight_shape"), "does not hold a weight"),
    (PACKED, lambda t: t.update({"x.weight_shape": np.array([16, 80])}), "does not hold a weight"),
    (PACKED, lambda t: t.update({"x.weight_g_idx": np.full(96, 7, np.int32)}), "does not name a group"),
    (PACKED, lambda t: t.update({"x.weight_packed": t["x.weight_packed"].astype(np.int64)}), "stored as I64"),
    (compressed("pack-quantized", 4, "group", 32, symmetric=False),
     lambda t: t.update({"x.weight_zero_point": np.zeros((7, 3), np.int32)}), "weight_zero_point is"),
])
def test_damaged_compressed_tensors_are_refused(config: dict, change: Callable, message: str, tmp_path: Path) -> None:
    made, _ = makers.packed("x", weight())
    change(made)
    with pytest.raises(UnsupportedError, match=message):
        decode(config, stored(made, tmp_path), tmp_path)


def test_static_scales_of_activations_and_caches_are_said(tmp_path: Path) -> None:
    config = compressed("int-quantized", 8, "channel", kv_cache_scheme={"num_bits": 8})
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    found, notes = one(config, makers.by_channel("x", weight()), tmp_path)
    assert found.scheme.activations == "none" and "activations" in notes[0] and "KV cache" in notes[1]


def test_fp8(tmp_path: Path) -> None:
    made, _ = makers.by_channel("x", weight(10, 96), kind="float")
    values = made["x.weight"].astype(np.float32)
    scale = RNG.random((3, 3)).astype(np.float32)  # blocks of 4 x 32; the last rows are not whole
    held = {"x.weight": made["x.weight"], "x.weight_scale_inv": scale, "x.input_scale": np.ones(1, np.float32)}
    expected = np.array([[values[i, j] * scale[i // 4, j // 32] for j in range(96)] for i in range(10)], np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [4, 32]}
    found, notes = one(config, (held, expected), tmp_path)
    assert found.exact and str(found.scheme) == "fp8-g32" and "activations" in notes[0]
    found, _ = one({"quant_method": "fp8"}, ({"x.weight": held["x.weight"], "x.weight_scale": scale[0, :1]},
                                             values * scale[0, 0]), tmp_path)
    assert found.exact and str(found.scheme) == "fp8"
    for change, match in (({"weight_block_size": [4]}, "two numbers"), ({"weight_block_size": [4, 48]}, "the scales are")):
        with pytest.raises(UnsupportedError, match=match):
            decode(config | change, stored(held, tmp_path), tmp_path)
    with pytest.raises(UnsupportedError, match="a matrix of fp8 weights"):
        decode(config, stored({"x.weight": held["x.weight"]}, tmp_path), tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", ""])
def test_unknown_methods_list_the_known_ones(method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="gptq, awq, compressed-tensors, fp8"):
        decode({"quant_method": method}, {}, tmp_path)


def in_blocks(name: str, weight: np.ndarray) -> makers.Made:
    made, _ = makers.by_channel(name, weight, kind="float")
    scale = np.full((-(-weight.shape[0] // 16), -(-weight.shape[1] // 32)), 0.01, np.float32)
    return {f"{name}.weight": made[f"{name}.weight"], f"{name}.weight_scale_inv": scale}, \
        made[f"{name}.weight"].astype(np.float32) * np.float32(0.01)


CHECKPOINTS = {"fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, in_blocks),
               "gptq": (GPTQ | {"desc_act": False}, makers.gptq), "awq": (AWQ, makers.awq),
               "compressed-tensors": (PACKED, makers.packed)}


@pytest.mark.parametrize("method", [m if m == "gptq" else pytest.param(m, marks=pytest.mark.slow) for m in DECODERS])
def test_whole_checkpoints(method: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Every parameter that the traced model reads is the weight that the integers stand for."""
    config, make = CHECKPOINTS[method]
    floats = makers.checkpoint(tiny_checkpoint, tmp_path / "quantised", config, make)
    traced = huggingface.load(tmp_path / "quantised")
    sources = [p.source for p in traced.graph.params if not p.source.startswith("buffer:")]
    assert sum("_proj" in s for s in sources) == 14
    for source in sources:
        assert np.array_equal(traced.weights.load(source), floats[source]), source
    assert traced.quantized is not None and len(traced.quantized.schemes) == 14
    for source in traced.quantized.schemes:
        kept = traced.quantized.get(source)
        assert kept is not None
        np.testing.assert_allclose(kept.dequantize(), floats[source], rtol=1e-6, atol=1e-7)
    assert traced.quantized.get("lm_head.weight") is None and set(traced.quantized.names.values()) == {
        found.stored_as for found in decode(config, read_checkpoint(tmp_path / "quantised"), tmp_path)[0].values()
        if isinstance(found, QuantizedWeight)}


def test_config_in_a_file_of_its_own(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "trace_checkpoint", lambda checkpoint, length, task: checkpoint)
    folder = tmp_path / "old"
    floats = makers.checkpoint(tiny_checkpoint, folder, {}, makers.gptq)
    beside = folder / "quantize_config.json"
    beside.write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    name = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(huggingface.load(folder).tensors[name].read(), floats[name])  # type: ignore[attr-defined]
    for text in ("{", "[]"):
        beside.write_text(text)
        with pytest.raises(UnsupportedError, match="is damaged"):
            huggingface.load(folder)
    beside.unlink()
    assert name not in huggingface.load(folder).tensors  # type: ignore[attr-defined]
