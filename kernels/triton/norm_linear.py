"""LayerNorm and linear layer in one product, optionally with the argmax over its outputs, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import layer_norm_backward, measure_moments, normalize
from .linear import column_sum, fold, fold_backward, linear, linear_argmax, matmul, weight_gradient


def forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Forward pass of :func:`vitup_fast.ops.norm_linear`."""
    rows = x.contiguous().view(-1, x.shape[-1])  # [M, D]
    layer = fold(weight, bias, norm_weight, norm_bias)
    return linear(rows, layer, measure_moments(rows))[0].view(*x.shape[:-1], weight.shape[0])


def argmax(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """Index of the largest output of each row; ``[..., D] -> [...]``."""
    rows = x.contiguous().view(-1, x.shape[-1])  # [M, D]
    layer = fold(weight, bias, norm_weight, norm_bias)
    labels = torch.empty(rows.shape[0], dtype=dtype, device=x.device)
    return linear_argmax(rows, layer, measure_moments(rows), labels).view(x.shape[:-1])


def normed_linear_backward(
    grad: Tensor,  # [M, E]
    x: Tensor,  # [M, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    weight: Tensor,  # [E, D]
    bias: Tensor,  # [E]
    needs_x: bool,
    residual: Tensor | None = None,  # [M, D]
    scale: float = 1.0,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``scale (W LN(x) + b)`` for x (plus a residual's), norm weight and bias, weight and bias."""
    layer = fold(weight, bias, norm_weight, norm_bias, scale)
    grad_x = None
    if needs_x:
        grad_x, *_ = layer_norm_backward(matmul(grad, layer.weight), x, residual=residual)
    grad_folded = weight_gradient(grad, normalize(x))
    return grad_x, *fold_backward(grad_folded, column_sum(grad), weight, norm_weight, norm_bias, scale)


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Gradients for every argument, as far as they are needed."""
    rows, grad_rows = x.contiguous().view(-1, x.shape[-1]), grad.view(-1, weight.shape[0])
    arguments = (x, norm_weight, norm_bias, weight, bias)
    grads = normed_linear_backward(grad_rows, rows, *arguments[1:], needs_grad[0])
    return [g.view(a.shape) for g, a, needed in zip(grads, arguments, needs_grad, strict=True) if needed]
