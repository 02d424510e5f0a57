"""Vector mathematics as TIR expressions, for any number of lanes and any CPU.

Dialects without fused products spell them out: constants that are multiplied with integers have so few bits that the
products are exact. Polynomials were fitted with Chebyshev nodes; relative errors are about 1e-7. `exp(0)` is exactly 1
and the exp of a very negative number exactly 0, on which the attention kernel relies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.types import LARGEST, DType
from inferloom.targets.tvm.emit import f32, number, splat, typed

Expr = Any

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444170128554
_EXP = (0.500000001, 0.16666576, 0.0416664625, 0.00836334833, 0.00139339118)
_EXP2 = (1.0, 0.693146978, 0.240222421, 0.0555073375, 0.00967151287, 0.0013264724)
_TANH = (0.999999996, -0.333332535, 0.133309573, -0.0537070676, 0.0205449054, -0.00560768872)
_ERF_SMALL = (1.12837917, -0.376126269, 0.112835975, -0.0268543288, 0.00518931194, -0.000801885499, 7.88249711e-05)
_ERF_LARGE = (0.00030321301, -1.13016668, -0.631937093, -0.109978245, 0.0263647175, -0.00474022238, 0.000592769546,
              -4.55906234e-05, 1.61406165e-06)
_SIN = (-0.166666645, 0.00833271841, -0.000195815008)
_COS = (0.0416666645, -0.00138882737, 2.45416134e-05)
_LOG = (0.333333312, -0.24999989, 0.200007075, -0.166684802, 0.142499365, -0.124110506, 0.116615114, -0.115712011,
        0.0714975345)
_HALF_PI = (1.5625, 0.0081787109375, 0.00011730194091796875, 3.1391647326017846e-07)


class Dialect(Enum):
    """What operations beyond TIR's own are written as."""

    LLVM = "LLVM's intrinsics"
    LLVM_UNFUSED = "LLVM's intrinsics, but products and sums one after the other"
    PLAIN = "TVM's own functions, products and sums one after the other"


_dialect: ContextVar[Dialect] = ContextVar("dialect", default=Dialect.LLVM)
_f16: ContextVar[bool] = ContextVar("f16", default=True)


@contextmanager
def dialect(wanted: Dialect, f16: bool = True) -> Iterator[None]:
    """Kernels that are emitted in this context are written in `wanted`; with `f16`, the chip converts halves by itself."""
    tokens = _dialect.set(wanted), _f16.set(f16)
    try:
        yield
    finally:
        _dialect.reset(tokens[0])
        _f16.reset(tokens[1])


def is_plain() -> bool:
    """Whether kernels are written for devices that are reached by source code."""
    return _dialect.get() is Dialect.PLAIN


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """a * b + c with one rounding, where the dialect has it."""
    if _dialect.get() is not Dialect.LLVM:
        return a * b + c
    return T.call_llvm_pure_intrin(f32(lanes), "llvm.fma", a, b, c)


_PLAIN = {"llvm.sqrt": T.sqrt, "llvm.fabs": T.fabs, "llvm.floor": T.floor, "llvm.rint": lambda x: T.floor(x + T.float32(0.5))}


def _unary(name: str, x: Expr, lanes: int) -> Expr:
    if is_plain():
        return _PLAIN[name](x)
    return T.call_llvm_pure_intrin(f32(lanes), name, x)


def sqrt(x: Expr, lanes: int) -> Expr:
    return _unary("llvm.sqrt", x, lanes)


def absolute(x: Expr, lanes: int) -> Expr:
    return _unary("llvm.fabs", x, lanes)


def rsqrt(x: Expr, lanes: int) -> Expr:
    return number(1.0, lanes) / sqrt(x, lanes)


def floor(x: Expr, lanes: int) -> Expr:
    return _unary("llvm.floor", x, lanes)


