"""LayerNorm and a linear layer on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .context import Context, Held, address, arena, needed_grads
from .weight_gradient import weight_gradient


def norm_linear(context: Context, x: Tensor, norm: Held, matrix: Held, out: Tensor) -> None:
    """``W LN(x) + b`` of contiguous ``x`` ``[B, N, D]`` into ``out`` ``[B, N, E]``, each image of it contiguous."""
    B, N, D = x.shape
    context.kernels.norm_linear(
        context.handle, x.data_ptr(), norm.handle, matrix.handle, out.data_ptr(), B, N, D, out.stride(0)
    )


def norm_linear_backward(
    grad: Tensor,  # [B, N, E]
    x: Tensor,  # [B, N, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    weight: Tensor,  # [E, D]
    needs_grad: Sequence[bool],
    residual: Tensor | None = None,  # [B, N, D]
) -> list[Tensor | None]:
    """Gradients of ``W LN(x) + b`` for x, the norm's weight and bias, W and b; ``residual`` joins that of x."""
    E, D = weight.shape
    rows = x.numel() // D
    context = Context(x.dtype, max(E, D))
    norm, transposed = context.norm(norm_weight, norm_bias), context.matrix(weight.mT, None)
    normed = arena.tensor(x.shape, x.dtype) if needs_grad[3] or needs_grad[4] else None
    grad_x = x.new_empty(x.shape)
    norm_sums = arena.tensor((context.kernels.tiles(context.handle, rows, 1), 2, D), torch.float32)
    grad_norm = x.new_empty(2, D)
    context.kernels.norm_linear_backward(
        context.handle,
        *(address(t) for t in (grad, x, residual)),
        norm.handle,
        transposed.handle,
        *(address(t) for t in (normed, grad_x, norm_sums, grad_norm)),
        rows,
        D,
    )
    grads = [grad_x, *(g.clone() for g in grad_norm), None, None]
    if normed is not None:
        grads[3:] = weight_gradient(grad, normed)
    return [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]


def forward(int8: bool, x: Tensor, *layer: Tensor) -> Tensor:
    """Forward of the operator."""
    x = x.contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    out = x.new_empty(*x.shape[:-1], layer[2].shape[0])
    norm, matrix = context.norm(*layer[:2]), context.matrix(*layer[2:])
    norm_linear(context, x, norm, matrix, out)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Backward of the operator."""
    grads = norm_linear_backward(grad, x.contiguous(), norm_weight, norm_bias, weight, needs_grad)
    return needed_grads(grads, needs_grad)
