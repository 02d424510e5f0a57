"""Building one kernel: its arguments, typed views of them, and small helpers over TIR expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

LANES = 16
ARGS = 16
#: TIR wants a size; kernels index through pointers whose extents only the caller knows.
UNBOUNDED = 1 << 40

STORAGE = {"f32": "float32", "f16": "float16", "bf16": "uint16", "i32": "int32", "i8": "int8", "u8": "uint8", "f8": "int8"}

Expr = Any


def vectors(*sizes: int) -> int:
    """Lanes for data whose extents and offsets are `sizes`: whole vectors, or scalars.

    Nothing in between: LLVM 22 makes invalid code of some kernels with 4 or 8 lanes.
    """
    return LANES if all(size % LANES == 0 for size in sizes) else 1


def f32(lanes: int) -> str:
    return "float32" if lanes == 1 else f"float32x{lanes}"


def typed(kind: str, lanes: int) -> str:
    return kind if lanes == 1 else f"{kind}x{lanes}"


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def number(value: float, lanes: int = 1) -> Expr:
    return splat(T.float32(value), lanes)


def lane_of(base: Expr, lanes: int) -> Expr:
    """The index of `lanes` consecutive elements from `base`."""
    return base if lanes == 1 else T.ramp(base, 1, lanes)


def store(buffer: Expr, value: Expr, base: Expr, lanes: int) -> None:
    T.buffer_store(buffer, value, [lane_of(base, lanes)])


def bind(value: Expr) -> Expr:
    """Name a value, so that it is computed once."""
    return T.Bind(value)


def scratch(size: int, dtype: str = "float32") -> Expr:
    """A buffer on the stack."""
    return T.alloc_buffer((size,), dtype, annotations={"disable_lower_builtin": True})


def opaque(value: Expr, lanes: int = 1) -> Expr:
    """An int32 named by way of memory: TVM simplifies at length what depends on a quotient or a choice that it sees."""
    buffer, place = scratch(lanes, "int32"), lane_of(T.int32(0), lanes)
    T.buffer_store(buffer, value, [place])
    return bind(buffer[place])


def kernel(symbol: str, signature: list[tuple[int | str, str]], body: Callable[[list[Expr], Expr, Expr], None],
           llvm: str = "") -> Any:
    """A PrimFunc with the C ABI `void symbol(void* a0..a15, const int32_t* dims, int32_t chunk)`.

    `signature` lists (operand, element type) of the arguments in order; `body(views, dims, chunk)` emits the code.
    `llvm` is LLVM IR with the functions that the body calls.
    """
    if len(signature) > ARGS:
        raise ValueError(f"{symbol} needs {len(signature)} arguments, the ABI has {ARGS}")
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(symbol)
            handles = [T.arg(f"a{i}", T.handle(signature[i][1] if i < len(signature) else "int32"))
                       for i in range(ARGS)]
            dims_handle = T.arg("dims", T.handle("int32"))
            chunk = T.arg("chunk", T.int32())
            views = [T.decl_buffer((UNBOUNDED,), dtype, data=handle, align=4)
                     for handle, (_, dtype) in zip(handles, signature, strict=False)]
            dims = T.decl_buffer((4,), "int32", data=dims_handle, align=4)
            if llvm:
                with T.attr({"pragma_import_llvm": llvm}):
                    body(views, dims, chunk)
            else:
                body(views, dims, chunk)
    return builder.get()


def wide(index: Expr) -> Expr:
    """An index as int64, for what may exceed 2^31 elements."""
    return T.cast(index, "int64")

