"""Bodies of row kernels that every target is tested with."""

from __future__ import annotations

from collections.abc import Sequence

from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets.single import ROWS, TOKENS, Body, tensor

UNARY = ("neg", "abs", "exp", "floor", "tanh", "sin", "cos", "erf", "sigmoid", "relu", "silu")
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")


def chain(width: int) -> Body:
    """Every pointwise op, summed up."""

    def body(b: Builder) -> Sequence[Value]:
        x, y = b.input("x", tensor(TOKENS, width)), b.input("y", tensor(width))
        out = [b.emit(op, x) for op in UNARY] + [b.emit(op, x, y) for op in BINARY]
        out += [b.emit("gelu", x), b.emit("gelu", x, approximate="tanh")]
        out += [b.emit(op, b.emit("add", b.emit("abs", x), b.scalar(0.5))) for op in ("sqrt", "rsqrt", "log")]
        out += [b.emit("where", b.emit(op, x, y), x, b.scalar(2.5)) for op in ("lt", "le", "eq")]
        out.append(b.emit("cast", b.emit("lt", x, y), dtype=DType.F32))
        return [b.emit("concat", *out[:12], axis=1), b.emit("concat", *out[12:], axis=1)]

    return body


def norms(width: int) -> Body:
    """A residual sum and its norms, of f32 and bf16 operands."""

    def body(b: Builder) -> Sequence[Value]:
        x, r = b.input("x", tensor(TOKENS, width, dtype=DType.BF16)), b.input("r", tensor(TOKENS, width))
        w, c = b.input("w", tensor(width)), b.input("c", tensor(width))
        h = b.emit("add", b.emit("cast", x, dtype=DType.F32), r)
        n = b.emit("rms_norm", h, w, eps=1e-5)
        return [h, n, b.emit("cast", n, dtype=DType.BF16), b.emit("layer_norm", h, w, c, eps=1e-5),
                b.emit("layer_norm", h, eps=1e-5), b.emit("rms_norm", h, eps=1e-6)]

    return body


def heads(count: int, dim: int) -> Body:
    """Norm by head, reductions over one and two axes, permute, slices of every axis, expand."""

    def body(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, 2 * count * dim))
        left = b.emit("slice", x, axis=1, start=count * dim, stop=2 * count * dim)
        y = b.emit("reshape", left, shape=(TOKENS, count, dim))
        w = b.input("w", tensor(dim))
        normed = b.emit("rms_norm", y, w, eps=1e-5)
        turned = b.emit("permute", y, axes=(0, 2, 1))
        total = b.emit("sum", y, axes=(1, 2), keepdims=True)
        return [normed, turned, b.emit("slice", y, axis=1, start=1, stop=count),
                b.emit("slice", y, axis=2, start=1, stop=dim, step=2), b.emit("div", y, total),
                b.emit("sub", y, b.emit("max", y, axes=(2,), keepdims=True)), b.emit("mean", y, axes=(2,)),
                b.emit("expand", b.emit("slice", y, axis=1, start=0, stop=1), shape=(TOKENS, 3, dim)),
                b.emit("reshape", turned, shape=(TOKENS, count * dim))]

    return body


def rotary(count: int, dim: int, turned: int, interleaved: bool) -> Body:
    """Rotary with tables computed from positions, partly turned heads."""

    def body(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, count, dim))
        positions = b.input("positions", tensor(TOKENS, dtype=DType.I32))
        place = b.emit("reshape", b.emit("cast", positions, dtype=DType.F32), shape=(TOKENS, 1))
        angle = b.emit("mul", place, b.input("freq", tensor(turned // 2)))
        return [b.emit("rotary", x, b.emit("cos", angle), b.emit("sin", angle), interleaved=interleaved)]

    return body


def lookup(width: int, dtype: DType) -> Body:
    """Embeddings from plain and packed tables, with a learned position."""

    def body(b: Builder) -> Sequence[Value]:
        ids = b.input("ids", tensor(TOKENS, dtype=DType.I32))
        table = b.input("table", tensor(7, width, dtype=dtype))
        pair = 2 if dtype is DType.BF16 else 1
        packed = b.input("packed", tensor(1, 32 * -(-width // 32) // pair, 64, pair, dtype=dtype))
        return [b.emit("embedding", ids, table), b.emit("packed_embedding", ids, packed, n=7, k=width)]

    return body


def gather(b: Builder) -> Sequence[Value]:
    """Rows wanted for logits, normed."""
    x, rows = b.input("x", tensor(TOKENS, 48)), b.input("rows", tensor(ROWS, dtype=DType.I32))
    return [b.emit("rms_norm", b.emit("gather_rows", x, rows), b.input("w", tensor(48)), eps=1e-5)]


def integers(b: Builder) -> Sequence[Value]:
    """Arithmetic on i32, a comparison that is used twice, casts to every element type."""
    x, y = b.input("x", tensor(TOKENS, 32)), b.input("y", tensor(TOKENS, dtype=DType.I32))
    shifted = b.emit("add", y, b.emit("constant", value=2.0, dtype=DType.I32))
    small = b.emit("lt", shifted, b.emit("constant", value=5.0, dtype=DType.I32))
    column = b.emit("reshape", small, shape=(TOKENS, 1))
    number = b.emit("reshape", b.emit("cast", shifted, dtype=DType.BF16), shape=(TOKENS, 1))
    return [b.emit("where", column, x, b.emit("neg", x)), b.emit("where", column, b.emit("exp", x), x),
            b.emit("mul", x, b.emit("cast", number, dtype=DType.F32)), shifted]


def empty_max(b: Builder) -> Sequence[Value]:
    """A row of nothing but minus infinity has that as its largest element."""
    x = b.input("x", tensor(TOKENS, 32))
    masked = b.emit("where", b.emit("lt", x, b.scalar(100.0)), b.scalar(float("-inf")), x)
    return [b.emit("max", masked, axes=(1,), keepdims=True)]


CASES: dict[str, Body] = {
    "chain_64": chain(64), "chain_7": chain(7), "norms_64": norms(64), "norms_40": norms(40), "norms_5": norms(5),
    "heads_4_16": heads(4, 16), "heads_3_6": heads(3, 6), "heads_2_32": heads(2, 32),
    "rotary_2_32": rotary(2, 32, 32, False), "rotary_3_8": rotary(3, 8, 8, False),
    "rotary_2_48": rotary(2, 48, 16, False), "rotary_2_64": rotary(2, 64, 32, False),
    "rotary_pairs": rotary(2, 16, 8, True), "lookup_64_f32": lookup(64, DType.F32),
    "lookup_64_bf16": lookup(64, DType.BF16), "lookup_20_bf16": lookup(20, DType.BF16), "gather": gather,
    "integers": integers, "empty_max": empty_max,
}
