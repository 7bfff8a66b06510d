"""Cross-attention with rotary positions on a CPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.rope_cross_attention import AttentionWeights, rotation_backward
from .context import SHORTEST_TILE, Context, Held, address, arena, coords_address, needed_grads, parts
from .norm_linear import norm_linear, norm_linear_backward
from .weight_gradient import weight_gradient

LOG2_E = 1 / math.log(2)


class Attention(NamedTuple):
    """Parameters of the query side of an attention."""

    norm: Held
    query: Held
    out: Held


class KeptAttention(NamedTuple):
    """What the backward pass of the attention wants of its forward pass."""

    attended: Tensor  # [B, N, D]
    rotated_query: Tensor  # [B, N, D], times log2(e) / sqrt(d)
    log2_sum: Tensor  # [B, Hh, N] float32


def pack_attention(context: Context, weights: AttentionWeights) -> Attention:
    """Pack the query side of an attention."""
    query = context.matrix(weights.query_weight, weights.query_bias)
    out = context.matrix(weights.out_weight, weights.out_bias)
    return Attention(context.norm(weights.norm_weight, weights.norm_bias), query, out)


def pack_image(context: Context, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hh, T, d]`` as kernels take them, ``[B * Hh, words]`` each."""
    return context.pack(key, int8=context.int8), context.pack(value.mT, int8=context.int8)


def rope_cross_attention(
    context: Context,
    x: Tensor,  # [B, N, D]
    coords: Tensor,  # [B, N, 2]
    key: int,  # address of the first image's packed keys
    value: int,
    weights: Attention,
    inv_freq: Tensor,  # [d / 4]
    heads: int,
    token_grid: tuple[int, int],
    out: Tensor | None,  # [B, N, D]
    kept: KeptAttention | None = None,
) -> None:
    """Attend from contiguous queries to all tokens; ``out`` may be ``x``, and left out where something is kept."""
    norm, query, projection = (held.handle for held in weights)
    context.kernels.rope_cross_attention(
        context.handle,
        x.data_ptr(),
        *coords_address(coords),
        key,
        value,
        norm,
        query,
        projection,
        inv_freq.data_ptr(),
        *(address(t) for t in (out, *(kept or (None,) * 3))),
        *x.shape,
        heads,
        *token_grid,
    )


def kept_bytes(x: Tensor, coords: Tensor, key: Tensor, *_: object) -> int:
    """Size of rotated queries, attended values, and a float32 sum of exponentials for each head."""
    B, N, D = x.shape
    return B * N * (2 * D * x.element_size() + 4 * key.shape[1])


def kept_attention(kept: Tensor, x: Tensor, heads: int) -> KeptAttention:
    """What an attention keeps, in bytes that it was given."""
    B, N, D = x.shape
    rows = (B, N, D), x.dtype
    return KeptAttention(*parts(kept, rows, rows, ((B, heads, N), torch.float32)))


def forward(int8: bool, x: Tensor, coords: Tensor, *others: Any, kept: Tensor | None = None) -> Tensor:
    """Forward of the operator."""
    key, value, *weights, inv_freq, token_h, token_w = others
    x, coords, inv_freq = x.contiguous(), coords.contiguous(), inv_freq.float().contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    packed_key, packed_value = pack_image(context, key, value)
    folded, out = pack_attention(context, AttentionWeights(*weights)), x.new_empty(x.shape)
    addresses = packed_key.data_ptr(), packed_value.data_ptr()
    heads, token_grid = key.shape[1], (token_h, token_w)
    for_backward = None if kept is None else kept_attention(kept, x, heads)
    rope_cross_attention(
        context, x, coords, *addresses, folded, inv_freq, heads, token_grid, out, for_backward
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    coords: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Any,
    kept: Tensor | None,
) -> list[Tensor]:
    """Backward of the operator."""
    *parameters, inv_freq, token_h, token_w, needs_grad = others
    weights, token_grid = AttentionWeights(*parameters), (token_h, token_w)
    x, coords, key, value = (t.contiguous() for t in (x, coords, key, value))
    inv_freq = inv_freq.float().contiguous()
    (B, N, D), (_, heads, T, d) = x.shape, key.shape
    context = Context(x.dtype, D)
    if kept is None:
        rows = (arena.tensor(x.shape, x.dtype) for _ in range(2))
        known = KeptAttention(*rows, arena.tensor((B, heads, N), torch.float32))
        packed = pack_image(context, key, value)
        addresses = (t.data_ptr() for t in packed)
        folded = pack_attention(context, weights)
        rope_cross_attention(context, x, coords, *addresses, folded, inv_freq, heads, token_grid, None, known)
    else:
        known = kept_attention(kept, x, heads)

    grad_attended = arena.tensor(x.shape, x.dtype)
    transposed = context.matrix(weights.out_weight.mT, x.new_zeros(D))
    norm_linear(context, grad, Held(context.kernels.Norm(0, 0, 0.0), ()), transposed, grad_attended)

    cpu = context.kernels
    context = Context(
        x.dtype, D, tile_rows=SHORTEST_TILE, scratch_bytes=cpu.attention_backward_scratch_bytes(T, d)
    )
    # More groups of queries where images and heads are fewer than threads; each has gradients of its own.
    most = -(-N // cpu.attention_backward_queries())
    groups = max(1, min(most, -(-torch.get_num_threads() // max(1, B * heads))))
    grad_query = arena.tensor(x.shape, x.dtype)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_rotated = x.new_empty(x.shape, dtype=torch.float32) if needs_grad[1] else None
    sums = arena.tensor((2, groups, B, heads, T, d), torch.float32)
    given = (grad_attended, known.rotated_query, key, value, known.log2_sum, known.attended)
    cpu.attention_backward(
        context.handle,
        *(t.data_ptr() for t in given),
        *coords_address(coords),
        inv_freq.data_ptr(),
        *(address(t) for t in (grad_query, grad_rotated, *sums, grad_key, grad_value)),
        *(groups, B, N, D, heads, token_h, token_w),
    )

    grad_coords = grad_weight = grad_bias = None
    if needs_grad[1]:
        query = known.rotated_query.float().unflatten(-1, (heads, d)) * (math.sqrt(d) / LOG2_E)
        grad_rotated = grad_rotated.unflatten(-1, (heads, d))
        grad_coords = rotation_backward(query, grad_rotated, inv_freq, token_grid).to(coords.dtype)
    if needs_grad[8] or needs_grad[9]:
        grad_weight, grad_bias = weight_gradient(grad, known.attended)
    needs_query = [needs_grad[0], *needs_grad[4:8]]
    grad_x, *grads_query = norm_linear_backward(
        grad_query, x, weights.norm_weight, weights.norm_bias, weights.query_weight, needs_query, grad
    )
    grads = (grad_x, grad_coords, grad_key, grad_value, *grads_query, grad_weight, grad_bias)
    return needed_grads(grads, needs_grad)
