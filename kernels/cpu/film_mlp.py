"""FiLM MLP of the nearest token on a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...extension import load
from ...ops.coordinates import nearest_token
from ...ops.film_mlp import PositionWeights, check_indices, position_code_backward
from ...ops.primitives import MLPWeights
from .context import Context, Held, address, arena, coords_address, needed_grads
from .residual_mlp import pack_mlp
from .weight_gradient import weight_gradient


class Film(NamedTuple):
    """Parameters of a FiLM MLP; ``position`` may be missing where a table replaces it."""

    position: tuple[Held, Held, Held] | None
    mlp: Held
    out_norm: Held


def pack_position(context: Context, weights: PositionWeights) -> tuple[Held, Held, Held]:
    """Pack the MLP from position code to gamma and beta, never in 8 bits: sines want more."""
    (gamma, beta), (gamma_bias, beta_bias) = weights.weight2.chunk(2), weights.bias2.chunk(2)
    layers = ((weights.weight1, weights.bias1), (gamma, gamma_bias), (beta, beta_bias))
    first, second, third = (context.matrix(*layer, int8=False) for layer in layers)
    return first, second, third


def film_mlp_at(
    context: Context,
    x: Tensor,
    coords: Tensor,
    tokens: Tensor,
    weights: Film,
    freqs: Tensor,
    out: Tensor,
    kept: Tensor | None = None,
) -> None:
    """Add the MLP of the nearest token, modulated by where in its cell the query lies; ``out`` may be ``x``."""
    context.kernels.film_mlp_at(
        context.handle,
        x.data_ptr(),
        tokens.data_ptr(),
        *coords_address(coords),
        *(held.handle for held in weights.position),
        freqs.data_ptr(),
        freqs.shape[0],
        weights.mlp.handle,
        weights.out_norm.handle,
        *(address(t) for t in (out, kept)),
        *x.shape,
        *tokens.shape[1:3],
    )


def film_mlp_from_table(
    context: Context,
    x: Tensor,
    tokens: Tensor,
    table: Tensor,  # [R, 2 D] float32
    row: Tensor,  # [N]
    token: Tensor,  # [N]
    weights: Film,
    out: Tensor,
    kept: Tensor | None = None,
) -> None:
    """Do what :func:`film_mlp_at` does with gamma and beta from a table; ``out`` may be ``x``."""
    addresses = (t.data_ptr() for t in (x, tokens, table, row, token))
    context.kernels.film_mlp_from_table(
        context.handle,
        *addresses,
        weights.mlp.handle,
        weights.out_norm.handle,
        *(address(t) for t in (out, kept)),
        *x.shape,
        *tokens.shape[1:3],
    )


def kept_bytes(x: Tensor, coords: Tensor | None, tokens: Tensor, *others: Tensor | None) -> int:
    """Size of the hidden layer and the MLP's output; without a table also of position layer, gamma, modulated token."""
    hidden, D = others[6].shape
    modulation = 3 * D if others[12] is None else 0
    return x.shape[0] * x.shape[1] * (hidden + D + modulation) * x.element_size()


