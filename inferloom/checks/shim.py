"""Mends Triton 3.6's interpreter, so that it computes what a GPU would.

It holds bf16 as uint16 and then multiplies, adds and compares the bits; it narrows floats by cutting bits off; and
with NumPy 2.4 it cannot loop over bounds that were computed. Import this before a kernel runs.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def values(handle: Any) -> np.ndarray:
    """A tensor's data as numbers: bf16 as float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return np.asarray(handle.data.view(ml_dtypes.bfloat16).astype(np.float32))
    return np.asarray(handle.data)


def narrowed(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers in the storage of `dtype`, floats rounded to nearest even."""
    if dtype.scalar == tl.bfloat16:
        return np.ascontiguousarray(data.astype(np.float32).astype(ml_dtypes.bfloat16)).view(np.uint16)
    return data.astype(interpreter._get_np_dtype(dtype))


def cast(self: Any, source: Any, dtype: Any) -> Any:
    return Handle(narrowed(values(source), dtype), dtype.scalar)


def fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
    return cast(self, source, dtype)


def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    wide = acc.data.dtype
    return Handle(np.matmul(values(a).astype(wide), values(b).astype(wide)) + acc.data, acc.dtype.scalar)


def refuse_bf16(self: Any, left: Any, right: Any, op: Any) -> Any:
    """Kernels widen bf16 before they compute; anything else would be wrong here in silence."""
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        raise TypeError("arithmetic on bf16 in a kernel")
    return _binary(self, left, right, op)


def patch_tensor(tensor: Any, *scope: Any) -> None:
    _patch_tensor(tensor, *scope)
    index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
    if scope:
        scope[0].set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index


_binary, _patch_tensor = Builder.binary_op, interpreter._patch_lang_tensor
Builder.cast_impl = cast
Builder.create_fp_to_fp = fp_to_fp
Builder.create_dot = dot
Builder.binary_op = refuse_bf16
interpreter._patch_lang_tensor = patch_tensor
# Overflow checks double the time; bounds of indices are the code generator's own business and tested there.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
