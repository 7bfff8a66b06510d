"""FiLM MLP: gather and modulate the nearest token, then an MLP between two LayerNorms, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.film_mlp import check_indices
from .. import cuda
from .common import (
    fractional_turns,
    launch,
    layer_norm_backward,
    nearest_relative,
    positions,
    row_blocks,
    row_moments,
    segment_sum,
    sine_cosine,
    wide,
)
from .linear import Folded, column_sum, fold, in_buffer, linear, mlp_backward
from .residual_mlp import FoldedMLP, fold_mlp, normed_mlp_backward


@triton.jit
def position_waves(
    p_coords,
    p_freqs,
    o_row,
    m_row,
    o_column,
    token_h,
    token_w,
    BANDS: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """For each column of the position code: relative position, frequency, sine, cosine, and whether along x."""
    _, rx = nearest_relative(tl.load(p_coords + 2 * o_row, mask=m_row, other=0.0), token_w)
    _, ry = nearest_relative(tl.load(p_coords + 2 * o_row + 1, mask=m_row, other=0.0), token_h)
    angle = o_column - 2
    is_angle = (angle >= 0) & (angle < 4 * BANDS)
    along_x = tl.where(is_angle, angle // BANDS % 2 == 0, o_column == 0)[None, :]
    relative = tl.where(along_x, rx[:, None], ry[:, None]).to(ACC)
    frequency = tl.load(p_freqs + angle % BANDS, mask=is_angle, other=0.0).to(ACC)
    sine, cosine = sine_cosine(fractional_turns(relative * (frequency * 0.5)[None, :], ACC), DTYPE)
    return relative, frequency, sine, cosine, along_x


@triton.jit(do_not_specialize=["M", "token_h", "token_w"])
def position_code_kernel(
    p_coords,  # [M, 2]
    p_freqs,  # [BANDS]
    p_code,  # [M, WIDTH]
    M,
    token_h,
    token_w,
    BANDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Position code ``[rx, ry, sin x, sin y, cos x, cos y]`` of each query, padded with zeros to ``WIDTH``."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row = o_row < M
    relative, _, sine, cosine, _ = position_waves(
        p_coords, p_freqs, o_row, m_row, o_column, token_h, token_w, BANDS, ACC, p_code.dtype.element_ty
    )
    angle = o_column - 2
    is_angle = (angle >= 0) & (angle < 4 * BANDS)
    wave = tl.where((angle < 2 * BANDS)[None, :], sine, cosine)
    code = tl.where(is_angle[None, :], wave, tl.where((o_column < 2)[None, :], relative, 0.0))
    o_code = o_row[:, None] * WIDTH + o_column[None, :]
    mask = m_row[:, None] & (o_column < WIDTH)[None, :]
    tl.store(p_code + o_code, code.to(p_code.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "token_h", "token_w"])
def position_code_backward_kernel(
    p_grad_code,  # [M, WIDTH]
    p_coords,  # [M, 2]
    p_freqs,  # [BANDS]
    p_grad_coords,  # [M, 2]
    M,
    token_h,
    token_w,
    BANDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of the position code for coordinates."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row = o_row < M
    _, frequency, sine, cosine, along_x = position_waves(
        p_coords, p_freqs, o_row, m_row, o_column, token_h, token_w, BANDS, ACC, p_grad_code.dtype.element_ty
    )
    angle = o_column - 2
    is_angle = (angle >= 0) & (angle < 4 * BANDS)
    slope = tl.where((angle < 2 * BANDS)[None, :], cosine, -sine) * (frequency * 3.141592653589793)[None, :]
    slope = tl.where(is_angle[None, :], slope, tl.where((o_column < 2)[None, :], 1.0, 0.0))
    o_code = o_row[:, None] * WIDTH + o_column[None, :]
    mask = m_row[:, None] & (o_column < WIDTH)[None, :]
    along = tl.load(p_grad_code + o_code, mask=mask, other=0.0).to(ACC) * slope
    grad_x = tl.sum(tl.where(along_x, along, 0.0), 1) * token_w
    grad_y = tl.sum(tl.where(along_x, 0.0, along), 1) * token_h
    tl.store(p_grad_coords + 2 * o_row, grad_x.to(p_grad_coords.dtype.element_ty), mask=m_row)
    tl.store(p_grad_coords + 2 * o_row + 1, grad_y.to(p_grad_coords.dtype.element_ty), mask=m_row)


@triton.jit
def token_and_film_row(
    p_coords, p_token, p_table_row, o_row, m_row, N, token_h, token_w, TABLE: tl.constexpr
):
    """Flat index of each query's token among all images, and its row of ``[gamma, beta]``."""
    image = (o_row // N) * token_h * token_w
    if TABLE:
        o_query = o_row % N
        token = tl.load(p_token + o_query, mask=m_row, other=0)
        return image + token, tl.load(p_table_row + o_query, mask=m_row, other=0)
    else:
        column, _ = nearest_relative(tl.load(p_coords + 2 * o_row, mask=m_row, other=0.0), token_w)
        row, _ = nearest_relative(tl.load(p_coords + 2 * o_row + 1, mask=m_row, other=0.0), token_h)
        return image + row * token_w + column, o_row


@triton.jit(do_not_specialize=["M", "N", "token_h", "token_w"])
def modulate_kernel(
    p_tokens,  # [B, h * w, D]
    p_gamma_beta,  # [R, 2 D], or [B * N, 2 D] without a table
    p_coords,  # [B, N, 2]
    p_token,  # [N]
    p_table_row,  # [N]
    p_out,  # [B * N, D]
    p_moments,  # [B * N, 1, 2]
    M,
    N,
    token_h,
    token_w,
    D: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """``(1 + gamma) token + beta`` of each query and the moments of these rows."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row, m_column = o_row < M, (o_column < D)[None, :]
    mask = m_row[:, None] & m_column
    token, film_row = token_and_film_row(
        p_coords, p_token, p_table_row, o_row, m_row, N, token_h, token_w, TABLE
    )
    b_token = tl.load(p_tokens + token[:, None] * D + o_column[None, :], mask=mask, other=0.0).to(ACC)
    p_film = p_gamma_beta + film_row[:, None] * (2 * D) + o_column[None, :]
    gamma = tl.load(p_film, mask=mask, other=0.0).to(ACC)
    beta = tl.load(p_film + D, mask=mask, other=0.0).to(ACC)
    b_out = (b_token + (b_token * gamma + beta)).to(p_out.dtype.element_ty)
    tl.store(p_out + o_row[:, None] * D + o_column[None, :], b_out, mask=mask)
    mean, squares = row_moments(b_out.to(ACC), m_column, D, ACC)
    tl.store(p_moments + 2 * o_row, mean, mask=m_row)
    tl.store(p_moments + 2 * o_row + 1, squares, mask=m_row)


@triton.jit(do_not_specialize=["M", "N", "token_h", "token_w"])
def modulate_backward_kernel(
    p_grad,  # [B * N, D]
    p_tokens,  # [B, h * w, D]
    p_gamma_beta,  # [R, 2 D], or [B * N, 2 D] without a table
    p_coords,  # [B, N, 2]
    p_token,  # [N]
    p_table_row,  # [N]
    p_grad_token,  # [B * N, D]
    p_grad_gamma_beta,  # [B * N, 2 D]
    p_index,  # [B * N]
    M,
    N,
    token_h,
    token_w,
    D: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of each query's token, gamma and beta, and the index of its token among all images."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row = o_row < M
    mask = m_row[:, None] & (o_column < D)[None, :]
    token, film_row = token_and_film_row(
        p_coords, p_token, p_table_row, o_row, m_row, N, token_h, token_w, TABLE
    )
    tl.store(p_index + o_row, token, mask=m_row)
    b_token = tl.load(p_tokens + token[:, None] * D + o_column[None, :], mask=mask, other=0.0).to(ACC)
    gamma = tl.load(p_gamma_beta + film_row[:, None] * (2 * D) + o_column[None, :], mask=mask, other=0.0)
    grad = tl.load(p_grad + o_row[:, None] * D + o_column[None, :], mask=mask, other=0.0).to(ACC)
    o_out = o_row[:, None] * D + o_column[None, :]
    tl.store(p_grad_token + o_out, grad + grad * gamma.to(ACC), mask=mask)
    p_film = p_grad_gamma_beta + o_row[:, None] * (2 * D) + o_column[None, :]
    tl.store(p_film, (grad * b_token).to(p_grad_gamma_beta.dtype.element_ty), mask=mask)
    tl.store(p_film + D, grad.to(p_grad_gamma_beta.dtype.element_ty), mask=mask)


class FoldedPosition(NamedTuple):
    """Both layers of the position MLP, the first padded to the width of the padded position code."""

    first: Folded
    second: Folded


def fold_position(weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> FoldedPosition:
    """Pad the first layer of the position MLP to a multiple of 64 columns."""
    padding = -weight1.shape[1] % 64
    return FoldedPosition(fold(torch.nn.functional.pad(weight1, (0, padding)), bias1), fold(weight2, bias2))


def position_code(
    coords: Tensor,
    freqs: Tensor,
    token_grid: tuple[int, int],
    width: int,
    like: Tensor,
    out: Tensor | None = None,  # [at least M, width]
) -> Tensor:
    """Position code of each query in the dtype of ``like``, computed in float32 or better; ``[M, width]``."""
    M = coords.numel() // 2
    code = torch.empty(M, width, dtype=like.dtype, device=like.device) if out is None else out[:M]
    blocks = row_blocks(like, width)
    launch(
        position_code_kernel,
        (triton.cdiv(M, blocks["BLOCK_M"]),),
        coords,
        freqs,
        code,
        M,
        *token_grid,
        BANDS=freqs.shape[0],
        WIDTH=width,
        variant="rows",
        **blocks,
    )
    return code


class Modulation(NamedTuple):
    """Where each query's token, gamma and beta come from: coordinates, or a table and indices into it."""

    gamma_beta: Tensor  # [R, 2 D], or [B * N, 2 D] without a table
    coords: Tensor | None  # [B, N, 2]
    row: Tensor | None  # [N]
    token: Tensor | None  # [N]

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates, tokens and rows of the table as the kernels take them; what is not read is a stand-in."""
        if self.row is None:
            return self.coords, self.coords, self.coords
        return self.token, self.token, self.row


class FilmBuffers(NamedTuple):
    """Memory that :func:`film_mlp` may use for N queries; None allocates."""

    modulated: Tensor | None = None  # [M, D]
    modulated_moments: Tensor | None = None  # [M, 1, 2]
    hidden: Tensor | None = None  # [M, E]
    local: Tensor | None = None  # [M, D]
    out: Tensor | None = None  # [M, D]
    out_moments: Tensor | None = None  # [M, parts, 2]


def position_gamma_beta(
    code: Tensor,  # [M, width]
    layers: FoldedPosition,
    hidden: Tensor | None = None,  # [M, D]
    out: Tensor | None = None,  # [M, 2 D]
) -> Tensor:
    """``[gamma, beta]`` ``[M, 2 D]`` in float32 or better of padded position codes; buffers as for :func:`linear`."""
    hidden, _ = linear(code, layers.first, gelu=True, out=hidden)  # [M, D]
    return linear(hidden, layers.second, out_dtype=wide(code.dtype), out=out)[0]


def modulate(
    x: Tensor,  # [B, N, D]
    tokens: Tensor,  # [B, h, w, D]
    modulation: Modulation,
    out: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather and modulate the token of each query; rows ``[M, D]`` and their moments ``[M, 1, 2]``."""
    B, N, D = x.shape
    modulated = torch.empty(B * N, D, dtype=x.dtype, device=x.device) if out is None else out
    if moments is None:
        moments = torch.empty(B * N, 1, 2, dtype=wide(x.dtype), device=x.device)
    blocks = row_blocks(x, D)
    launch(
        modulate_kernel,
        (triton.cdiv(B * N, blocks["BLOCK_M"]),),
        tokens,
        modulation.gamma_beta,
        *modulation.pointers(),
        modulated,
        moments,
        B * N,
        N,
        *tokens.shape[1:3],
        D=D,
        TABLE=modulation.row is not None,
        variant="rows",
        **blocks,
    )
    return modulated, moments


def film_mlp(
    x: Tensor,  # [B, N, D]
    tokens: Tensor,  # [B, h, w, D]
    modulation: Modulation,
    layers: FoldedMLP,
    out_norm: tuple[Tensor, Tensor],
    buffers: FilmBuffers = FilmBuffers(),  # noqa: B008
    want_moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``x + LNl(W2 gelu(W1 LN1(m) + b1) + b2)`` of the modulated tokens m, ``[M, D]``, and the moments of its rows."""
    rows, E = x.view(-1, x.shape[-1]), layers.first.weight.shape[0]
    read = (tokens, modulation.gamma_beta, layers.second.weight, *out_norm)
    if layers.quantised is not None or cuda.fits_one_kernel("film_mlp", E, x, *read):
        out, out_moments = in_buffer(buffers.out, rows.shape, x.dtype, x), None
        if want_moments:
            out_moments = in_buffer(buffers.out_moments, (len(rows), 1, 2), wide(x.dtype), x)
        source = (modulation.gamma_beta, modulation.pointers(), modulation.row is not None)
        cuda.film_mlp(x, tokens, *source, layers.one_kernel, out_norm, out, out_moments)
        return out, out_moments
    modulated, moments = modulate(x, tokens, modulation, buffers.modulated, buffers.modulated_moments)
    hidden, _ = linear(
        modulated, layers.first, moments, gelu=True, out=buffers.hidden, operation="film_mlp"
    )  # [M, E]
    return linear(
        hidden,
        layers.second,
        out_norm=out_norm,
        residual=rows,
        out=buffers.out,
        out_moments=buffers.out_moments,
        scratch=buffers.local,
        want_moments=want_moments,
        operation="film_mlp",
    )


def local_rows(
    x: Tensor,  # [B, N, D]
    tokens: Tensor,  # [B, h, w, D]
    modulation: Modulation,
    layers: FoldedMLP,
    buffers: FilmBuffers,
) -> Tensor:  # [M, D]
    """``W2 gelu(W1 LN1(m) + b1) + b2`` of the modulated tokens m, the part of :func:`film_mlp` that reads no state.

    Args:
        x: of the queries' shape and dtype; its values are not read.
        tokens: of each image.
        modulation: gamma and beta.
        layers: the MLP.
        buffers: memory.
    """
    part = {"operation": "film_mlp"}
    modulated, moments = modulate(x, tokens, modulation, buffers.modulated, buffers.modulated_moments)
    hidden, _ = linear(modulated, layers.first, moments, gelu=True, out=buffers.hidden, **part)  # [M, E]
    return linear(hidden, layers.second, out=buffers.local, **part)[0]


def film_modulation(
    coords: Tensor | None,
    tokens: Tensor,
    position: tuple[Tensor | None, ...],
    table: Tensor | None,
    freqs: Tensor | None,
    row: Tensor | None,
    token: Tensor | None,
) -> tuple[Modulation, Tensor | None]:
    """Gamma and beta from the table or the position MLP, with the position code in the latter case."""
    if table is not None:
        gamma_beta = table.to(wide(tokens.dtype)).contiguous()
        return Modulation(gamma_beta, None, row.contiguous(), token.contiguous()), None
    coords, layers = positions(coords, tokens), fold_position(*position)
    weight = layers.first.weight
    code = position_code(coords, freqs.contiguous(), tokens.shape[1:3], weight.shape[1], weight)
    return Modulation(position_gamma_beta(code, layers), coords, None, None), code


def forward(
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    *weights_and_table: Tensor | None,
    fp8: bool = False,
) -> Tensor:
    """Forward pass of :func:`vitup_fast.ops.film_mlp`; with ``fp8`` its products take 8 bits."""
    position, mlp = weights_and_table[:4], weights_and_table[4:10]
    out_norm = tuple(t.contiguous() for t in weights_and_table[10:12])
    x, tokens = x.contiguous(), tokens.contiguous()
    table, _, row, token = weights_and_table[12:]
    if table is not None:
        check_indices(table, tokens, row, token)
    modulation, _ = film_modulation(coords, tokens, position, *weights_and_table[12:])
    if fp8:
        x, tokens, *out_norm = map(cuda.aligned, (x, tokens, *out_norm))
        modulation = modulation._replace(gamma_beta=cuda.aligned(modulation.gamma_beta))
    return film_mlp(x, tokens, modulation, fold_mlp(*mlp, fp8=fp8), tuple(out_norm))[0].view_as(x)


def forward_fp8(*arguments: Tensor | None) -> Tensor:
    """The same with 8-bit products."""
    return forward(*arguments, fp8=True)


def backward(
    grad: Tensor,
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    *rest: Tensor | list[bool] | None,
) -> list[Tensor]:
    """Gradients of the differentiable arguments, as far as they are needed; everything is recomputed."""
    *rest, needs_grad = rest
    position, mlp, out_norm, (table, freqs, row, token) = rest[:4], rest[4:10], rest[10:12], rest[12:]
    needs_x, needs_coords, needs_tokens, *needs = needs_grad
    needs_film = needs_coords or needs_tokens or any(needs[:4]) or needs[12]
    x, tokens = x.contiguous(), tokens.contiguous()
    (B, N, D), (h, w) = x.shape, tokens.shape[1:3]
    grad_rows = grad.view(-1, D)
    modulation, code = film_modulation(coords, tokens, position, table, freqs, row, token)
    modulated, moments = modulate(x, tokens, modulation)
    layers = fold_mlp(*mlp)
    hidden, _ = linear(modulated, layers.first, moments, gelu=True)
    local, _ = linear(hidden, layers.second)  # [M, D]
    del hidden
    grad_local, *grads_out_norm = layer_norm_backward(grad_rows, local, weight=out_norm[0].contiguous())
    del local
    grad_modulated, *grads_mlp = normed_mlp_backward(grad_local, modulated, tuple(mlp), needs_film)

    grad_coords = grad_tokens = grad_table = None
    grads_position = (None,) * 4
    if needs_film:
        acc = wide(x.dtype)
        grad_token = torch.empty(B * N, D, dtype=acc, device=x.device)
        film_dtype = acc if table is not None else x.dtype
        grad_gamma_beta = torch.empty(B * N, 2 * D, dtype=film_dtype, device=x.device)
        index = torch.empty(B * N, dtype=torch.int64, device=x.device)
        blocks = row_blocks(x, D)
        launch(
            modulate_backward_kernel,
            (triton.cdiv(B * N, blocks["BLOCK_M"]),),
            grad_modulated,
            tokens,
            modulation.gamma_beta,
            *modulation.pointers(),
            grad_token,
            grad_gamma_beta,
            index,
            B * N,
            N,
            h,
            w,
            D=D,
            TABLE=table is not None,
            variant="rows",
            **blocks,
        )
        if needs_tokens:
            grad_tokens = segment_sum(grad_token, index, B * h * w, x.dtype)
        del grad_token
        if table is not None and needs[12]:
            grad_table = segment_sum(grad_gamma_beta, row.repeat(B), table.shape[0], film_dtype).to(
                table.dtype
            )
        elif table is None and (needs_coords or any(needs[:4])):
            grad_coords, grads_position = _position_backward(
                grad_gamma_beta, code, modulation.coords, freqs, (h, w), position, needs_coords
            )
    dtype = x.dtype
    grads = (
        grad_rows.clone() if needs_x else None,
        None if grad_coords is None else grad_coords.to(coords.dtype),
        grad_tokens,
        *grads_position,
        *grads_mlp,
        grads_out_norm[0].to(dtype),
        grads_out_norm[1].to(dtype),
        grad_table,
    )
    arguments = (x, coords, tokens, *position, *mlp, *out_norm, table)
    return [g.view(a.shape) for g, a, needed in zip(grads, arguments, needs_grad, strict=True) if needed]


def _position_backward(
    grad_gamma_beta: Tensor,  # [M, 2 D]
    code: Tensor,  # [M, width]
    coords: Tensor,  # [B, N, 2]
    freqs: Tensor,  # [F]
    token_grid: tuple[int, int],
    position: tuple[Tensor, ...],
    needs_coords: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Gradients of the position MLP for coordinates and its four weights."""
    layers, (M, width), dtype = fold_position(*position), code.shape, code.dtype
    grads = mlp_backward(
        grad_gamma_beta, code, layers.first.weight, layers.first.bias, position[2].contiguous(), needs_coords
    )
    grad_coords = None
    if needs_coords:
        grad_coords = coords.new_empty(coords.shape)
        blocks = row_blocks(code, width)
        launch(
            position_code_backward_kernel,
            (triton.cdiv(M, blocks["BLOCK_M"]),),
            grads.x,
            coords,
            freqs.contiguous(),
            grad_coords,
            M,
            *token_grid,
            BANDS=freqs.shape[0],
            WIDTH=width,
            variant="rows",
            **blocks,
        )
    grad_weight1 = grads.weight1[:, : position[0].shape[1]].contiguous()
    weights = (grad_weight1, grads.bias1, grads.weight2, column_sum(grad_gamma_beta))
    return grad_coords, tuple(g.to(dtype) for g in weights)
