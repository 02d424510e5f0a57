"""Vector mathematics that is spelled out where a chip has no instruction for it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from tvm.tirx.script import builder as T

from inferloom.targets.chips import host
from inferloom.targets.link import link_shared
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import bind, kernel
from inferloom.targets.tvm.toolchain import compile_object
from tests.targets.tvm.harness import load


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    def body(views: list[Any], dims: Any, chunk: Any) -> None:
        at = T.ramp(chunk * 16, 1, 16)
        T.buffer_store(views[1], bind(vmath.f16_to_f32(views[0][at], 16)), [at])
        T.buffer_store(views[2], bind(vmath.f16_to_f32(views[0][chunk], 1)), [chunk])

    made = {}
    for symbol, f16 in (("converted", True), ("spelled_out", False)):
        with vmath.dialect(vmath.Dialect.LLVM, f16):
            made[symbol] = kernel(symbol, [(0, "float16"), (1, "float32"), (2, "float32")], body)
    chip = host()
    return load(link_shared([compile_object(made, chip.tvm_target)], [], chip.triple))


@pytest.mark.parametrize("symbol", ["converted", "spelled_out"])
def test_every_finite_half(symbol: str, library: ctypes.CDLL) -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    halves = bits[(bits & 0x7C00) != 0x7C00].view(np.float16)
    wide, one = np.zeros(len(halves), np.float32), np.zeros(len(halves) // 16, np.float32)
    places = [a.ctypes.data_as(ctypes.c_void_p) for a in (halves, wide, one)]
    for chunk in range(len(halves) // 16):
        getattr(library, symbol)(*places, *[None] * 13, None, chunk)
    want = halves.astype(np.float32)
    assert np.array_equal(wide.view(np.uint32), want.view(np.uint32))
    assert np.array_equal(one.view(np.uint32), want[:len(one)].view(np.uint32))
