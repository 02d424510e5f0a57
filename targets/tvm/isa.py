"""Instruction sets as data, and the few operations that plain TIR cannot express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.errors import UnsupportedError
from inferloom.targets.tvm.emit import LANES, f32, splat, typed
from inferloom.targets.tvm.pairs import pair_products
from inferloom.targets.tvm.vmath import fma

Expr = Any

_PREFETCH = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr hidden void @inferloom_prefetch(ptr %p) alwaysinline nounwind {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret void
}
"""


def _quarters(name: str, instruction: str, result: str, operand: str) -> str:
    """A function on 16 lanes of 32 bits that applies `instruction`, which takes four, to each quarter."""
    kind = result.split()[-1][:-1]
    lines = [f"declare {result} @{instruction}({result}, {operand}, {operand})",
             f"define linkonce_odr hidden <16 x {kind}> @{name}(<16 x {kind}> %c, <16 x i32> %a, <16 x i32> %b) "
             "alwaysinline nounwind {"]
    for i in range(4):
        lanes = ", ".join(f"i32 {i * 4 + j}" for j in range(4))
        lines.append(f"  %c{i} = shufflevector <16 x {kind}> %c, <16 x {kind}> poison, <4 x i32> <{lanes}>")
        for x in "ab":
            lines += [f"  %{x}{i} = shufflevector <16 x i32> %{x}, <16 x i32> poison, <4 x i32> <{lanes}>",
                      f"  %{x}x{i} = bitcast <4 x i32> %{x}{i} to {operand}"]
        lines.append(f"  %r{i} = call {result} @{instruction}({result} %c{i}, {operand} %ax{i}, {operand} %bx{i})")
    for half, (x, y) in enumerate((("%r0", "%r1"), ("%r2", "%r3"))):
        lanes = ", ".join(f"i32 {j}" for j in range(8))
        lines.append(f"  %h{half} = shufflevector <4 x {kind}> {x}, <4 x {kind}> {y}, <8 x i32> <{lanes}>")
    lanes = ", ".join(f"i32 {j}" for j in range(16))
    return "\n".join([*lines, f"  %r = shufflevector <8 x {kind}> %h0, <8 x {kind}> %h1, <16 x i32> <{lanes}>",
                      f"  ret <16 x {kind}> %r", "}", ""])


def _whole(name: str, instruction: str, result: str, operand: str) -> str:
    """The same for an instruction that takes all 16 lanes."""
    return f"""
declare {result} @{instruction}({result}, {operand}, {operand})
define linkonce_odr hidden {result} @{name}({result} %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {{
  %x = bitcast <16 x i32> %a to {operand}
  %y = bitcast <16 x i32> %b to {operand}
  %r = call {result} @{instruction}({result} %c, {operand} %x, {operand} %y)
  ret {result} %r
}}
"""


#: Dot products of bf16 pairs, by the name that chips.toml calls them.
_BF16_DOTS = {
    "avx512": _whole("inferloom_dot_pair", "llvm.x86.avx512bf16.dpbf16ps.512", "<16 x float>", "<32 x bfloat>"),
    "neon": _quarters("inferloom_dot_pair", "llvm.aarch64.neon.bfdot.v4f32.v8bf16", "<4 x float>", "<8 x bfloat>"),
}
_SDOT = _quarters("inferloom_dot_quad_signed", "llvm.aarch64.neon.sdot.v4i32.v16i8", "<4 x i32>", "<16 x i8>")
#: Dot products of four 8-bit integers. "sdot" has both signed, the others the first unsigned.
_I8_DOTS = {
    "vnni": _whole("inferloom_dot_quad", "llvm.x86.avx512.vpdpbusd.512", "<16 x i32>", "<64 x i8>"),
    "usdot": _quarters("inferloom_dot_quad", "llvm.aarch64.neon.usdot.v4i32.v16i8", "<4 x i32>", "<16 x i8>"),
    "sdot": _SDOT,
    "avx2": pair_products(8, "llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pmadd.ub.sw"),
    "avx512bw": pair_products(16, "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pmaddubs.w.512"),
}
#: Those that add pairs instead of four: kernels that multiply much prepare their operands for these (integers.py).
PAIR_DOTS = ("avx2", "avx512bw")


@dataclass(frozen=True, slots=True)
class CpuIsa:
    """Register blocking of the matmul (`rows` x `vectors` of 16 floats), its k slice in steps; dot products.

    `bf16_dot` and `i8_dot` name instructions, "" for none: then dot products are spelled out.
    """

    rows: int
    vectors: int
    k_slice: int
    bf16_dot: str = ""
    i8_dot: str = ""

    def __post_init__(self) -> None:
        for name, known in (("bf16_dot", _BF16_DOTS), ("i8_dot", _I8_DOTS)):
            if getattr(self, name) not in ("", *known):
                raise UnsupportedError(f"chips.toml: {name} = {getattr(self, name)!r} is not known; there are: "
                                       f"{', '.join(known)}, and \"\" for none")

    @property
    def llvm(self) -> str:
        """LLVM IR that kernels using this ISA import."""
        return _PREFETCH + _BF16_DOTS.get(self.bf16_dot, "") + _I8_DOTS.get(self.i8_dot, "")

    def dot_pair(self, acc: Expr, x: Expr, w: Expr, lanes: int = LANES) -> Expr:
        """acc + x0*w0 + x1*w1 for 16 lanes (or one) of bf16 pairs held in 32 bits."""
        if self.bf16_dot and lanes == LANES:
            return T.call_pure_extern(f32(LANES), "inferloom_dot_pair", acc, x, w)
        return fma(high_half(x, lanes), high_half(w, lanes), fma(low_half(x, lanes), low_half(w, lanes), acc, lanes), lanes)

    def dot_quad(self, acc: Expr, u: Expr, s: Expr, lanes: int = LANES) -> Expr:
        """acc + u0*s0 + u1*s1 + u2*s2 + u3*s3 in int32, for 16 lanes (or one) of four 8-bit integers held in 32 bits.

        Those of `u` are unsigned, those of `s` signed; the result is exact, so it is the same on every chip.
        """
        kind = typed("int32", lanes)
        if self.i8_dot == "sdot" and lanes == LANES:
            # u - 128 is u with its top bit flipped, and 128 times s is the negative of what sdot makes of -128.
            flip = splat(T.int32(-0x7F7F7F80), lanes)
            made = T.call_pure_extern(kind, "inferloom_dot_quad_signed", acc, T.bitwise_xor(u, flip), s)
            return made - T.call_pure_extern(kind, "inferloom_dot_quad_signed", splat(T.int32(0), lanes), flip, s)
        if self.i8_dot not in ("", *PAIR_DOTS) and lanes == LANES:
            return T.call_pure_extern(kind, "inferloom_dot_quad", acc, u, s)
        for i in range(4):
            left, right = splat(T.int32(24 - 8 * i), lanes), splat(T.int32(24), lanes)
            a = T.bitwise_and(T.shift_right(u, splat(T.int32(8 * i), lanes)), splat(T.int32(255), lanes))
            acc = acc + a * T.shift_right(T.shift_left(s, left), right)
        return acc


def low_half(pair: Expr, lanes: int = LANES) -> Expr:
    """The first of two bf16 in 32 bits, as float32."""
    return T.reinterpret(f32(lanes), T.shift_left(pair, splat(T.int32(16), lanes)))


def high_half(pair: Expr, lanes: int = LANES) -> Expr:
    """The second of two bf16 in 32 bits, as float32."""
    return T.reinterpret(f32(lanes), T.bitwise_and(pair, splat(T.int32(-65536), lanes)))
