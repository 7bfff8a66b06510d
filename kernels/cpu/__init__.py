"""Kernels for CPUs: what calls ``csrc/cpu``, one file per operation."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ...errors import expected
from ...ops.operator import Kernels
from . import bilinear_sample, film_mlp, norm_linear, residual_mlp, rope_cross_attention
from .context import arena

_MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (bilinear_sample, residual_mlp, rope_cross_attention, film_mlp, norm_linear)
}


def kernels(operation: str, *, int8: bool = False) -> Kernels:
    """Return the kernels of an operation, with products in 8-bit integers (forward only) if asked for."""
    module = _MODULES[operation]
    if int8:
        return Kernels(partial(_run, partial(module.forward, True)), _no_backward)
    forward, backward = partial(module.forward, False), module.backward
    return Kernels(partial(_run, forward), partial(_run, backward), getattr(module, "kept_bytes", None))


def _run(function: Any, *arguments: object, **kept: Tensor | None) -> Any:
    """Run a pass of an operator, in memory that the thread's last one has left."""
    arena.begin()
    return function(*arguments, **kept)


def _no_backward(*_: object) -> list[Tensor]:
    raise expected("impl", "an implementation with gradients", "'cpu_int8'", "Use 'cpu' or 'auto'.")
