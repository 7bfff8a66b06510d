"""Gradients of a linear layer's weight and bias, which several operations want."""

from __future__ import annotations

import torch
from torch import Tensor

from ...extension import load
from .context import SHORTEST_TILE, Context, arena


def weight_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a linear layer's weight and bias, ``grad^T x`` and the sum of ``grad`` over rows.

    Args:
        grad: contiguous, ``[..., E]``.
        x: contiguous, ``[..., D]``, D a multiple of 16.

    Returns:
        ``[E, D]`` and ``[E]``.
    """
    E, D = grad.shape[-1], x.shape[-1]
    cpu = load().cpu
    context = Context(x.dtype, D, tile_rows=SHORTEST_TILE, scratch_bytes=cpu.weight_gradient_scratch_bytes(D))
    grad_weight, grad_bias = x.new_empty(E, D), x.new_empty(E)
    sums = grad_weight, grad_bias
    if x.dtype != torch.float32:
        sums = arena.tensor((E, D), torch.float32), arena.tensor((E,), torch.float32)
    tensors = (grad, x, *sums, grad_weight, grad_bias)
    cpu.weight_gradient(context.handle, *(t.data_ptr() for t in tensors), grad.numel() // max(1, E), E, D)
    return grad_weight, grad_bias
