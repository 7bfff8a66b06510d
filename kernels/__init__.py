"""Kernels of the five operations, one room for each kind, with the same basenames as ``vitup_fast.ops``.

Importing this offers them to the operations; Triton and the compiled extension are loaded when a kernel first runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..errors import expected
from ..ops.implementations import COMPILED
from ..ops.operator import Backend, Kernels, register_backend
from . import cuda
from .cpu import kernels as cpu_kernels

_OPERATIONS = ("bilinear_sample", "residual_mlp", "rope_cross_attention", "film_mlp", "norm_linear")


def _gpu_kernels(operation: str, *compiled: str, forward: str = "forward") -> Kernels:
    """Triton kernels of an operation, with compiled ones in the place of those of the named operations."""

    def runner(function: str) -> Callable[..., Any]:
        def run(*arguments: object) -> Any:
            module = importlib.import_module(f"{__name__}.triton.{operation}")
            if not compiled:
                return getattr(module, function)(*arguments)
            with cuda.compiled_kernels(compiled):
                return getattr(module, function)(*arguments)

        return run

    argmax = runner("argmax") if operation == "norm_linear" else None
    return Kernels(runner(forward), runner("backward"), argmax=argmax)


def _fp8_kernels(operation: str) -> Kernels:
    """Those of ``"cuda"``, forward only, with 8-bit products where there are some."""
    forward = "forward_fp8" if operation in ("residual_mlp", "film_mlp") else "forward"
    return _gpu_kernels(operation, *COMPILED, forward=forward)._replace(backward=_no_backward)


def _no_backward(*_: object) -> Any:
    raise expected(
        "impl", "an implementation with gradients", "'cuda_fp8'", "Use 'cuda', 'triton' or 'auto'."
    )


register_backend("triton", Backend({name: _gpu_kernels(name) for name in _OPERATIONS}))
register_backend(
    "cuda", Backend({name: _gpu_kernels(name, *COMPILED) for name in _OPERATIONS}, cuda.faster_widths)
)
register_backend("cuda_fp8", Backend({name: _fp8_kernels(name) for name in _OPERATIONS}))
register_backend("cpu", Backend({name: cpu_kernels(name) for name in _OPERATIONS}))
register_backend("cpu_int8", Backend({name: cpu_kernels(name, int8=True) for name in _OPERATIONS}))
