"""Residual MLP on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.primitives import MLPWeights
from .context import Context, Held, address, arena, needed_grads
from .weight_gradient import weight_gradient


def pack_mlp(context: Context, weights: MLPWeights) -> Held:
    """Pack an MLP with its LayerNorm."""
    parts = context.norm(*weights[:2]), context.matrix(*weights[2:4]), context.matrix(*weights[4:])
    tensors = tuple(t for part in parts for t in part.tensors)
    return Held(context.kernels.Mlp(*(part.handle for part in parts)), tensors)


def residual_mlp(
    context: Context,
    x: Tensor,  # [..., D]
    mlp: Held,
    out: Tensor | None,  # [..., D]
    preactivation: Tensor | None = None,  # [..., E]
) -> None:
    """``x + W2 gelu(W1 LN(x) + b1) + b2`` of contiguous ``x``; ``out`` may be ``x``.

    Where the preactivation ``W1 LN(x) + b1`` is kept for a backward pass, ``out`` may be left out.
    """
    D = x.shape[-1]
    addresses = address(out), address(preactivation)
    context.kernels.residual_mlp(context.handle, x.data_ptr(), mlp.handle, *addresses, x.numel() // D, D)


def kept_bytes(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, *_: Tensor) -> int:
    """Size of the hidden layer before its GELU."""
    return x.shape[0] * x.shape[1] * weight1.shape[0] * x.element_size()


def mlp_backward(
    grad: Tensor,  # [B, N, D]
    x: Tensor,  # [B, N, D]
    preactivation: Tensor,  # [B, N, E]
    weights: MLPWeights,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``x + W2 gelu(W1 LN(x) + b1) + b2`` for x and the six weights."""
    D = x.shape[-1]
    rows = x.numel() // D
    context = Context(x.dtype, D)
    norm = context.norm(*weights[:2])
    second_transposed = context.matrix(weights.weight2.mT, None)
    first_transposed = context.matrix(weights.weight1.mT, None)
    needs_first, needs_second = any(needs_grad[3:5]), any(needs_grad[5:])
    normed = arena.tensor(x.shape, x.dtype) if needs_first else None
    hidden = arena.tensor(preactivation.shape, x.dtype) if needs_second else None
    grad_preactivation = arena.tensor(preactivation.shape, x.dtype)
    grad_x = x.new_empty(x.shape)
    norm_sums = arena.tensor((context.kernels.tiles(context.handle, rows, 1), 2, D), torch.float32)
    grad_norm = x.new_empty(2, D)
    context.kernels.mlp_backward(
        context.handle,
        *(t.data_ptr() for t in (x, grad, preactivation)),
        *(held.handle for held in (norm, second_transposed, first_transposed)),
        *(address(t) for t in (normed, hidden, grad_preactivation, grad_x, norm_sums, grad_norm)),
        rows,
        D,
    )
    grads = [grad_x, *(g.clone() for g in grad_norm), None, None, None, None]
    if normed is not None:
        grads[3:5] = weight_gradient(grad_preactivation, normed)
    if hidden is not None:
        grads[5:] = weight_gradient(grad, hidden)
    return [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]


def forward(int8: bool, x: Tensor, *weights: Tensor, kept: Tensor | None = None) -> Tensor:
    """Forward of the operator."""
    x = x.contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    mlp, out = pack_mlp(context, MLPWeights(*weights)), x.new_empty(x.shape)
    residual_mlp(context, x, mlp, out, kept)
    return out


def backward(grad: Tensor, x: Tensor, *weights_and_needs: Any, kept: Tensor | None) -> list[Tensor]:
    """Backward of the operator."""
    *parameters, needs_grad = weights_and_needs
    weights = MLPWeights(*parameters)
    x, hidden = x.contiguous(), weights.weight1.shape[0]
    if kept is None:
        preactivation = arena.tensor((*x.shape[:-1], hidden), x.dtype)
        context = Context(x.dtype, x.shape[-1])
        residual_mlp(context, x, pack_mlp(context, weights), None, preactivation)
    else:
        preactivation = kept.view(x.dtype).view(*x.shape[:-1], hidden)
    return needed_grads(mlp_backward(grad, x, preactivation, weights, needs_grad), needs_grad)
