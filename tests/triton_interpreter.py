"""Triton's interpreter with correct bfloat16: as it is, it multiplies bit patterns and truncates."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend_bfloat16() -> None:
    """Patch the interpreter of this process; harmless if done twice."""
    if hasattr(InterpreterBuilder, "_bfloat16_mended"):
        return
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_widened(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
            return TensorHandle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast_impl(self, source, dtype)

    InterpreterBuilder.create_dot = dot_of_widened
    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_fp_trunc = rounding_cast
    InterpreterBuilder._bfloat16_mended = True
