"""Cross-attention from queries at continuous coordinates to all tokens, with 2D rotary positions.

ViT-Up, arXiv 2606.14024: ``x + Wo softmax(Q K^T / sqrt(d)) V + bo`` with ``Q = rope(Wq LN(x) + bq)``.
Keys (projected and rotated) and values depend on the image only and come ready-made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .coordinates import position_dtype, rope_angles, rotate_complex, rotate_pairs, token_positions
from .implementations import resolve
from .norm_linear import norm_linear_backward
from .operator import Kernels, Operator, autocast, run_reference
from .primitives import LAYER_NORM_EPS, layer_norm, linear, linear_backward

# Attention probabilities held at once by the backward pass, in elements.
BACKWARD_SCORES = 1 << 24


class AttentionWeights(NamedTuple):
    """Parameters of the query side: LNq, Wq, bq, Wo, bo."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    query_weight: Tensor  # [D, D]
    query_bias: Tensor  # [D]
    out_weight: Tensor  # [D, D]
    out_bias: Tensor  # [D]


def rope_cross_attention_reference(
    x: Tensor,
    coords: Tensor,
    key: Tensor,
    value: Tensor,
    weights: AttentionWeights,
    inv_freq: Tensor,
    token_grid: tuple[int, int],
) -> Tensor:
    """Definition of :func:`rope_cross_attention`."""
    normed = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS)
    query = F.linear(normed, weights.query_weight, weights.query_bias)  # [B, N, D]
    query = query.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)  # [B, Hh, N, d]
    position = token_positions(coords.to(position_dtype(coords, x)), token_grid)
    query = rotate_pairs(query, rope_angles(position, inv_freq).unsqueeze(1))
    attended = F.scaled_dot_product_attention(query, key, value)  # softmax(Q K^T / sqrt(d)) V
    attended = attended.transpose(1, 2).flatten(-2)  # [B, N, D]
    return x + F.linear(attended, weights.out_weight, weights.out_bias)


def _angles(x: Tensor, coords: Tensor, inv_freq: Tensor, token_h: int, token_w: int) -> Tensor:
    """Rotary angles of the queries, for all heads alike.  # [B, N, 1, d / 2]"""
    position = token_positions(coords.to(position_dtype(coords, x)), (token_h, token_w))
    return rope_angles(position, inv_freq).unsqueeze(2)


def _rotated_query(x: Tensor, key: Tensor, weights: AttentionWeights, angles: Tensor) -> Tensor:
    """Projected and rotated queries, heads before queries as attention wants them.  # [B, Hh, N, d]"""
    normed = layer_norm(x, weights.norm_weight, weights.norm_bias)
    query = linear(normed, weights.query_weight, weights.query_bias)  # [B, N, D]
    return rotate_complex(query.unflatten(-1, (key.shape[1], key.shape[3])), angles).transpose(1, 2)


def _forward(
    x: Tensor,
    coords: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    inv_freq: Tensor,
    token_h: int,
    token_w: int,
) -> Tensor:
    weights = AttentionWeights(norm_weight, norm_bias, query_weight, query_bias, out_weight, out_bias)
    query = _rotated_query(x, key, weights, _angles(x, coords, inv_freq, token_h, token_w))
    attended = F.scaled_dot_product_attention(query, key, value)  # [B, Hh, N, d]
    return linear(attended.transpose(1, 2).flatten(-2), out_weight, out_bias, residual=x)


