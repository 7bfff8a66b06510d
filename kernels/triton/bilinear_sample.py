"""Bilinear sampling of a grid at continuous coordinates, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, launch, positions, row_blocks, row_moments, segments, wide


@triton.jit
def corner_and_fraction(coord, COUNT, ACC: tl.constexpr):
    """First of the two cells between which a coordinate lies, and how far it lies from it towards the second."""
    position = coord * COUNT - 0.5
    known = position == position
    inside = tl.minimum(tl.maximum(tl.where(known, position, 0.0), 0.0), COUNT - 1.0)
    first = tl.floor(inside)
    return first.to(tl.int32), tl.where(known, inside - first, position).to(ACC)


@triton.jit(do_not_specialize=["M", "N", "P", "Q"])
def bilinear_sample_kernel(
    p_grid,  # [B, P, Q, D]
    p_coords,  # [B, N, 2]
    p_out,  # [B, N, D]
    p_moments,  # [B * N, 1, 2]
    M,
    N,
    P,
    Q,
    D: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mix the four cells around each coordinate; also write the row moments that the next LayerNorm needs."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row, m_column = o_row < M, (o_column < D)[None, :]
    mask = m_row[:, None] & m_column
    left, fx = corner_and_fraction(tl.load(p_coords + 2 * o_row, mask=m_row, other=0.0), Q, ACC)
    top, fy = corner_and_fraction(tl.load(p_coords + 2 * o_row + 1, mask=m_row, other=0.0), P, ACC)
    right, bottom = tl.minimum(left + 1, Q - 1), tl.minimum(top + 1, P - 1)
    fx, fy = fx[:, None], fy[:, None]
    image = (o_row // N) * P
    p_top = p_grid + ((image + top) * Q)[:, None] * D + o_column[None, :]
    p_bottom = p_grid + ((image + bottom) * Q)[:, None] * D + o_column[None, :]
    o_left, o_right = left.to(tl.int64)[:, None] * D, right.to(tl.int64)[:, None] * D
    top_left = tl.load(p_top + o_left, mask=mask, other=0.0).to(ACC)
    top_right = tl.load(p_top + o_right, mask=mask, other=0.0).to(ACC)
    bottom_left = tl.load(p_bottom + o_left, mask=mask, other=0.0).to(ACC)
    bottom_right = tl.load(p_bottom + o_right, mask=mask, other=0.0).to(ACC)
    upper = top_left + (top_right - top_left) * fx
    lower = bottom_left + (bottom_right - bottom_left) * fx
    b_out = (upper + (lower - upper) * fy).to(p_out.dtype.element_ty)
    tl.store(p_out + o_row[:, None] * D + o_column[None, :], b_out, mask=mask)
    if MOMENTS:
        mean, squares = row_moments(tl.where(m_column, b_out.to(ACC), 0.0), m_column, D, ACC)
        tl.store(p_moments + 2 * o_row, mean, mask=m_row)
        tl.store(p_moments + 2 * o_row + 1, squares, mask=m_row)


@triton.jit(do_not_specialize=["M", "N", "P", "Q"])
def bilinear_sample_coords_backward_kernel(
    p_grad,  # [B, N, D]
    p_grid,  # [B, P, Q, D]
    p_coords,  # [B, N, 2]
    p_grad_coords,  # [B, N, 2]
    p_cell,  # [B * N]
    M,
    N,
    P,
    Q,
    D: tl.constexpr,
    COORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient for coordinates if ``COORDS``, and the flat index of each query's top left cell."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row = o_row < M
    mask = m_row[:, None] & (o_column < D)[None, :]
    x = tl.load(p_coords + 2 * o_row, mask=m_row, other=0.0)
    y = tl.load(p_coords + 2 * o_row + 1, mask=m_row, other=0.0)
    left, fx = corner_and_fraction(x, Q, ACC)
    top, fy = corner_and_fraction(y, P, ACC)
    image = (o_row // N) * P
    tl.store(p_cell + o_row, (image + top) * Q + left, mask=m_row)
    if COORDS:
        right, bottom = tl.minimum(left + 1, Q - 1), tl.minimum(top + 1, P - 1)
        p_top = p_grid + ((image + top) * Q)[:, None] * D + o_column[None, :]
        p_bottom = p_grid + ((image + bottom) * Q)[:, None] * D + o_column[None, :]
        o_left, o_right = left.to(tl.int64)[:, None] * D, right.to(tl.int64)[:, None] * D
        grad = tl.load(p_grad + o_row[:, None] * D + o_column[None, :], mask=mask, other=0.0).to(ACC)
        # The derivative is a difference of four scalar products.
        top_left = tl.sum(grad * tl.load(p_top + o_left, mask=mask, other=0.0).to(ACC), 1)
        top_right = tl.sum(grad * tl.load(p_top + o_right, mask=mask, other=0.0).to(ACC), 1)
        bottom_left = tl.sum(grad * tl.load(p_bottom + o_left, mask=mask, other=0.0).to(ACC), 1)
        bottom_right = tl.sum(grad * tl.load(p_bottom + o_right, mask=mask, other=0.0).to(ACC), 1)
        along_x = ((top_right - top_left) * (1 - fy) + (bottom_right - bottom_left) * fy) * Q
        along_y = ((bottom_left - top_left) * (1 - fx) + (bottom_right - top_right) * fx) * P
        # Clamped positions do not move.
        x, y = x * Q - 0.5, y * P - 0.5
        along_x = tl.where((x >= 0) & (x <= Q - 1), along_x, 0.0)
        along_y = tl.where((y >= 0) & (y <= P - 1), along_y, 0.0)
        tl.store(p_grad_coords + 2 * o_row, along_x.to(p_grad_coords.dtype.element_ty), mask=m_row)
        tl.store(p_grad_coords + 2 * o_row + 1, along_y.to(p_grad_coords.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["P", "Q"])
def bilinear_sample_grid_backward_kernel(
    p_grad,  # [B, N, D]
    p_coords,  # [B, N, 2]
    p_order,  # [B * N]
    p_offsets,  # [B * P * Q + 1]
    p_grad_grid,  # [B, P, Q, D]
    P,
    Q,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of one cell: what queries in it and in its three neighbours to the left and above took from it."""
    i_cell = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_column = (o_column < D)[None, :]
    column, row = i_cell % Q, i_cell // Q % P
    total = tl.zeros((BLOCK_D,), ACC)
    for neighbour in tl.static_range(4):
        # neighbour % 2 steps to the left, neighbour // 2 steps up
        exists = (column >= neighbour % 2) & (row >= neighbour // 2)
        cell = tl.where(exists, i_cell - neighbour % 2 - neighbour // 2 * Q, i_cell)
        first = tl.load(p_offsets + cell)
        last = tl.where(exists, tl.load(p_offsets + cell + 1), first)
        for start in tl.range(first, last, BLOCK_M):
            o_member = start + tl.arange(0, BLOCK_M)
            m_member = o_member < last
            query = tl.load(p_order + o_member, mask=m_member, other=0)
            _, fx = corner_and_fraction(tl.load(p_coords + 2 * query, mask=m_member, other=0.0), Q, ACC)
            _, fy = corner_and_fraction(tl.load(p_coords + 2 * query + 1, mask=m_member, other=0.0), P, ACC)
            share = (fx if neighbour % 2 else 1 - fx) * (fy if neighbour // 2 else 1 - fy)
            mask = m_member[:, None] & m_column
            grad = tl.load(p_grad + query[:, None] * D + o_column[None, :], mask=mask, other=0.0).to(ACC)
            total += tl.sum(tl.where(m_member[:, None], grad * share[:, None], 0.0), 0)
    p_out = p_grad_grid + i_cell * D + o_column
    tl.store(p_out, total.to(p_grad_grid.dtype.element_ty), mask=o_column < D)


def sample(
    grid: Tensor,  # [B, P, Q, D]
    coords: Tensor,  # [B, N, 2]
    out: Tensor | None = None,  # [B, N, D]
    moments: Tensor | None = None,  # [B * N, 1, 2]
) -> Tensor:  # [B, N, D]
    """Sample a grid; also write the row moments if there is a place for them."""
    B, P, Q, D = grid.shape
    N = coords.shape[1]
    if out is None:
        out = torch.empty(B, N, D, dtype=grid.dtype, device=grid.device)
    blocks = row_blocks(grid, D)
    launch(
        bilinear_sample_kernel,
        (triton.cdiv(B * N, blocks["BLOCK_M"]),),
        grid,
        coords,
        out,
        out if moments is None else moments,
        B * N,
        N,
        P,
        Q,
        D=D,
        MOMENTS=moments is not None,
        variant="rows",
        **blocks,
    )
    return out


def forward(grid: Tensor, coords: Tensor) -> Tensor:
    """Forward pass of :func:`vitup_fast.ops.bilinear_sample`."""
    return sample(grid.contiguous(), positions(coords, grid))


def backward(grad: Tensor, grid: Tensor, coords: Tensor, needs_grad: list[bool]) -> list[Tensor]:
    """Gradients for grid and coordinates, as far as they are needed."""
    (B, P, Q, D), N = grid.shape, coords.shape[1]
    grid, dtype, coords = grid.contiguous(), coords.dtype, positions(coords, grid)
    grad_coords = coords.new_empty(coords.shape)
    cell = torch.empty(B * N, dtype=torch.int64, device=grid.device)
    blocks = row_blocks(grid, D)
    launch(
        bilinear_sample_coords_backward_kernel,
        (triton.cdiv(B * N, blocks["BLOCK_M"]),),
        grad,
        grid,
        coords,
        grad_coords,
        cell,
        B * N,
        N,
        P,
        Q,
        D=D,
        COORDS=needs_grad[1],
        variant="rows",
        **blocks,
    )
    grads = []
    if needs_grad[0]:
        order, offsets = segments(cell, B * P * Q)
        grad_grid = grid.new_empty(grid.shape)
        launch(
            bilinear_sample_grid_backward_kernel,
            (B * P * Q, triton.cdiv(D, 128)),
            grad,
            coords,
            order,
            offsets,
            grad_grid,
            P,
            Q,
            D=D,
            BLOCK_M=8,
            BLOCK_D=128,
            ACC=accumulator(grid.dtype),
            variant="rows",
            num_warps=2,
        )
        grads.append(grad_grid)
    if needs_grad[1]:
        grads.append(grad_coords.to(dtype))
    return grads


def sample_moments(grid: Tensor, N: int) -> Tensor:
    """Memory for the moments of N samples of each image."""
    return torch.empty(grid.shape[0] * N, 1, 2, dtype=wide(grid.dtype), device=grid.device)
