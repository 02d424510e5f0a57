"""The largest logits of each row, and the sum of exponentials, in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferloom.runtime.top import TopRows
from inferloom.targets.base import Logits, Scratch
from inferloom.targets.triton import sampling
from inferloom.targets.triton.aot import module_text
from tests.interpreter.harness import launch, load_module, pointer


def run(logits: np.ndarray, ld: int, sharpness: np.ndarray, folder: Path) -> TopRows:
    rows, vocab = logits.shape
    kernels, size, stats = sampling.kernels(Logits(rows + 1, vocab, ld))
    module = load_module(module_text(kernels), folder)
    memory = np.full((rows + 1, ld), 1e9, np.float32)
    memory[:rows, :vocab] = logits
    scratch = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    held: dict[object, Any] = {"logits": memory, "sharpness": sharpness,
                               "dims": np.array([0, 0, rows, 0, 0, 0, 0, 0], np.int32)}
    for kernel in kernels:
        args = [pointer(scratch, a.offset, t) if isinstance(a, Scratch) else pointer(held[a].reshape(-1).view(np.uint8), 0, t)
                for a, (_, t) in zip(kernel.args, kernel.parameters, strict=True)]
        launch(module, kernel, args, [0, 0, rows + 1, 0, 0], np.random.default_rng(1))
    keys = scratch[:rows * sampling.TOP * 8].view(np.int64).reshape(rows, -1)
    return TopRows(keys, scratch[stats:stats + rows * 8].view(np.float32).reshape(rows, 2), lambda begin, end: logits[begin:end])


@pytest.mark.parametrize("vocab", [64, 300, 5000])
def test_largest_logits(vocab: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((3, vocab)).astype(np.float32) * 5
    logits[1] = np.round(logits[1])  # many are equal: lower ids come first
    logits[1, :2] = 0.0, -0.0
    logits[2] = -np.abs(logits[2])
    sharpness = np.array([1.0, 2.0, 0.25], np.float32)
    for row, top, sharp in zip(logits, run(logits, vocab + 28, sharpness, tmp_path), sharpness, strict=True):
        order = np.argsort(-row, kind="stable")[:sampling.TOP]
        assert np.array_equal(top.ids, order) and np.array_equal(top.values, row[order])
        scaled = row.astype(np.float64) * sharp
        assert np.isclose(top.log_sum, np.log(np.exp(scaled - scaled.max()).sum()), rtol=1e-6, atol=1e-6)
        assert top.row() is not None and np.array_equal(top.row(), row)