def _attend_again(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention for the backward pass, and the logarithms of its sums where PyTorch's fused kernel needs them."""
    if query.device.type == "cpu" and query.numel() and key.numel():
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return F.scaled_dot_product_attention(query, key, value), None


def _attention_backward(
    grad: Tensor,  # [B, Hh, N, d]
    query: Tensor,  # [B, Hh, N, d]
    key: Tensor,  # [B, Hh, T, d]
    value: Tensor,  # [B, Hh, T, d]
    attended: Tensor,  # [B, Hh, N, d]
    log_sums: Tensor | None,  # [B, Hh, N]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``softmax(Q K^T / sqrt(d)) V``: by the fused kernel, else in float32, some queries at a time."""
    if log_sums is not None:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return fused(grad.contiguous(), query, key, value, attended, log_sums, 0.0, False)
    wide = torch.promote_types(query.dtype, torch.float32)
    grad, query, key, value = (t.to(wide) for t in (grad, query, key, value))
    scale = 1.0 / math.sqrt(query.shape[-1])
    grad_query, grad_key, grad_value = (
        torch.empty_like(query),
        torch.zeros_like(key),
        torch.zeros_like(value),
    )
    step = max(1, BACKWARD_SCORES // max(1, key.shape[0] * key.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], step):
        part = slice(start, start + step)
        q, g = query[:, :, part], grad[:, :, part]
        probability = torch.softmax(q @ key.mT * scale, dim=-1)  # [B, Hh, n, T]
        grad_value += probability.mT @ g
        grad_score = g @ value.mT
        grad_score = probability * (grad_score - (probability * grad_score).sum(-1, keepdim=True)) * scale
        grad_query[:, :, part] = grad_score @ key
        grad_key += grad_score.mT @ q
    return grad_query, grad_key, grad_value


def rotation_backward(
    query: Tensor,  # [B, N, Hh, d]
    grad: Tensor,  # [B, N, Hh, d]
    inv_freq: Tensor,  # [d / 4]
    token_grid: tuple[int, int],
) -> Tensor:
    """Gradient for coordinates in [0, 1] of rotated queries, from theirs.  # [B, N, 2]"""
    a, b = query.unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, Hh, d / 2]
    grad_a, grad_b = grad.unflatten(-1, (-1, 2)).unbind(-1)
    grad_angles = (grad_b * a - grad_a * b).sum(2)  # [B, N, d / 2]
    frequency = inv_freq.to(query.dtype) * (2 * math.pi)
    grad_position = (grad_angles.unflatten(-1, (2, -1)) * frequency).sum(-1)  # [B, N, 2]
    return token_positions(grad_position, token_grid)


def _backward(
    grad: Tensor,
    x: Tensor,
    coords: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    inv_freq: Tensor,
    token_h: int,
    token_w: int,
    needs_grad: list[bool],
) -> list[Tensor]:
    weights = AttentionWeights(norm_weight, norm_bias, query_weight, query_bias, out_weight, out_bias)
    angles = _angles(x, coords, inv_freq, token_h, token_w)
    query = _rotated_query(x, key, weights, angles)  # [B, Hh, N, d]
    attended, log_sums = _attend_again(query, key, value)  # [B, Hh, N, d]
    grad_attended, grad_out_weight, grad_out_bias = linear_backward(
        grad, attended.transpose(1, 2).flatten(-2), out_weight, (True, *needs_grad[8:10])
    )
    grad_attended = grad_attended.unflatten(-1, (key.shape[1], key.shape[3])).transpose(1, 2)
    grad_query, grad_key, grad_value = _attention_backward(
        grad_attended, query, key, value, attended, log_sums
    )
    grad_query = grad_query.transpose(1, 2)  # [B, N, Hh, d]

    grad_coords = None
    if needs_grad[1]:
        rotated = query.transpose(1, 2).to(angles.dtype), grad_query.to(angles.dtype)
        grad_coords = rotation_backward(*rotated, inv_freq, (token_h, token_w)).to(coords.dtype)

    grad_query = rotate_complex(grad_query, -angles).flatten(-2).to(x.dtype)  # [B, N, D]
    grad_x, *grads_query = norm_linear_backward(
        grad_query, x, norm_weight, norm_bias, query_weight, [needs_grad[0], *needs_grad[4:8]]
    )
    if grad_x is not None:
        grad_x = grad_x + grad
    grads = (grad_x, grad_coords, grad_key, grad_value, *grads_query, grad_out_weight, grad_out_bias)
    # The dtype of each gradient is that of its argument; coordinates have their own.
    return [
        (g if i == 1 else g.to(x.dtype)).contiguous()
        for i, (g, needed) in enumerate(zip(grads, needs_grad, strict=True))
        if needed
    ]


_operator = Operator(
    "rope_cross_attention",
    "Tensor x, Tensor coords, Tensor key, Tensor value, Tensor norm_weight, Tensor norm_bias, "
    "Tensor query_weight, Tensor query_bias, Tensor out_weight, Tensor out_bias, Tensor inv_freq, "
    "SymInt token_h, SymInt token_w",
    differentiable=10,
    output_shape=lambda x, *_: x.shape,
    torch_kernels=Kernels(_forward, _backward),
)


def rope_cross_attention(
    x: Tensor,  # [B, N, D]
    coords: Tensor,  # [B, N, 2]
    key: Tensor,  # [B, Hh, h * w, d]
    value: Tensor,  # [B, Hh, h * w, d]
    weights: AttentionWeights,
    inv_freq: Tensor,  # [d / 4]
    token_grid: tuple[int, int],
    *,
    impl: str = "auto",
) -> Tensor:  # [B, N, D]
    """Attend from queries at continuous coordinates to all tokens, with residual.

    Args:
        x: query states, any floating dtype.
        coords: (x, y) in [0, 1], float32 or float64; rotary angles are computed in float32 or better.
        key: projected and rotated keys.
        value: projected values.
        weights: LayerNorm, query and output projections, in the dtype of ``x``.
        inv_freq: rotary frequencies of one axis, taken as float32 numbers, see :func:`rope_inv_freq`.
        token_grid: rows and columns of the tokens, (h, w).
        impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

    Returns:
        New query states in the dtype of ``x``; differentiable for ``x``, ``coords``, ``key``, ``value`` and
        every weight.

    Raises:
        InputError: wrong shape, dtype or device, or an ``impl`` that cannot run.
    """
    checks.check_features("x", x, "(B, N, D)")
    checks.check_coords(coords, *x.shape[:2])
    checks.check_device("coords", coords, x)
    x, key, value, *cast = autocast(x, key, value, *weights)
    weights = AttentionWeights(*cast)
    B, _, D = x.shape
    checks.check_features("key", key, "(B, Hh, h * w, d)")
    token_grid, heads = checks.check_token_grid(token_grid), key.shape[1]
    if heads == 0 or D % heads or D // heads % 4:
        raise checks.expected(
            "key", f"heads of a width that is a multiple of 4, together D = {D} wide", tuple(key.shape)
        )
    checks.check_weight("key", key, (B, heads, token_grid[0] * token_grid[1], D // heads), x)
    checks.check_weight("value", value, key.shape, x)
    for field, weight in zip(AttentionWeights._fields, weights, strict=True):
        shape = (D, D) if field in ("query_weight", "out_weight") else (D,)
        checks.check_weight(f"weights.{field}", weight, shape, x)
    inv_freq = checks.check_frequencies("inv_freq", inv_freq, x, D // heads // 4)
    impl = resolve(impl, x, {"the width D": D}, key.shape[-1], tensors=(coords, key, value, *weights))
    if impl == "reference":
        return run_reference(
            rope_cross_attention_reference, x, coords, key, value, weights, inv_freq, token_grid
        )
    return _operator(x, coords, key, value, *weights, inv_freq, *token_grid, impl=impl)