def _poly(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    result = number(coefficients[-1], lanes)
    for c in reversed(coefficients[:-1]):
        result = fma(result, x, number(c, lanes), lanes)
    return T.Bind(result)


def exp(x: Expr, lanes: int) -> Expr:
    """e^x: 2^n * e^r with |r| <= ln2/2; 0 below -87.3, infinity above 88.7."""
    x = T.Bind(x)
    clamped = T.Bind(T.max(T.min(x, number(88.8, lanes)), number(-87.3, lanes)))
    n = T.Bind(_unary("llvm.rint", clamped * number(_LOG2E, lanes), lanes))
    r = fma(n, number(-_LN2_HIGH, lanes), clamped, lanes)
    r = T.Bind(fma(n, number(-_LN2_LOW, lanes), r, lanes))
    p = fma(_poly(_EXP, r, lanes) * r, r, r, lanes) + number(1.0, lanes)
    bits = T.shift_left(T.cast(n, typed("int32", lanes)) + splat(T.int32(127), lanes), splat(T.int32(23), lanes))
    scaled = p * T.reinterpret(f32(lanes), bits)
    return T.Bind(T.Select(x < number(-87.3, lanes), number(0.0, lanes), scaled))


def exp_below(x: Expr, lanes: int) -> Expr:
    """e^x for x <= 0: exactly 1 at 0 and exactly 0 below -88; fewer steps than `exp`, for softmax."""
    if _dialect.get() is not Dialect.LLVM:  # TVM would cancel what is written out below
        return exp(x, lanes)
    clamped = T.Bind(T.max(x, number(-88.03, lanes)))  # whose 2^n is 2^-127: bits of 0
    # Adding 1.5 * 2^23 leaves the integer nearest to x * log2(e) in the lowest bits.
    shifted = T.Bind(fma(clamped, number(_LOG2E, lanes), number(12582912.0, lanes), lanes))
    f = T.Bind(fma(clamped, number(_LOG2E, lanes), number(12582912.0, lanes) - shifted, lanes))
    p = _poly(_EXP2, f, lanes)
    bits = T.shift_left(T.reinterpret(typed("int32", lanes), shifted), splat(T.int32(23), lanes))
    return T.Bind(p * T.reinterpret(f32(lanes), bits + splat(T.int32(0x3F800000), lanes)))


def log(x: Expr, lanes: int) -> Expr:
    """Natural logarithm: e * ln2 + log(1 + f) with 1 + f between sqrt(1/2) and sqrt(2); -inf of 0, NaN below."""
    x = T.Bind(x)
    normal = T.Bind(T.Select(x < number(2.0**-126, lanes), x * number(2.0**23, lanes), x))
    # Rounding the exponent at sqrt(2) instead of 2 makes f small on both sides of 0.
    bits = T.Bind(T.reinterpret(typed("int32", lanes), normal) - splat(T.int32(0x3F3504F3), lanes))
    whole = T.cast(T.shift_right(bits, splat(T.int32(23), lanes)), f32(lanes))
    e = T.Bind(whole - T.Select(x < number(2.0**-126, lanes), number(23.0, lanes), number(0.0, lanes)))
    part = T.bitwise_and(bits, splat(T.int32(0x7FFFFF), lanes)) + splat(T.int32(0x3F3504F3), lanes)
    f = T.Bind(T.reinterpret(f32(lanes), part) - number(1.0, lanes))
    square = T.Bind(f * f)
    small = fma(_poly(_LOG, f, lanes) * f, square, fma(square, number(-0.5, lanes), f, lanes), lanes)
    result = T.Bind(fma(e, number(_LN2_HIGH, lanes), fma(e, number(_LN2_LOW, lanes), small, lanes), lanes))
    # What no logarithm belongs to: infinity and NaN stay, 0 gives -infinity, less gives NaN.
    inf = number(float("inf"), lanes)
    result = T.Bind(T.Select(x < inf, result, x))
    zero = number(0.0, lanes)
    return T.Bind(T.Select(x > zero, result, T.Select(x < zero, inf - inf, T.Select(x <= zero, zero - inf, x))))


def sigmoid(x: Expr, lanes: int) -> Expr:
    one = number(1.0, lanes)
    return T.Bind(one / (one + exp(number(0.0, lanes) - x, lanes)))


def tanh(x: Expr, lanes: int) -> Expr:
    x = T.Bind(x)
    size = T.Bind(absolute(x, lanes))
    one, two = number(1.0, lanes), number(2.0, lanes)
    small = _poly(_TANH, T.Bind(x * x), lanes) * x
    large = one - two / (exp(size * two, lanes) + one)
    signed = T.Select(x < number(0.0, lanes), number(0.0, lanes) - large, large)
    return T.Bind(T.Select(size < number(0.63, lanes), small, signed))


def erf(x: Expr, lanes: int) -> Expr:
    x = T.Bind(x)
    size = T.Bind(T.min(absolute(x, lanes), number(4.0, lanes)))
    small = _poly(_ERF_SMALL, T.Bind(x * x), lanes) * x
    large = number(1.0, lanes) - exp(_poly(_ERF_LARGE, size, lanes), lanes)
    signed = T.Select(x < number(0.0, lanes), number(0.0, lanes) - large, large)
    return T.Bind(T.Select(size < number(1.0, lanes), small, signed))


def _quadrant(x: Expr, lanes: int) -> tuple[Expr, Expr]:
    """Multiple of pi/2 nearest to x and what is left, exact for |x| up to 2e5: all but the last part of pi/2 has 7 bits."""
    n = T.Bind(_unary("llvm.rint", x * number(2 / 3.141592653589793, lanes), lanes))
    r = x
    for part in _HALF_PI:
        r = T.Bind(fma(n, number(-part, lanes), r, lanes))
    return T.Bind(T.cast(n, typed("int32", lanes))), r


def _turn(x: Expr, lanes: int, shift: int) -> Expr:
    n, r = _quadrant(T.Bind(x), lanes)
    n = T.Bind(n + splat(T.int32(shift), lanes))
    s = T.Bind(r * r)
    sine = fma(_poly(_SIN, s, lanes) * s, r, r, lanes)
    cosine = fma(_poly(_COS, s, lanes) * s, s, fma(s, number(-0.5, lanes), number(1.0, lanes), lanes), lanes)

    def bit(mask: int) -> Expr:
        return T.bitwise_and(n, splat(T.int32(mask), lanes)) != splat(T.int32(0), lanes)

    value = T.Bind(T.Select(bit(1), cosine, sine))
    return T.Bind(T.Select(bit(2), number(0.0, lanes) - value, value))


def sin(x: Expr, lanes: int) -> Expr:
    return _turn(x, lanes, 0)


def cos(x: Expr, lanes: int) -> Expr:
    return _turn(x, lanes, 1)


def gelu(x: Expr, lanes: int, approximate: str) -> Expr:
    x = T.Bind(x)
    half, one = number(0.5, lanes), number(1.0, lanes)
    if approximate == "tanh":
        inner = number(0.7978845608028654, lanes) * (x + number(0.044715, lanes) * x * x * x)
        return T.Bind(x * half * (one + tanh(inner, lanes)))
    return T.Bind(x * half * (one + erf(x * number(0.7071067811865476, lanes), lanes)))


def bf16_to_f32(bits: Expr, lanes: int) -> Expr:
    """uint16 bits of a bf16 as float32."""
    raised = T.shift_left(T.cast(bits, typed("uint32", lanes)), splat(T.uint32(16), lanes))
    return T.reinterpret(f32(lanes), raised)


def f16_to_f32(x: Expr, lanes: int) -> Expr:
    """A finite float16 as float32, exactly.

    Where it is spelled out, 5 bits of exponent above 10 of mantissa lie where a float32 has its own, smaller by 2^112. LLVM
    would call a function for each lane instead, and makes wrong code of that for RISC-V's vectors (LLVM 22).
    """
    if _f16.get():
        return T.cast(x, f32(lanes))

    def word(v: int) -> Expr:
        return splat(T.int32(v), lanes)

    bits = T.Bind(T.cast(T.reinterpret(typed("int16", lanes), x), typed("int32", lanes)))
    size = T.shift_left(T.bitwise_and(bits, word(0x7FFF)), word(13))
    sign = T.bitwise_and(bits, word(-(2**31)))  # the half's own, extended
    return T.reinterpret(f32(lanes), T.bitwise_or(size, sign)) * number(2.0**112, lanes)


def to_int32(x: Expr, lanes: int) -> Expr:
    """The nearest integer, ties to even."""
    return T.Bind(T.cast(_unary("llvm.rint", x, lanes), typed("int32", lanes)))


def to_8_bits(x: Expr, dtype: DType, lanes: int) -> Expr:
    """float32 as bits of the nearest i8 or f8, ties to even; of larger ones, of the largest (127 or 448)."""
    most = LARGEST[dtype]
    x = T.Bind(T.max(T.min(x, number(most, lanes)), number(-most, lanes)))
    if dtype is DType.I8:
        return T.cast(to_int32(x, lanes), typed("int8", lanes))

    def word(v: int) -> Expr:
        return splat(T.int32(v), lanes)

    size = T.Bind(absolute(x, lanes))
    bits = T.Bind(T.reinterpret(typed("int32", lanes), size))
    # 3 bits of mantissa stay, and the exponent counts from 7 instead of 127. Below 2^-6 there are multiples of 2^-9.
    rounded = T.shift_right(bits + word(0x7FFFF) + T.bitwise_and(T.shift_right(bits, word(20)), word(1)), word(20)) - word(960)
    small = to_int32(size * number(512.0, lanes), lanes)
    code = T.Bind(T.Select(size < number(2.0**-6, lanes), small, rounded))
    sign = T.bitwise_and(T.shift_right(T.reinterpret(typed("int32", lanes), x), word(24)), word(0x80))
    return T.cast(T.bitwise_or(code, sign), typed("int8", lanes))


def from_8_bits(bits: Expr, dtype: DType, lanes: int) -> Expr:
    """i8 or f8 as float32."""
    wide = T.Bind(T.cast(bits, typed("int32", lanes)))
    if dtype is DType.I8:
        return T.cast(wide, f32(lanes))

    def word(v: int) -> Expr:
        return splat(T.int32(v), lanes)

    size = T.shift_left(T.bitwise_and(wide, word(0x7F)), word(20))
    sign = T.bitwise_and(wide, word(-(2**31)))  # the byte's own, extended
    return T.reinterpret(f32(lanes), T.bitwise_or(size, sign)) * number(2.0**120, lanes)


def f32_to_bf16(x: Expr, lanes: int) -> Expr:
    """float32 as uint16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    x = T.Bind(x)
    bits = T.Bind(T.reinterpret(typed("uint32", lanes), x))

    def word(v: int) -> Expr:
        return splat(T.uint32(v), lanes)

    odd = T.bitwise_and(T.shift_right(bits, word(16)), word(1))
    rounded = T.shift_right(bits + word(0x7FFF) + odd, word(16))
    quiet = T.bitwise_or(T.shift_right(bits, word(16)), word(0x40))
    return T.cast(T.Bind(T.Select(x == x, rounded, quiet)), typed("uint16", lanes))
