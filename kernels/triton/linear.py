"""Matrix products with everything around them in prologue and epilogue, forward and backward.

LayerNorm folds into the product that follows it: ``W LN(x) + b = rstd (W' x - mean s) + b'`` with ``W' = W g``
rounded, ``s`` its row sums and ``b' = b + W beta``. The product reads x as it is; mean and rstd come from the row
moments that the producer of x wrote in its epilogue. The difference of two large numbers loses digits where the mean
dwarfs the deviation: fewer than 16 bit numbers have lost, but in float32 rows are normalised before the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import cuda
from . import tiles
from .common import (
    EPS,
    GELU_NONE,
    accumulator,
    add_layer_norm_kernel,
    centers,
    combined_moments,
    dividing_block,
    dot_precision,
    forced_rung,
    gelu_kind,
    gelu_with_gradient,
    launch,
    multiprocessors,
    normal_cdf,
    row_blocks,
    settings_for,
    target_of,
    wide,
)

# Rows of the left operand that one program of the weight gradient sums at the least.
SPLIT_ROWS = 512
# Programs that fill a GPU a few times.
FULL_GRID = 264
# Columns of one program of the gradient of what was folded: a sector of float32.
FOLD_COLUMNS = 8


class Folded(NamedTuple):
    """A linear layer with the LayerNorm before it folded in."""

    weight: Tensor  # [N, K] in the compute dtype
    bias: Tensor  # [N] float32 or better
    row_sum: Tensor  # [N] float32 or better, sums over the rows of the rounded weight


@triton.jit(do_not_specialize=["N"])
def fold_kernel(
    p_weight,  # [N, K]
    p_bias,  # [N]
    p_norm_weight,  # [K]
    p_norm_bias,  # [K]
    p_folded,  # [N, K]
    p_folded_bias,  # [N]
    p_row_sum,  # [N]
    N,
    K: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """``scale W g`` rounded, ``scale (b + W beta)`` and the row sums of the former, for complete rows."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row, m_column = o_row < N, o_column < K
    mask = m_row[:, None] & m_column[None, :]
    o_weight = o_row.to(tl.int64)[:, None] * K + o_column[None, :]
    b_weight = tl.load(p_weight + o_weight, mask=mask, other=0.0).to(ACC)
    bias = tl.load(p_bias + o_row, mask=m_row, other=0.0).to(ACC)
    if NORM:
        norm_bias = tl.load(p_norm_bias + o_column, mask=m_column, other=0.0).to(ACC)
        bias += tl.sum(b_weight * norm_bias[None, :], 1)
        b_weight *= tl.load(p_norm_weight + o_column, mask=m_column, other=0.0).to(ACC)[None, :]
    b_folded = (b_weight * SCALE).to(p_folded.dtype.element_ty)
    tl.store(p_folded + o_weight, b_folded, mask=mask)
    tl.store(p_folded_bias + o_row, bias * SCALE, mask=m_row)
    tl.store(p_row_sum + o_row, tl.sum(b_folded.to(ACC), 1), mask=m_row)


def fold(
    weight: Tensor,  # [N, K]
    bias: Tensor,  # [N]
    norm_weight: Tensor | None = None,  # [K]
    norm_bias: Tensor | None = None,  # [K]
    scale: float = 1.0,
) -> Folded:
    """Fold LayerNorm's affine part and a scale into the linear layer behind it, in float32 or better."""
    weight, bias = weight.detach().contiguous(), bias.detach().contiguous()
    norm = (weight, weight) if norm_weight is None else (norm_weight.detach(), norm_bias.detach())
    (N, K), acc = weight.shape, wide(weight.dtype)
    folded = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
    folded_bias, row_sum = (torch.empty(N, dtype=acc, device=weight.device) for _ in range(2))
    blocks = row_blocks(weight, K)
    launch(
        fold_kernel,
        (triton.cdiv(N, blocks["BLOCK_M"]),),
        weight,
        bias,
        *(t.contiguous() for t in norm),
        folded,
        folded_bias,
        row_sum,
        N,
        K=K,
        NORM=norm_weight is not None,
        SCALE=scale,
        variant="rows",
        **blocks,
    )
    return Folded(folded, folded_bias, row_sum)