def forward(
    int8: bool,
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    *others: Tensor | None,
    kept: Tensor | None = None,
) -> Tensor:
    """Forward of the operator."""
    position, weights, (table, freqs, row, token) = others[:4], others[4:12], others[12:]
    x, tokens = x.contiguous(), tokens.contiguous()
    bands = 0 if freqs is None else freqs.shape[0]
    context = Context(x.dtype, max(x.shape[-1], 2 + 4 * bands), int8=int8)
    mlp, out_norm = pack_mlp(context, MLPWeights(*weights[:6])), context.norm(*weights[6:])
    out = x.new_empty(x.shape)
    if table is None:
        coords, freqs = coords.contiguous(), freqs.float().contiguous()
        film = Film(pack_position(context, PositionWeights(*position)), mlp, out_norm)
        film_mlp_at(context, x, coords, tokens, film, freqs, out, kept)
    else:
        check_indices(table, tokens, row, token)
        table, row, token = context.vector(table), row.contiguous(), token.contiguous()
        film = Film(None, mlp, out_norm)
        film_mlp_from_table(context, x, tokens, table, row, token, film, out, kept)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    *others: Any,
    kept: Tensor | None,
) -> list[Tensor]:
    """Backward of the operator."""
    *arguments, needs_grad = others
    position, weights, (table, freqs, row, token) = arguments[:4], arguments[4:12], arguments[12:]
    mlp, out_norm_weights = MLPWeights(*weights[:6]), weights[6:]
    D, E = mlp.weight2.shape
    if kept is None:
        kept = x.new_empty(kept_bytes(x, coords, tokens, *arguments), dtype=torch.uint8)
        forward(False, x, coords, tokens, *arguments, kept=kept)
    tokens = tokens.contiguous()
    (B, N, _), (h, w) = x.shape, tokens.shape[1:3]
    needs_coords, needs_tokens = needs_grad[1:3]
    needs_first, needs_second = any(needs_grad[9:11]), any(needs_grad[11:13])

    cpu = load().cpu
    bands = 0 if freqs is None else freqs.shape[0]
    width = max(D, 2 + 4 * bands)
    tile_rows = cpu.tile_rows(width) // 2
    scratch_bytes = cpu.film_mlp_backward_scratch_bytes(width, tile_rows)
    context = Context(x.dtype, width, tile_rows=tile_rows, scratch_bytes=scratch_bytes)
    norm, out_norm = context.norm(*mlp[:2]), context.norm(*out_norm_weights)
    second_transposed = context.matrix(mlp.weight2.mT, None)
    first_transposed = context.matrix(mlp.weight1.mT, None)

    def rows(width: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return arena.tensor((B, N, width), dtype)

    grad_local, grad_preactivation, grad_gamma_beta = rows(D), rows(E), rows(2 * D)
    normed, hidden = rows(D) if needs_first else None, rows(E) if needs_second else None
    nearest, grad_nearest = rows(1, torch.int64), rows(D, torch.float32)
    norm_sums = arena.tensor((cpu.tiles(context.handle, N, B), 4, D), torch.float32)
    grad_norms = x.new_empty(4, D)
    grad_x = x.new_empty(x.shape) if needs_grad[0] else None
    grad_tokens = tokens.new_empty(tokens.shape) if needs_tokens else None
    token_sums = grad_tokens
    if needs_tokens and x.dtype != torch.float32:
        token_sums = arena.tensor(tokens.shape, torch.float32)
    backward = cpu.FilmMlpBackward(
        *(t.data_ptr() for t in (grad, tokens, kept)),
        *(held.handle for held in (norm, out_norm, second_transposed, first_transposed)),
        *(address(t) for t in (grad_local, normed, hidden, grad_preactivation)),
        *(t.data_ptr() for t in (nearest, grad_nearest, grad_gamma_beta, norm_sums, grad_norms)),
        *(address(t) for t in (grad_x, token_sums, grad_tokens)),
        *(B, N, D, h, w),
    )
    if table is not None:
        known = context.vector(table), row.contiguous(), token.contiguous()
        backward.from_table(*(t.data_ptr() for t in known))
    else:
        coords, freqs = coords.contiguous(), freqs.float().contiguous()
        weight1, _, weight2, _ = position
        transposed = [context.matrix(weight.mT, None) for weight in (weight2, weight1)]
        padded = -(-weight1.shape[1] // 16) * 16
        code, position_hidden, grad_position = rows(padded), rows(D), rows(D)
        grad_code = rows(padded, torch.float32) if needs_coords else None
        backward.from_coordinates(
            *coords_address(coords),
            *(held.handle for held in transposed),
            freqs.data_ptr(),
            bands,
            *(address(t) for t in (code, position_hidden, grad_position, grad_code)),
        )
    cpu.film_mlp_backward(context.handle, backward)

    grad_coords = grad_table = None
    grads_first = grads_second = (None, None)
    if needs_first:
        grads_first = weight_gradient(grad_preactivation, normed)
    if needs_second:
        grads_second = weight_gradient(grad_local, hidden)
    if any(needs_grad[3:7]):
        grad_weight1, grad_bias1 = weight_gradient(grad_position, code)
        grads_position = grad_weight1[:, : weight1.shape[1]], grad_bias1
        grads_position += weight_gradient(grad_gamma_beta, position_hidden)
    else:
        grads_position = (None,) * 4
    if needs_grad[15]:
        grad_table = table.new_zeros(table.shape, dtype=torch.float32)
        grad_table = grad_table.index_add_(0, row, grad_gamma_beta.float().sum(0)).to(table.dtype)
    if needs_coords:
        _, relative = nearest_token(coords, (h, w))
        grad_code = grad_code[..., : weight1.shape[1]]
        grad_coords = position_code_backward(grad_code, relative, freqs, (h, w)).to(coords.dtype)
    grads_norm, grads_out_norm = (tuple(g.clone() for g in pair) for pair in grad_norms.split(2))
    grads_mlp = (*grads_norm, *grads_first, *grads_second)
    grads = (grad_x, grad_coords, grad_tokens, *grads_position, *grads_mlp, *grads_out_norm, grad_table)
    return needed_grads(grads, needs_grad)
