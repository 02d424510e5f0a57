"""The largest logits of each row, and the sum of exponentials, on this machine."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from inferloom.runtime.top import TopRows
from inferloom.targets.base import Logits, Scratch
from inferloom.targets.chips import find
from inferloom.targets.tvm.codegen import CpuTarget
from inferloom.targets.tvm.emit import LANES
from inferloom.targets.tvm.sampling import PARTS, RUNS, TOP, Sampling
from tests.targets.single import aligned
from tests.targets.tvm.harness import load

SIZES = (1, 50, 64, 300, 5000, PARTS * RUNS * LANES * 5 + 1)


class Kernels:
    def __init__(self, vocab: int) -> None:
        self.logits = Logits(4, vocab, vocab + 28)
        self.made = Sampling(self.logits)
        self.lib = load(CpuTarget(find("cpu")).compile_kernels((), self.logits, print).files["kernels/kernels.so"])

    def run(self, logits: np.ndarray, sharpness: np.ndarray) -> TopRows:
        rows, vocab = logits.shape
        memory = np.full((4, self.logits.ld), 1e9, np.float32)
        memory[:rows, :vocab] = logits
        scratch = aligned(self.made.scratch)
        scratch[:] = np.random.default_rng(0).integers(0, 255, len(scratch), np.uint8)
        held = {"logits": memory.ctypes.data, "sharpness": sharpness.ctypes.data}
        dims = (ctypes.c_int32 * 5)(0, 0, rows, 0, 0)
        for info in self.made.infos:
            args = [scratch.ctypes.data + a.offset if isinstance(a, Scratch) else held[str(a)] for a in info.args]
            function = getattr(self.lib, info.symbol)
            function.argtypes = [ctypes.c_void_p] * 17 + [ctypes.c_int32]
            for chunk in range(rows * info.grid.mult):
                function(*args, *[None] * (16 - len(args)), ctypes.addressof(dims), chunk)
        top = self.made.top
        keys = scratch[top.keys:top.keys + rows * TOP * 8].view(np.int64).reshape(rows, TOP)
        stats = scratch[top.stats:top.stats + rows * 8].view(np.float32).reshape(rows, 2)
        places = top.sums
        assert places is not None
        sums = scratch[places.offset:places.offset + rows * places.count * 4].view(np.float32).reshape(rows, places.count)
        return TopRows(keys, stats, lambda begin, end: logits[begin:end], sums, places.columns)


@pytest.fixture(scope="module")
def kernels() -> dict[int, Kernels]:
    return {vocab: Kernels(vocab) for vocab in SIZES}


@pytest.mark.parametrize("vocab", SIZES)
def test_largest_logits(kernels: dict[int, Kernels], vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((3, vocab)).astype(np.float32) * 5
    logits[1] = np.round(logits[1])  # many are equal: lower ids come first
    logits[1, :2] = [0.0, -0.0][:vocab]
    logits[2] = np.sort(-np.abs(logits[2]))  # each is larger than all before
    sharpness = np.array([1.0, 2.0, 0.25], np.float32)
    for row, top, sharp in zip(logits, kernels[vocab].run(logits, sharpness), sharpness, strict=True):
        order = np.argsort(-row, kind="stable")[:TOP]
        assert np.array_equal(top.ids, order) and np.array_equal(top.values, row[order])
        scaled = (row.astype(np.float64) - row.max()) * sharp
        assert np.isclose(top.log_sum, np.log(np.exp(scaled).sum()), rtol=1e-6, atol=1e-6) and top.finite
        assert top.sums is not None
        runs = [np.exp(scaled[i * top.columns:(i + 1) * top.columns]).sum() for i in range(len(top.sums))]
        assert np.allclose(top.sums, runs, rtol=1e-5, atol=1e-12) and len(runs) * top.columns >= vocab


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(kernels: dict[int, Kernels], vocab: int, strange: float) -> None:
    logits = np.ones((3, vocab), np.float32)
    logits[0, 0] = logits[1, -1] = strange
    found = kernels[vocab].run(logits, np.ones(3, np.float32))
    assert [top.finite for top in found] == [False, False, True]


def test_the_least_of_temperatures(kernels: dict[int, Kernels]) -> None:
    logits = np.random.default_rng(2).standard_normal((1, 300)).astype(np.float32)
    (top,) = kernels[300].run(logits, np.full(1, np.inf, np.float32))
    assert top.finite and top.log_sum == 0 and top.sums is not None and sorted(top.sums)[-2:] == [0, 1]


@pytest.mark.parametrize("vocab", SIZES[1:])
def test_minus_infinity_is_never_chosen(kernels: dict[int, Kernels], vocab: int) -> None:
    logits = np.full((2, vocab), -np.inf, np.float32)
    logits[0, [3, vocab - 1]] = [1.0, 2.0]
    top, none = kernels[vocab].run(logits, np.ones(2, np.float32))
    assert top.ids.tolist() == [vocab - 1, 3] and top.finite and np.isclose(top.log_sum, np.log1p(np.exp(-1)))
    assert not len(none.ids) and not none.finite