@triton.jit(do_not_specialize=["N"])
def fold_backward_kernel(
    p_grad,  # [N, K]
    p_grad_bias,  # [N]
    p_weight,  # [N, K]
    p_norm_weight,  # [K]
    p_norm_bias,  # [K]
    p_grad_norm_weight,  # [K]
    p_grad_norm_bias,  # [K]
    p_grad_weight,  # [N, K]
    p_grad_layer_bias,  # [N]
    N,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of what was folded, for a block of columns; those of the bias by the first."""
    o_column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_column = o_column < K
    norm_weight = tl.load(p_norm_weight + o_column, mask=m_column, other=0.0).to(ACC)[None, :]
    norm_bias = tl.load(p_norm_bias + o_column, mask=m_column, other=0.0).to(ACC)[None, :]
    grad_norm_weight = tl.zeros((BLOCK_D,), ACC)
    grad_norm_bias = tl.zeros((BLOCK_D,), ACC)
    for start in tl.range(0, N, BLOCK_M):
        o_row = start + tl.arange(0, BLOCK_M)
        m_row = o_row < N
        mask = m_row[:, None] & m_column[None, :]
        o_weight = o_row.to(tl.int64)[:, None] * K + o_column[None, :]
        grad = tl.load(p_grad + o_weight, mask=mask, other=0.0).to(ACC) * SCALE
        grad_bias = tl.load(p_grad_bias + o_row, mask=m_row, other=0.0).to(ACC) * SCALE
        b_weight = tl.load(p_weight + o_weight, mask=mask, other=0.0).to(ACC)
        grad_weight = grad * norm_weight + grad_bias[:, None] * norm_bias
        tl.store(p_grad_weight + o_weight, grad_weight.to(p_grad_weight.dtype.element_ty), mask=mask)
        grad_norm_weight += tl.sum(grad * b_weight, 0)
        grad_norm_bias += tl.sum(grad_bias[:, None] * b_weight, 0)
        if tl.program_id(0) == 0:
            tl.store(p_grad_layer_bias + o_row, grad_bias.to(p_grad_layer_bias.dtype.element_ty), mask=m_row)
    dtype = p_grad_norm_weight.dtype.element_ty
    tl.store(p_grad_norm_weight + o_column, grad_norm_weight.to(dtype), mask=m_column)
    tl.store(p_grad_norm_bias + o_column, grad_norm_bias.to(dtype), mask=m_column)


def fold_backward(
    grad_folded: Tensor,  # [N, K] float32 or better
    grad_bias: Tensor,  # [N] float32 or better
    weight: Tensor,  # [N, K]
    norm_weight: Tensor,  # [K]
    norm_bias: Tensor,  # [K]
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of norm weight, norm bias, weight and bias from those of the folded layer."""
    weight = weight.contiguous()
    N, K = weight.shape
    made = [torch.empty(s, dtype=weight.dtype, device=weight.device) for s in (K, K, (N, K), N)]
    launch(
        fold_backward_kernel,
        (triton.cdiv(K, FOLD_COLUMNS),),
        grad_folded,
        grad_bias,
        weight,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        *made,
        N,
        K=K,
        SCALE=scale,
        BLOCK_M=256,
        BLOCK_D=FOLD_COLUMNS,
        ACC=accumulator(weight.dtype),
        variant="rows",
        num_warps=8,
    )
    return tuple(made)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    p_x,  # [M, K]
    p_weight,  # [N, K]
    p_bias,  # [N]
    p_row_sum,  # [N]
    p_moments,  # [M, PARTS, 2]
    p_residual,  # [M, N]
    p_norm_weight,  # [N]
    p_norm_bias,  # [N]
    p_out,  # [M, N]
    p_out_moments,  # [M, N / (TILES * BLOCK_N), 2]
    M,
    K,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    CENTER: tl.constexpr,
    GELU: tl.constexpr,
    OUT_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    OUT_MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``residual + LN'(gelu(W LN(x) + b))``, each part optional, over ``TILES`` accumulators side by side.

    ``PARTS`` > 0 folds in the LayerNorm before the product, with ``CENTER`` applies it; ``OUT_NORM`` applies one to
    complete rows after it. ``RESIDUAL_FIRST`` starts the sums with the residual instead of adding it last.
    """
    tl.assume(K >= BLOCK_K)
    EVEN_N: tl.constexpr = N % (BLOCK_N * TILES) == 0
    columns: tl.constexpr = (N + BLOCK_N * TILES - 1) // (BLOCK_N * TILES)
    i_program = tl.program_id(0)
    i_row, i_column = i_program // columns, i_program % columns
    o_row = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = i_column * (BLOCK_N * TILES) + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < M
    p_xs = p_x + o_row.to(tl.int64)[:, None] * K + o_k[None, :]
    p_weights = p_weight + o_column.to(tl.int64)[:, None] * K + o_k[None, :]

    if PARTS > 0:
        mean, rstd = combined_moments(p_moments, o_row, m_row, K, PARTS)
    products = ()
    for tile in tl.static_range(TILES):
        if RESIDUAL_FIRST:
            o_tile = o_column + tile * BLOCK_N
            o_out = o_row.to(tl.int64)[:, None] * N + o_tile[None, :]
            mask = m_row[:, None] & (o_tile < N)[None, :]
            products = products + (tl.load(p_residual + o_out, mask=mask, other=0.0).to(ACC),)
        else:
            products = products + (tl.zeros((BLOCK_M, BLOCK_N), ACC),)
    for k in tl.range(0, K, BLOCK_K):
        b_x = tl.load(p_xs + k, mask=m_row[:, None], other=0.0)
        if CENTER:
            b_x = (b_x - mean[:, None]) * rstd[:, None]
        updated = ()
        for tile in tl.static_range(TILES):
            p_tile = p_weights + tile * (BLOCK_N * K) + k
            if EVEN_N:
                b_weight = tl.load(p_tile)
            else:
                b_weight = tl.load(p_tile, mask=(o_column + tile * BLOCK_N < N)[:, None], other=0.0)
            updated = updated + (
                tl.dot(b_x, b_weight.T, products[tile], input_precision=PRECISION, out_dtype=ACC),
            )
        products = updated

    if PARTS > 0 and not CENTER:
        shift = mean * rstd
    results = ()
    for tile in tl.static_range(TILES):
        o_tile = o_column + tile * BLOCK_N
        m_tile = o_tile < N
        bias = tl.load(p_bias + o_tile, mask=m_tile, other=0.0)[None, :]
        if PARTS > 0 and not CENTER:
            row_sum = tl.load(p_row_sum + o_tile, mask=m_tile, other=0.0)[None, :]
            y = products[tile] * rstd[:, None] + (bias - shift[:, None] * row_sum)
        else:
            y = products[tile] + bias
        if GELU != GELU_NONE:
            y = y * normal_cdf(y, GELU)
        results = results + (y,)

    if OUT_NORM:
        row_mean, row_squares = tile_moments(results, N, TILES, ACC)
        row_rstd = tl.rsqrt(row_squares / N + EPS)
    for tile in tl.static_range(TILES):
        o_tile = o_column + tile * BLOCK_N
        m_tile = o_tile < N
        y = results[tile]
        o_out = o_row.to(tl.int64)[:, None] * N + o_tile[None, :]
        mask = m_row[:, None] & m_tile[None, :]
        if OUT_NORM:
            norm_weight = tl.load(p_norm_weight + o_tile).to(ACC)[None, :]
            norm_bias = tl.load(p_norm_bias + o_tile).to(ACC)[None, :]
            y = (y - row_mean[:, None]) * row_rstd[:, None] * norm_weight + norm_bias
        if RESIDUAL and not RESIDUAL_FIRST:
            y += tl.load(p_residual + o_out, mask=mask, other=0.0).to(ACC)
        tl.store(p_out + o_out, y.to(p_out.dtype.element_ty), mask=mask)
        if OUT_MOMENTS:
            # Of the sums before rounding, which moves moments by less than their own error.
            tile_mean = tl.sum(y, 1) * (1.0 / BLOCK_N)
            deviation = y - tile_mean[:, None]
            tile_squares = tl.sum(deviation * deviation, 1)
            if tile == 0:
                out_mean, out_squares = tile_mean, tile_squares
            else:
                difference = tile_mean - out_mean
                out_mean += difference * (1.0 / (tile + 1))
                out_squares += tile_squares + difference * difference * (BLOCK_N * (tile / (tile + 1)))
    if OUT_MOMENTS:
        o_moments = (o_row.to(tl.int64) * columns + i_column) * 2
        tl.store(p_out_moments + o_moments, out_mean, mask=m_row)
        tl.store(p_out_moments + o_moments + 1, out_squares, mask=m_row)


@triton.jit
def tile_moments(tiles, WIDTH: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr):
    """Mean and sum of squared deviations of rows held in several blocks."""
    total = tl.sum(tiles[0], 1)
    for tile in tl.static_range(1, TILES):
        total += tl.sum(tiles[tile], 1)
    mean = total * (1.0 / WIDTH)
    squares = tl.zeros_like(mean)
    for tile in tl.static_range(TILES):
        deviation = tiles[tile] - mean[:, None]
        squares += tl.sum(deviation * deviation, 1)
    return mean, squares


@triton.jit(do_not_specialize=["M"])
def linear_argmax_kernel(
    p_x,  # [M, K]
    p_weight,  # [N, K]
    p_bias,  # [N]
    p_row_sum,  # [N]
    p_moments,  # [M, PARTS, 2]
    p_labels,  # [M]
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Index of the largest of N scores ``W LN(x) + b``, the first of equals; scores never leave the chip."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < M
    p_xs = p_x + o_row.to(tl.int64)[:, None] * K + o_k[None, :]
    mean, rstd = combined_moments(p_moments, o_row, m_row, K, PARTS)
    shift = mean * rstd
    best = tl.full((BLOCK_M,), float("-inf"), ACC)
    label = tl.zeros((BLOCK_M,), tl.int32)
    for column in tl.range(0, N, BLOCK_N):
        o_column = column + tl.arange(0, BLOCK_N)
        m_column = o_column < N
        p_weights = p_weight + o_column.to(tl.int64)[:, None] * K + o_k[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in tl.range(0, K, BLOCK_K):
            b_x = tl.load(p_xs + k, mask=m_row[:, None], other=0.0)
            if CENTER:
                b_x = (b_x - mean[:, None]) * rstd[:, None]
            b_weight = tl.load(p_weights + k, mask=m_column[:, None], other=0.0)
            product = tl.dot(b_x, b_weight.T, product, input_precision=PRECISION, out_dtype=ACC)
        bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)[None, :]
        if CENTER:
            scores = product + bias
        else:
            row_sum = tl.load(p_row_sum + o_column, mask=m_column, other=0.0)[None, :]
            scores = product * rstd[:, None] + (bias - shift[:, None] * row_sum)
        scores = tl.where(m_column[None, :], scores, float("-inf"))
        largest = tl.max(scores, 1)
        first = tl.min(tl.where(scores == largest[:, None], o_column[None, :], N - 1), 1)
        label = tl.where(largest > best, first, label)
        best = tl.maximum(best, largest)
    tl.store(p_labels + o_row, label.to(p_labels.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["M"])
def hidden_backward_kernel(
    p_x,  # [M, K]
    p_weight1,  # [E, K]
    p_bias1,  # [E]
    p_grad,  # [M, N]
    p_weight2,  # [E, N]
    p_hidden,  # [M, E]
    p_grad_hidden,  # [M, E]
    M,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute ``z = W1 x + b1`` beside ``grad W2``: hidden layer ``gelu(z)`` and gradient of z in one pass."""
    columns: tl.constexpr = E // BLOCK_N
    i_program = tl.program_id(0)
    o_row = i_program // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = i_program % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < M
    p_xs = p_x + o_row.to(tl.int64)[:, None] * K + o_k[None, :]
    p_weights1 = p_weight1 + o_column.to(tl.int64)[:, None] * K + o_k[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in tl.range(0, K, BLOCK_K):
        b_x = tl.load(p_xs + k, mask=m_row[:, None], other=0.0)
        z = tl.dot(b_x, tl.load(p_weights1 + k).T, z, input_precision=PRECISION, out_dtype=ACC)
    z += tl.load(p_bias1 + o_column)[None, :]
    hidden, slope = gelu_with_gradient(z, GELU)
    o_out = o_row.to(tl.int64)[:, None] * E + o_column[None, :]
    tl.store(p_hidden + o_out, hidden.to(p_hidden.dtype.element_ty), mask=m_row[:, None])

    p_grads = p_grad + o_row.to(tl.int64)[:, None] * N + o_k[None, :]
    p_weights2 = p_weight2 + o_column.to(tl.int64)[:, None] * N + o_k[None, :]
    grad_hidden = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in tl.range(0, N, BLOCK_K):
        b_grad = tl.load(p_grads + k, mask=m_row[:, None], other=0.0)
        grad_hidden = tl.dot(
            b_grad, tl.load(p_weights2 + k).T, grad_hidden, input_precision=PRECISION, out_dtype=ACC
        )
    grad_z = (grad_hidden * slope).to(p_grad_hidden.dtype.element_ty)
    tl.store(p_grad_hidden + o_out, grad_z, mask=m_row[:, None])


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def weight_gradient_kernel(
    p_left,  # [M, P]
    p_right,  # [M, Q]
    p_out,  # [splits, P, Q]
    M,
    rows_per_split,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``left^T right`` over one split of the rows."""
    columns: tl.constexpr = (Q + BLOCK_N - 1) // BLOCK_N
    i_program, i_split = tl.program_id(0), tl.program_id(1)
    o_p = i_program // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    o_q = i_program % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    m_p, m_q = o_p < P, o_q < Q
    first = i_split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    tl.assume(rows_per_split >= BLOCK_K)
    for start in tl.range(0, rows_per_split, BLOCK_K):
        o_row = first + start + tl.arange(0, BLOCK_K)
        m_row = (o_row < last)[:, None]
        b_left = tl.load(p_left + o_row[:, None] * P + o_p[None, :], mask=m_row & m_p[None, :], other=0.0)
        b_right = tl.load(p_right + o_row[:, None] * Q + o_q[None, :], mask=m_row & m_q[None, :], other=0.0)
        total = tl.dot(b_left.T, b_right, total, input_precision=PRECISION, out_dtype=ACC)
    o_out = (i_split.to(tl.int64) * P + o_p)[:, None] * Q + o_q[None, :]
    tl.store(p_out + o_out, total, mask=m_p[:, None] & m_q[None, :])


def in_buffer(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> Tensor:
    """The first elements of a buffer in a given shape, or new memory if there is none."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=x.device)
    count = 1
    for size in shape:
        count *= size
    return out.view(-1)[:count].view(shape)


def _linear_blocks(
    x: Tensor, N: int, whole_rows: bool, out_itemsize: int, norm: bool
) -> tuple[str, dict[str, Any], int]:
    """Variant and launch settings of the product with N columns that should be fastest, and blocks across these.

    Args:
        x: rows ``[M, K]``.
        N: columns of the result.
        whole_rows: whether the rows of the result are normalised, measured or added to.
        out_itemsize: bytes of a number of the result.
        norm: whether complete rows are normalised, in a pass of its own if several blocks share them.
    """
    M, K = x.shape
    variants = tiles.RUNGS if whole_rows else tiles.RUNGS[1:]
    if forced_rung() in variants:
        variants = (forced_rung(),)
    rungs: list[tuple[str, dict[str, Any], int]] = []
    for variant in variants:
        blocks = settings_for(variant, x, N if variant == "linear_rows" else K)
        block_n, count = blocks["BLOCK_N"], blocks.get("TILES", 1)
        if whole_rows and N % 64 == 0:
            block_n = dividing_block(N, block_n)
            count = max(t for t in range(1, count + 1) if N % (t * block_n) == 0)
        chosen = {"BLOCK_N": block_n, "TILES": count, "BLOCK_K": dividing_block(K, blocks["BLOCK_K"])}
        rungs.append((variant, blocks | chosen, triton.cdiv(N, block_n * count)))
    candidates = [
        tiles.Tile(b["BLOCK_M"], b["BLOCK_N"] * b["TILES"], b["BLOCK_K"], b["num_warps"], b["num_stages"])
        for _, b, _ in rungs
    ]
    product = tiles.Product(M, N, K, x.dtype.itemsize, out_itemsize, norm)
    return rungs[tiles.fastest(product, tuple(candidates), multiprocessors(x.device), target_of(x)[1])]


def linear(
    x: Tensor,  # [M, K]
    layer: Folded,
    moments: Tensor | None = None,  # [M, parts, 2]
    *,
    gelu: bool = False,
    out_norm: tuple[Tensor, Tensor] | None = None,  # [N], [N]
    residual: Tensor | None = None,  # [M, N]
    out_dtype: torch.dtype | None = None,
    want_moments: bool = False,
    out: Tensor | None = None,
    out_moments: Tensor | None = None,
    scratch: Tensor | None = None,
    operation: str = "norm_linear",
) -> tuple[Tensor, Tensor | None]:
    """Compute ``residual + LN'(gelu(W LN(x) + b))`` and the row moments of the result.

    Args:
        x: rows, contiguous; K a multiple of 64.
        layer: weight ``[N, K]`` with the LayerNorm before it folded in if ``moments`` are given.
        moments: moments of the rows of ``x``, which make the product one of LN(x).
        gelu: apply GELU.
        out_norm: weight and bias of a LayerNorm of the result, before the residual.
        residual: added last.
        out_dtype: dtype of the result; that of ``x`` by default.
        want_moments: also return the row moments of the result; N a multiple of 64.
        out: buffer of at least M N numbers for the result; may be the residual.
        out_moments: buffer for the moments.
        scratch: buffer of at least M N numbers for rows that LN' takes in a pass of its own.
        operation: the operation that it is part of, whose compiled kernels may be wanted.

    Returns:
        Rows ``[M, N]`` and their moments ``[M, parts, 2]``.
    """
    (M, K), N = x.shape, layer.weight.shape[0]
    whole_rows = out_norm is not None or residual is not None or want_moments
    out_dtype = x.dtype if out_dtype is None else out_dtype
    variant, blocks, columns = _linear_blocks(x, N, whole_rows, out_dtype.itemsize, out_norm is not None)
    complete = columns == 1
    norm_apart = out_norm is not None and not complete
    added, measured = (None, False) if norm_apart else (residual, want_moments)
    # Around a residual the compiled kernel adds nothing but moments, which it writes with one alone.
    possible = (moments is None and not gelu) if added is not None else not measured
    buffer, dtype = (scratch, x.dtype) if norm_apart else (out, out_dtype)
    width = None
    if possible and (norm_apart or out_norm is None):
        others = (layer.weight, added, buffer)
        width = cuda.fits_linear(operation, x, N, dtype, multiprocessors(x.device), *others)
    if width is not None:
        y, new_moments = in_buffer(buffer, (M, N), dtype, x), None
        if measured:
            new_moments = in_buffer(out_moments, (M, N // width, 2), wide(x.dtype), x)
        cuda.linear(x, layer, width, moments, gelu, added, y, new_moments)
        if norm_apart:
            return add_layer_norm(y, out_norm, residual, out_dtype, want_moments, out, out_moments)
        return y, new_moments
    acc = wide(x.dtype)
    y = in_buffer(scratch, (M, N), x.dtype, x) if norm_apart else in_buffer(out, (M, N), out_dtype, x)
    new_moments = None
    if want_moments and not norm_apart:
        new_moments = in_buffer(out_moments, (M, columns, 2), acc, x)
    norm_weight, norm_bias = (layer.bias, layer.bias) if out_norm is None else out_norm
    # In the epilogue wide tiles of the residual would not fit the registers; but it must not cost float32 digits.
    only_adds = residual is not None and moments is None and not gelu and out_norm is None
    launch(
        linear_kernel,
        (triton.cdiv(M, blocks["BLOCK_M"]) * columns,),
        x,
        layer.weight,
        layer.bias,
        layer.row_sum,
        layer.bias if moments is None else moments,
        x if residual is None else residual,
        norm_weight,
        norm_bias,
        y,
        layer.bias if new_moments is None else new_moments,
        M,
        K,
        N=N,
        PARTS=0 if moments is None else moments.shape[1],
        CENTER=moments is not None and centers(x.dtype),
        GELU=gelu_kind(x.dtype) if gelu else GELU_NONE.value,
        OUT_NORM=out_norm is not None and complete,
        RESIDUAL=residual is not None and not norm_apart,
        RESIDUAL_FIRST=only_adds and x.dtype.itemsize == 2,
        OUT_MOMENTS=new_moments is not None,
        ACC=accumulator(x.dtype),
        PRECISION=dot_precision(x.dtype),
        variant=variant,
        **blocks,
    )
    if not norm_apart:
        return y, new_moments
    return add_layer_norm(y, out_norm, residual, out_dtype, want_moments, out, out_moments)


def add_layer_norm(
    y: Tensor,  # [M, N]
    out_norm: tuple[Tensor, Tensor],  # [N], [N]
    residual: Tensor | None,  # [M, N]
    out_dtype: torch.dtype,
    want_moments: bool,
    out: Tensor | None,
    out_moments: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``residual + LN'(y)`` and the moments of its rows in a pass of its own, in buffers as for :func:`linear`."""
    M, N = y.shape
    result = in_buffer(out, (M, N), out_dtype, y)
    moments = in_buffer(out_moments, (M, 1, 2), wide(y.dtype), y) if want_moments else None
    rows = row_blocks(y, N)
    launch(
        add_layer_norm_kernel,
        (triton.cdiv(M, rows["BLOCK_M"]),),
        y,
        *out_norm,
        residual,
        result,
        y if moments is None else moments,
        M,
        D=N,
        STORE_MOMENTS=want_moments,
        variant="rows",
        **rows,
    )
    return result, moments


def linear_argmax(
    x: Tensor,  # [M, K]
    layer: Folded,
    moments: Tensor,  # [M, parts, 2]
    out: Tensor,  # [M]
) -> Tensor:  # [M]
    """Write the index of the largest score ``W LN(x) + b`` of each row, the first of equals, into ``out``."""
    (M, K), N = x.shape, layer.weight.shape[0]
    blocks = settings_for("linear_argmax", x, K)
    blocks["BLOCK_K"] = dividing_block(K, blocks["BLOCK_K"])
    launch(
        linear_argmax_kernel,
        (triton.cdiv(M, blocks["BLOCK_M"]),),
        x,
        layer.weight,
        layer.bias,
        layer.row_sum,
        moments,
        out,
        M,
        N=N,
        K=K,
        PARTS=moments.shape[1],
        CENTER=centers(x.dtype),
        ACC=accumulator(x.dtype),
        PRECISION=dot_precision(x.dtype),
        variant="linear_argmax",
        **blocks,
    )
    return out


def splits_of(length: int, least: int, programs: int, device: torch.device) -> int:
    """Parts of a length over which ``programs`` sum, so that the busiest multiprocessor has least to do."""
    most = max(1, min(triton.cdiv(length, least), triton.cdiv(FULL_GRID, programs)))

    def work(splits: int) -> int:
        return triton.cdiv(programs * splits, multiprocessors(device)) * triton.cdiv(length, splits)

    return min(range(1, most + 1), key=work)


def weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` accumulated in float32 or better; ``[M, P], [M, Q] -> [P, Q]``.

    Splits of the rows are summed in a fixed order, so that the result is deterministic.
    """
    (M, P), Q = left.shape, right.shape[1]
    blocks = settings_for("weight_gradient", left, min(P, Q))
    tiles = triton.cdiv(P, blocks["BLOCK_M"]) * triton.cdiv(Q, blocks["BLOCK_N"])
    splits = splits_of(M, SPLIT_ROWS, tiles, left.device)
    rows = max(1, triton.cdiv(triton.cdiv(M, splits), blocks["BLOCK_K"])) * blocks["BLOCK_K"]
    partial = torch.empty(splits, P, Q, dtype=wide(left.dtype), device=left.device)
    launch(
        weight_gradient_kernel,
        (tiles, splits),
        left,
        right,
        partial,
        M,
        rows,
        P=P,
        Q=Q,
        ACC=accumulator(left.dtype),
        PRECISION=dot_precision(left.dtype),
        variant="weight_gradient",
        **blocks,
    )
    return partial.sum(0)


def column_sum(x: Tensor) -> Tensor:
    """Sum over rows in float32 or better; ``[M, N] -> [N]``."""
    return x.sum(0, dtype=wide(x.dtype))


class MLPGradients(NamedTuple):
    """Gradients of ``W2 gelu(W1 x + b1)``: for x, and float32 or better for the layers."""

    x: Tensor | None  # [M, K]
    weight1: Tensor  # [E, K]
    bias1: Tensor  # [E]
    weight2: Tensor  # [N, E]


def mlp_backward(
    grad: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight1: Tensor,  # [E, K]
    bias1: Tensor,  # [E] float32 or better
    weight2: Tensor,  # [N, E]
    needs_x: bool = True,
) -> MLPGradients:
    """Gradients of ``W2 gelu(W1 x + b1)``, recomputing the hidden layer; K, E and N are multiples of 64."""
    (M, K), (N, E) = x.shape, weight2.shape
    hidden = torch.empty(M, E, dtype=x.dtype, device=x.device)
    grad_hidden = hidden.new_empty(hidden.shape)
    blocks = settings_for("hidden_backward", x, K)
    blocks |= {
        "BLOCK_N": dividing_block(E, blocks["BLOCK_N"]),
        "BLOCK_K": min(dividing_block(width, blocks["BLOCK_K"]) for width in (K, N)),
    }
    launch(
        hidden_backward_kernel,
        (triton.cdiv(M, blocks["BLOCK_M"]) * (E // blocks["BLOCK_N"]),),
        x,
        weight1,
        bias1,
        grad,
        weight2.t().contiguous(),
        hidden,
        grad_hidden,
        M,
        E=E,
        K=K,
        N=N,
        GELU=gelu_kind(x.dtype),
        ACC=accumulator(x.dtype),
        PRECISION=dot_precision(x.dtype),
        variant="hidden_backward",
        **blocks,
    )
    grad_weight2 = weight_gradient(grad, hidden)
    del hidden
    return MLPGradients(
        matmul(grad_hidden, weight1) if needs_x else None,
        weight_gradient(grad_hidden, x),
        column_sum(grad_hidden),
        grad_weight2,
    )


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x W`` as the gradient of a linear layer needs it; ``[M, N], [N, K] -> [M, K]``."""
    padding = -x.shape[1] % 64
    if padding:
        x, weight = F.pad(x, (0, padding)), F.pad(weight, (0, 0, 0, padding))
    zero = torch.zeros(weight.shape[1], dtype=wide(x.dtype), device=x.device)
    return linear(x, Folded(weight.t().contiguous(), zero, zero))[0]
