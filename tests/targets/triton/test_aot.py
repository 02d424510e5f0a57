"""Compiling for GPUs that are not here: limits, matrix instructions, reproducible bytes, every architecture and chip."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inferloom.compiler.kernels import Selection, select_kernels
from inferloom.compiler.passes.pack_weights import Packing
from inferloom.compiler.pipeline import Options, lower
from inferloom.compiler.plan import Rows, plan_memory
from inferloom.compiler.report import Report
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph
from inferloom.ir.types import DType
from inferloom.targets.base import Logits
from inferloom.targets.chips import GpuChip, chips, find
from inferloom.targets.triton import configs
from inferloom.targets.triton.aot import Binary, Compiler, violations
from inferloom.targets.triton.codegen import TritonTarget
from inferloom.targets.triton.source import KernelText
from tests import zoo
from tests.compiler.graphs import tiny_llama
from tests.models.test_architectures import REQUIRED

GPUS = [name for name, chip in chips().items() if isinstance(chip, GpuChip)]
#: Models as they are, less their weights: configuration class, and its arguments.
_LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("llama", _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                        "head_dim": 64, "tie_word_embeddings": True}),
    "llama-3.1-8b": ("llama", _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "qwen3-8b": ("qwen3", _LLAMA | {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
                                    "num_hidden_layers": 36, "head_dim": 128}),
}


def gpu(name: str) -> GpuChip:
    chip = find(name)
    assert isinstance(chip, GpuChip)
    return chip


def selected(graph: Graph, dtype: DType, tokens: int = 64) -> Selection:
    """The kernels of a model-level graph as the GPU target gets them."""
    wanted = TritonTarget.lowering
    packing = Packing(wanted.weight_tile, wanted.weight_k_multiple, dict(wanted.weight_pair))
    lowered = lower(graph, Options(dtype, packing, wanted.gate_columns, wanted.prologue, 32, tokens, 8, 64), Report())
    return select_kernels(plan_memory(lowered, Rows(wanted.row_align, wanted.avoid)))


def model(**shape: Any) -> Graph:
    return tiny_llama(gate_columns=TritonTarget.lowering.gate_columns, **shape)


@pytest.fixture(scope="module")
def tiny() -> Selection:
    return selected(model(layers=2), DType.BF16)


@pytest.mark.parametrize("name", ["h100", "mi300x"])
def test_bytes_are_the_same_again(tiny: Selection, name: str) -> None:
    made = []
    for workers in (1, 2):
        with Compiler(gpu(name), workers) as compiler:
            picked, binaries = TritonTarget(gpu(name)).fit(tiny.sources, compiler, print)
        made.append([binaries[k.symbol] for k in picked.kernels])
    assert made[0] == made[1]
    assert all(b.data[:4] == b"\x7fELF" and b.threads % gpu(name).warp == 0 for b in made[0])
    matrix = [b.matrix for k, b in zip(picked.kernels, made[0], strict=True) if k.expects_matrix]
    assert matrix and all(matrix)


def test_depth_adds_no_kernels(tiny: Selection) -> None:
    target = TritonTarget(gpu("h100"))
    counts = [len(target.pick(s.sources, target.choices(s.sources)).kernels)
              for s in (tiny, selected(model(layers=6), DType.BF16))]
    assert counts[0] == counts[1] <= 40


def test_limits_are_held() -> None:
    """Each limit on its own, in words that say what is over it."""
    chip = gpu("h100")
    kernel = KernelText("k", "matmul", 0, (), (("p0", "*bf16"), ("p1", "*bf16")), (0, 1), (0, 1, 1), {},
                        expects_matrix=True)
    good = Binary(b"", 128, 232_448, 255, 0, 0, 512, 0, 4, (8, 8, 8, 8))
    assert violations(good, kernel, chip) == []
    for change, words in (({"shared": 232_449}, "shared memory of 232448"), ({"registers": 256}, "registers of 255"),
                          ({"spilled": 8}, "spills 8 bytes"), ({"stack": 16}, "spills 16 bytes"),
                          ({"tmem": 513}, "tensor memory"), ({"scratch": 4}, "scratch memory"),
                          ({"matrix": 0}, "no matrix instruction"), ({"parameters": (8, 8, 4, 8)}, "parameters of")):
        (found,) = violations(replace(good, **change), kernel, chip)  # type: ignore[arg-type]
        assert words in found


def test_what_does_not_compile_is_named() -> None:
    broken = KernelText("k", "row", 0, ("    tl.store(p0, nothing)",), (("p0", "*fp32"),), (0,), (0, 1, 1), {})
    with Compiler(gpu("h100"), 1) as compiler:
        with pytest.raises(UnsupportedError, match=r"(?s)kernel k for h100.*nothing is not defined"):
            compiler.compile([broken])


def test_what_does_not_fit_is_made_smaller_or_refused(tiny: Selection) -> None:
    said: list[str] = []
    small = replace(gpu("h100"), shared=40_000)
    with Compiler(small) as compiler:
        TritonTarget(small).fit(tiny.sources, compiler, said.append)
    none = replace(gpu("h100"), registers=8)
    with Compiler(none) as compiler, pytest.raises(UnsupportedError, match="no configuration fits h100.*of 8"):
        TritonTarget(none).fit(tiny.sources, compiler, said.append)
    assert any("trying smaller tiles" in line for line in said)


def test_measured_configurations_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {"m": 64, "n": 64, "k": 32, "warps": 4, "stages": 3, "splits": 1}
    entry = {"op": "matmul", "dtype": "bf16", "n": 4096, "k": 4096, "rows": 256, "config": config, "us": 9.5}
    (tmp_path / "h100.json").write_text(json.dumps({"entries": [entry]}))
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    configs._tuned.cache_clear()
    try:
        first, *_ = configs.matmul(gpu("h100"), DType.BF16, 4096, 4096, 65, 256)
        other, *_ = configs.matmul(gpu("h100"), DType.BF16, 4096, 2048, 65, 256)
    finally:
        configs._tuned.cache_clear()
    assert first == configs.MatmulConfig(**config) != other


def test_large_tensors_have_wide_offsets() -> None:
    """A table of 256,000 x 16,384 bf16 is 8 GB: its offsets need 64 bits, and so do those of the state."""
    sources = selected(model(hidden=16384, heads=4, vocab=256_000, layers=1), DType.BF16).sources
    target = TritonTarget(gpu("mi300x"))
    kernels = {k.symbol: k for k in target.pick(sources, target.choices(sources)).kernels}
    (embed,) = (k for s, k in kernels.items() if "embedding" in s)
    (head,) = (k for s, k in kernels.items() if "gather_rows" in s)
    (write,) = (k for s, k in kernels.items() if "kv_write" in s)
    assert embed.wide == {"p1"} and head.wide == {"p2"} and write.wide == {"p3"}
    assert "to(tl.int64)" in embed.text() and "to(tl.int64)" in head.text()
    assert not any(k.wide for s, k in kernels.items() if "silu" in s)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("n,k", [(1, 7), (131, 64), (896, 4864), (4096, 4096), (256_000, 8192)])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_configurations_fit_shared_memory(name: str, n: int, k: int, dtype: DType) -> None:
    for least, most in configs.ROW_RANGES:
        found = configs.matmul(gpu(name), dtype, n, k, least, most)
        assert found and all(c.shared(dtype.itemsize) <= gpu(name).shared and c.m >= 16 and c.n >= 16 for c in found)
        # Partial sums have room for every row, and no split is without work.
        assert all(c.splits == 1 or (most <= c.most_rows and c.splits * c.k <= k) for c in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_every_architecture_compiles(name: str) -> None:
    from inferloom.compiler.frontends.huggingface import trace_config

    with Compiler(gpu(name)) as compiler:
        for architecture in REQUIRED:
            traced, _ = trace_config(zoo.config(architecture))
            sources = selected(traced.imported.graph, DType.BF16).sources
            picked, binaries = TritonTarget(gpu(name)).fit(sources, compiler, print)
            assert len(picked.kernels) <= 60
            for kernel in picked.kernels:
                assert not violations(binaries[kernel.symbol], kernel, gpu(name)), architecture


@cache
def real(shape: str) -> Selection:
    """The kernels of a real model, whatever its depth."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from inferloom.compiler.frontends.huggingface import trace_config

    kind, arguments = SHAPES[shape]
    traced, _ = trace_config(CONFIG_MAPPING[kind](**arguments))
    return selected(traced.imported.graph, DType.BF16, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GPUS)
def test_real_shapes_fit(name: str, shape: str) -> None:
    """No spills, limits kept, matrix instructions there; the time is printed."""
    sources, logits = real(shape).sources, Logits(64, 128256, 128256)
    begin = time.perf_counter()
    with Compiler(gpu(name)) as compiler:
        picked, binaries = TritonTarget(gpu(name)).fit(sources, compiler, print, logits)
    print(f"{shape} for {name}: {len(picked.kernels)} kernels in {time.perf_counter() - begin:.1f} s")
    assert len(picked.kernels) <= 40
    for kernel in picked.kernels:
        binary = binaries[kernel.symbol]
        assert not violations(binary, kernel, gpu(name)) and binary.spilled == binary.stack == 0
        assert bool(binary.matrix) == kernel.expects_matrix
