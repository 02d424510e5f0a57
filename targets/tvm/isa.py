"""Instruction sets as data, and the few operations that plain TIR cannot express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.targets.tvm.emit import LANES, f32, splat
from inferloom.targets.tvm.vmath import fma

Expr = Any

_PREFETCH = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr hidden void @inferloom_prefetch(ptr %p) alwaysinline nounwind {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret void
}
"""
_DPBF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr hidden <16 x float> @inferloom_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""


@dataclass(frozen=True, slots=True)
class CpuIsa:
    """Register blocking of the matmul (`rows` x `vectors` of 16 floats), its k slice in steps, bf16 dot product."""

    rows: int
    vectors: int
    k_slice: int
    bf16_dot: bool

    @property
    def llvm(self) -> str:
        """LLVM IR that kernels using this ISA import."""
        return _PREFETCH + (_DPBF16 if self.bf16_dot else "")

    def dot_pair(self, acc: Expr, x: Expr, w: Expr, lanes: int = LANES) -> Expr:
        """acc + x0*w0 + x1*w1 for 16 lanes (or one) of bf16 pairs held in 32 bits."""
        if self.bf16_dot and lanes == LANES:
            return T.call_pure_extern(f32(LANES), "inferloom_dpbf16", acc, x, w)
        shift, mask = splat(T.int32(16), lanes), splat(T.int32(-65536), lanes)

        def low(v: Expr) -> Expr:
            return T.reinterpret(f32(lanes), T.shift_left(v, shift))

        def high(v: Expr) -> Expr:
            return T.reinterpret(f32(lanes), T.bitwise_and(v, mask))

        return fma(high(x), high(w), fma(low(x), low(w), acc, lanes), lanes)
