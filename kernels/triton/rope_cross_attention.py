"""Cross-attention: LayerNorm, query projection, rotation and softmax over all tokens in one kernel, and its gradients.

Softmax runs in base two: its scale and log2(e) are folded into the query projection, so that a score is one product
and a probability one ``exp2``. Keys that do not fill a block come first: a tail after the loop would make the compiler
serialise the loop's matrix instructions on sm_90.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    centers,
    combined_moments,
    dividing_block,
    dot_precision,
    fractional_turns,
    launch,
    measure_moments,
    positions,
    settings_for,
    sine_cosine,
    wide,
)
from .linear import Folded, column_sum, fold, linear, matmul, splits_of, weight_gradient
from .norm_linear import normed_linear_backward

# Queries that one program of the key gradient visits at the least.
SPLIT_QUERIES = 1024


@triton.jit
def rotate(b_x, cosine, sine, BLOCK_M: tl.constexpr, HEAD: tl.constexpr):
    """Rotate channel pairs (2k, 2k + 1)."""
    even, odd = tl.split(b_x.reshape(BLOCK_M, HEAD // 2, 2))
    return tl.join(even * cosine - odd * sine, odd * cosine + even * sine).reshape(BLOCK_M, HEAD)


@triton.jit
def rotation(
    p_coords,
    p_inv_freq,
    o_row,
    m_row,
    token_h,
    token_w,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Cosines and sines of the channel pairs of one head: the first half turns with x, the second with y."""
    o_pair = tl.arange(0, HEAD // 2)
    x = tl.load(p_coords + 2 * o_row, mask=m_row, other=0.0) * token_w
    y = tl.load(p_coords + 2 * o_row + 1, mask=m_row, other=0.0) * token_h
    frequency = tl.load(p_inv_freq + o_pair % (HEAD // 4)).to(x.dtype)
    turns = tl.where((o_pair < HEAD // 4)[None, :], x[:, None], y[:, None]) * frequency[None, :]
    sine, cosine = sine_cosine(fractional_turns(turns, ACC), DTYPE)
    return cosine, sine


@triton.jit
def attend_block(
    query,
    p_key,
    p_value,
    o_key,
    m_key,
    attended,
    largest,
    total,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one block of keys into a running softmax."""
    o_block = o_key.to(tl.int64)[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    if MASKED:
        key = tl.load(p_key + o_block, mask=m_key[:, None], other=0.0)
        value = tl.load(p_value + o_block, mask=m_key[:, None], other=0.0)
    else:
        key, value = tl.load(p_key + o_block), tl.load(p_value + o_block)
    scores = tl.dot(query, key.T, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(m_key[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    probability = tl.exp2(scores - new_largest[:, None])
    decay = tl.exp2(largest - new_largest)
    total = total * decay + tl.sum(probability, 1)
    attended *= decay[:, None]
    attended = tl.dot(
        probability.to(value.dtype), value, attended, input_precision=PRECISION, out_dtype=attended.dtype
    )
    return attended, new_largest, total


@triton.jit(do_not_specialize=["N", "T", "token_h", "token_w"])
def rope_cross_attention_kernel(
    p_x,  # [B, N, D]
    p_moments,  # [B * N, PARTS, 2]
    p_weight,  # [D, D]
    p_bias,  # [D]
    p_row_sum,  # [D]
    p_coords,  # [B, N, 2]
    p_inv_freq,  # [HEAD / 4]
    p_key,  # [B, Hh, T, HEAD]
    p_value,  # [B, Hh, T, HEAD]
    p_out,  # [B, N, D]
    p_query,  # [B, N, D]
    p_log_sum,  # [B, N, Hh]
    N,
    T,
    token_h,
    token_w,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    CENTER: tl.constexpr,
    TAIL: tl.constexpr,
    TRAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one head for a block of queries of one image; keeps query and log-sum for training."""
    HEADS: tl.constexpr = D // HEAD
    i_head, i_image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_query < N
    o_row = i_image * N + o_query
    o_head = tl.arange(0, HEAD)
    o_k = tl.arange(0, BLOCK_K)
    p_xs = p_x + o_row[:, None] * D + o_k[None, :]
    p_weights = p_weight + (i_head * HEAD + o_head)[:, None] * D + o_k[None, :]
    mean, rstd = combined_moments(p_moments, o_row, m_row, D, PARTS)
    query = tl.zeros((BLOCK_M, HEAD), ACC)
    for k in tl.range(0, D, BLOCK_K):
        b_x = tl.load(p_xs + k, mask=m_row[:, None], other=0.0)
        if CENTER:
            b_x = (b_x - mean[:, None]) * rstd[:, None]
        b_weight = tl.load(p_weights + k)
        query = tl.dot(b_x, b_weight.T, query, input_precision=PRECISION, out_dtype=ACC)
    bias = tl.load(p_bias + i_head * HEAD + o_head)[None, :]
    if CENTER:
        query += bias
    else:
        row_sum = tl.load(p_row_sum + i_head * HEAD + o_head)[None, :]
        query = query * rstd[:, None] + (bias - (mean * rstd)[:, None] * row_sum)
    cosine, sine = rotation(
        p_coords, p_inv_freq, o_row, m_row, token_h, token_w, HEAD, ACC, p_x.dtype.element_ty
    )
    query = rotate(query, cosine, sine, BLOCK_M, HEAD).to(p_x.dtype.element_ty)

    o_keys = (i_image * HEADS + i_head) * T * HEAD
    attended = tl.zeros((BLOCK_M, HEAD), ACC)
    largest = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    tail = T % BLOCK_N
    if TAIL > 0:
        o_tail = tl.arange(0, TAIL)
        attended, largest, total = attend_block(
            query,
            p_key + o_keys,
            p_value + o_keys,
            o_tail,
            o_tail < tail,
            attended,
            largest,
            total,
            True,
            HEAD,
            PRECISION,
        )
    for start in tl.range(tail, T, BLOCK_N):
        o_key = start + tl.arange(0, BLOCK_N)
        attended, largest, total = attend_block(
            query,
            p_key + o_keys,
            p_value + o_keys,
            o_key,
            o_key < T,
            attended,
            largest,
            total,
            False,
            HEAD,
            PRECISION,
        )

    o_out = o_row[:, None] * D + (i_head * HEAD + o_head)[None, :]
    tl.store(p_out + o_out, (attended / total[:, None]).to(p_out.dtype.element_ty), mask=m_row[:, None])
    if TRAIN:
        tl.store(p_query + o_out, query, mask=m_row[:, None])
        tl.store(p_log_sum + o_row * HEADS + i_head, largest + tl.log2(total), mask=m_row)


@triton.jit
def query_gradient_block(
    query,
    grad,
    log_sum,
    inner,
    p_key,
    p_value,
    o_key,
    m_key,
    grad_query,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of keys to the gradient of the query."""
    o_block = o_key.to(tl.int64)[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    if MASKED:
        key = tl.load(p_key + o_block, mask=m_key[:, None], other=0.0)
        value = tl.load(p_value + o_block, mask=m_key[:, None], other=0.0)
    else:
        key, value = tl.load(p_key + o_block), tl.load(p_value + o_block)
    probability = tl.exp2(tl.dot(query, key.T, input_precision=PRECISION) - log_sum[:, None])
    grad_score = probability * (tl.dot(grad, value.T, input_precision=PRECISION) - inner[:, None])
    if MASKED:
        grad_score = tl.where(m_key[None, :], grad_score, 0.0)
    grad_score = grad_score.to(key.dtype)
    return tl.dot(grad_score, key, grad_query, input_precision=PRECISION, out_dtype=grad_query.dtype)


@triton.jit(do_not_specialize=["N", "T", "token_h", "token_w"])
def rope_cross_attention_query_backward_kernel(
    p_query,  # [B, N, D]
    p_attended,  # [B, N, D]
    p_grad,  # [B, N, D]
    p_log_sum,  # [B, N, Hh]
    p_coords,  # [B, N, 2]
    p_inv_freq,  # [HEAD / 4]
    p_key,  # [B, Hh, T, HEAD]
    p_value,  # [B, Hh, T, HEAD]
    p_grad_query,  # [B, N, D]
    p_inner,  # [B, N, Hh]
    p_grad_position,  # [B, N, Hh, 2]
    N,
    T,
    token_h,
    token_w,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the query before rotation, and of its position through the rotation, for one head."""
    HEADS: tl.constexpr = D // HEAD
    i_head, i_image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_query < N
    o_row = i_image * N + o_query
    o_block = o_row[:, None] * D + (i_head * HEAD + tl.arange(0, HEAD))[None, :]
    query = tl.load(p_query + o_block, mask=m_row[:, None], other=0.0)
    grad = tl.load(p_grad + o_block, mask=m_row[:, None], other=0.0)
    attended = tl.load(p_attended + o_block, mask=m_row[:, None], other=0.0)
    inner = tl.sum(grad.to(ACC) * attended.to(ACC), 1)
    tl.store(p_inner + o_row * HEADS + i_head, inner, mask=m_row)
    log_sum = tl.load(p_log_sum + o_row * HEADS + i_head, mask=m_row, other=0.0)

    o_keys = (i_image * HEADS + i_head) * T * HEAD
    grad_query = tl.zeros((BLOCK_M, HEAD), ACC)
    tail = T % BLOCK_N
    if TAIL > 0:
        o_tail = tl.arange(0, TAIL)
        grad_query = query_gradient_block(
            query,
            grad,
            log_sum,
            inner,
            p_key + o_keys,
            p_value + o_keys,
            o_tail,
            o_tail < tail,
            grad_query,
            True,
            HEAD,
            PRECISION,
        )
    for start in tl.range(tail, T, BLOCK_N):
        o_key = start + tl.arange(0, BLOCK_N)
        grad_query = query_gradient_block(
            query,
            grad,
            log_sum,
            inner,
            p_key + o_keys,
            p_value + o_keys,
            o_key,
            o_key < T,
            grad_query,
            False,
            HEAD,
            PRECISION,
        )
    grad_query *= 0.6931471805599453  # scores are in base two

    # An angle turns a pair into its perpendicular.
    even, odd = tl.split(query.to(ACC).reshape(BLOCK_M, HEAD // 2, 2))
    grad_even, grad_odd = tl.split(grad_query.reshape(BLOCK_M, HEAD // 2, 2))
    o_pair = tl.arange(0, HEAD // 2)
    frequency = tl.load(p_inv_freq + o_pair % (HEAD // 4)).to(ACC) * 6.283185307179586
    along = (grad_odd * even - grad_even * odd) * frequency[None, :]
    along_x = tl.sum(tl.where((o_pair < HEAD // 4)[None, :], along, 0.0), 1)
    along_y = tl.sum(tl.where((o_pair < HEAD // 4)[None, :], 0.0, along), 1)
    o_position = (o_row * HEADS + i_head) * 2
    tl.store(p_grad_position + o_position, along_x * token_w, mask=m_row)
    tl.store(p_grad_position + o_position + 1, along_y * token_h, mask=m_row)
    cosine, sine = rotation(
        p_coords, p_inv_freq, o_row, m_row, token_h, token_w, HEAD, ACC, p_query.dtype.element_ty
    )
    grad_query = rotate(grad_query, cosine, -sine, BLOCK_M, HEAD)
    tl.store(p_grad_query + o_block, grad_query.to(p_grad_query.dtype.element_ty), mask=m_row[:, None])


@triton.jit(do_not_specialize=["images", "N", "T", "queries_per_split"])
def rope_cross_attention_key_backward_kernel(
    p_query,  # [B, N, D]
    p_grad,  # [B, N, D]
    p_log_sum,  # [B, N, Hh]
    p_inner,  # [B, N, Hh]
    p_key,  # [B, Hh, T, HEAD]
    p_value,  # [B, Hh, T, HEAD]
    p_grad_key,  # [splits, B, Hh, T, HEAD]
    p_grad_value,  # [splits, B, Hh, T, HEAD]
    images,
    N,
    T,
    queries_per_split,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of keys and values of one head from one split of the queries."""
    HEADS: tl.constexpr = D // HEAD
    i_head = tl.program_id(1)
    i_image = tl.program_id(2).to(tl.int64) % images
    i_split = tl.program_id(2) // images
    o_key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_head = tl.arange(0, HEAD)
    m_key = (o_key < T)[:, None]
    o_block = ((i_image * HEADS + i_head) * T + o_key)[:, None] * HEAD + o_head[None, :]
    key = tl.load(p_key + o_block, mask=m_key, other=0.0)
    value = tl.load(p_value + o_block, mask=m_key, other=0.0)
    grad_key = tl.zeros((BLOCK_N, HEAD), ACC)
    grad_value = tl.zeros((BLOCK_N, HEAD), ACC)
    first = i_split * queries_per_split
    last = tl.minimum(first + queries_per_split, N)
    for start in tl.range(first, last, BLOCK_M):
        o_query = start + tl.arange(0, BLOCK_M)
        m_query = o_query < last
        o_row = i_image * N + o_query
        o_queries = o_row[:, None] * D + (i_head * HEAD + o_head)[None, :]
        query = tl.load(p_query + o_queries, mask=m_query[:, None], other=0.0)
        grad = tl.load(p_grad + o_queries, mask=m_query[:, None], other=0.0)
        # An infinite log-sum makes the probabilities of missing queries zero.
        log_sum = tl.load(p_log_sum + o_row * HEADS + i_head, mask=m_query, other=float("inf"))
        inner = tl.load(p_inner + o_row * HEADS + i_head, mask=m_query, other=0.0)
        probability = tl.exp2(tl.dot(key, query.T, input_precision=PRECISION) - log_sum[None, :])
        grad_value = tl.dot(
            probability.to(grad.dtype), grad, grad_value, input_precision=PRECISION, out_dtype=ACC
        )
        grad_score = probability * (tl.dot(value, grad.T, input_precision=PRECISION) - inner[None, :])
        grad_score = grad_score.to(query.dtype)
        grad_key = tl.dot(grad_score, query, grad_key, input_precision=PRECISION, out_dtype=ACC)
    o_out = o_block + i_split.to(tl.int64) * images * HEADS * T * HEAD
    tl.store(p_grad_key + o_out, grad_key * 0.6931471805599453, mask=m_key)
    tl.store(p_grad_value + o_out, grad_value, mask=m_key)


class Attended(NamedTuple):
    """What attention returns, and what its gradient needs."""

    attended: Tensor  # [B, N, D]
    query: Tensor | None  # [B, N, D] rotated and scaled
    log_sum: Tensor | None  # [B, N, Hh] in base two


def query_scale(head_dim: int) -> float:
    """Scale folded into the query projection, for a softmax in base two."""
    return math.log2(math.e) / math.sqrt(head_dim)


def fold_query(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, head_dim: int) -> Folded:
    """Fold LayerNorm and the scale of a base-two softmax into the query projection."""
    return fold(weight, bias, norm_weight, norm_bias, query_scale(head_dim))


def _tail(tokens: int, block: int) -> int:
    """Size of the block that holds the keys beyond complete blocks, 0 if there are none."""
    rest = tokens % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def _blocks(variant: str, x: Tensor, head_dim: int) -> dict[str, Any]:
    """Launch settings and compute types of an attention kernel."""
    blocks = settings_for(variant, x, head_dim)
    return blocks | {"ACC": accumulator(x.dtype), "PRECISION": dot_precision(x.dtype), "variant": variant}


def attend(
    x: Tensor,  # [B, N, D]
    moments: Tensor,  # [B * N, parts, 2]
    layer: Folded,
    coords: Tensor,  # [B, N, 2]
    key: Tensor,  # [B, Hh, T, d]
    value: Tensor,  # [B, Hh, T, d]
    inv_freq: Tensor,  # [d / 4]
    token_grid: tuple[int, int],
    train: bool = False,
    out: Tensor | None = None,
) -> Attended:
    """Softmax attention of rotated, projected queries; ``layer`` comes from :func:`fold_query`."""
    (B, N, D), (_, heads, T, d) = x.shape, key.shape
    blocks = _blocks("attention", x, d)
    attended = torch.empty(B, N, D, dtype=x.dtype, device=x.device) if out is None else out
    query = attended.new_empty(attended.shape) if train else None
    log_sum = torch.empty(B, N, heads, dtype=wide(x.dtype), device=x.device) if train else None
    blocks["BLOCK_K"] = dividing_block(D, blocks["BLOCK_K"])
    launch(
        rope_cross_attention_kernel,
        (triton.cdiv(N, blocks["BLOCK_M"]), heads, B),
        x,
        moments,
        layer.weight,
        layer.bias,
        layer.row_sum,
        coords,
        inv_freq,
        key,
        value,
        attended,
        attended if query is None else query,
        layer.bias if log_sum is None else log_sum,
        N,
        T,
        *token_grid,
        D=D,
        HEAD=d,
        PARTS=moments.shape[1],
        CENTER=centers(x.dtype),
        TAIL=_tail(T, blocks["BLOCK_N"]),
        TRAIN=train,
        **blocks,
    )
    return Attended(attended, query, log_sum)


def forward(
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
    """Forward pass of :func:`vitup_fast.ops.rope_cross_attention`."""
    x, key, value, inv_freq = (t.contiguous() for t in (x, key, value, inv_freq))
    coords = positions(coords, x)
    rows = x.view(-1, x.shape[-1])  # [M, D]
    layer = fold_query(norm_weight, norm_bias, query_weight, query_bias, key.shape[-1])
    attended = attend(
        x, measure_moments(rows), layer, coords, key, value, inv_freq, (token_h, token_w)
    ).attended
    return linear(attended.view_as(rows), fold(out_weight, out_bias), residual=rows)[0].view_as(x)


def backward(
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
    """Gradients of the differentiable arguments, as far as they are needed; queries and softmax are recomputed."""
    x, key, value, inv_freq = (t.contiguous() for t in (x, key, value, inv_freq))
    coords_dtype, coords = coords.dtype, positions(coords, x)
    (B, N, D), (_, heads, T, d) = x.shape, key.shape
    rows, grad_rows = x.view(-1, D), grad.view(-1, D)
    projection = (norm_weight, norm_bias, query_weight, query_bias)
    attended, query, log_sum = attend(
        x,
        measure_moments(rows),
        fold_query(*projection, d),
        coords,
        key,
        value,
        inv_freq,
        (token_h, token_w),
        train=True,
    )
    grad_attended = matmul(grad_rows, out_weight)  # [M, D]

    acc = wide(x.dtype)
    grad_query = x.new_empty(x.shape)
    inner = log_sum.new_empty(log_sum.shape)
    grad_position = torch.empty(B, N, heads, 2, dtype=acc, device=x.device)
    blocks = _blocks("attention_query_backward", x, d)
    launch(
        rope_cross_attention_query_backward_kernel,
        (triton.cdiv(N, blocks["BLOCK_M"]), heads, B),
        query,
        attended,
        grad_attended,
        log_sum,
        coords,
        inv_freq,
        key,
        value,
        grad_query,
        inner,
        grad_position,
        N,
        T,
        token_h,
        token_w,
        D=D,
        HEAD=d,
        TAIL=_tail(T, blocks["BLOCK_N"]),
        **blocks,
    )
    grad_key = grad_value = None
    if needs_grad[2] or needs_grad[3]:
        blocks = _blocks("attention_key_backward", x, d)
        key_blocks = triton.cdiv(T, blocks["BLOCK_N"])
        programs = max(1, key_blocks * heads * B)
        splits = splits_of(N, SPLIT_QUERIES, programs, x.device)
        per_split = triton.cdiv(triton.cdiv(N, splits), blocks["BLOCK_M"]) * blocks["BLOCK_M"]
        partial = torch.empty(2, splits, *key.shape, dtype=acc, device=x.device)
        launch(
            rope_cross_attention_key_backward_kernel,
            (key_blocks, heads, B * splits),
            query,
            grad_attended,
            log_sum,
            inner,
            key,
            value,
            partial[0],
            partial[1],
            B,
            N,
            T,
            per_split,
            D=D,
            HEAD=d,
            **blocks,
        )
        grad_key, grad_value = (part.sum(0).to(x.dtype) for part in partial)

    grad_x, *grads_projection = normed_linear_backward(
        grad_query.view(-1, D), rows, *projection, needs_grad[0], residual=grad_rows, scale=query_scale(d)
    )
    grad_out_weight = weight_gradient(grad_rows, attended.view(-1, D)).to(x.dtype)
    grads = (
        grad_x,
        grad_position.sum(2).to(coords_dtype),
        grad_key,
        grad_value,
        *grads_projection,
        grad_out_weight,
        column_sum(grad_rows).to(x.dtype),
    )
    shapes = (x, coords, key, value, *projection, out_weight, out_bias)
    return [
        g.view(a.shape).contiguous() for g, a, needed in zip(grads, shapes, needs_grad, strict=True) if needed
    ]
