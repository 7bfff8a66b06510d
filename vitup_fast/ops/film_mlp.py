"""FiLM MLP of the nearest token: what a query reads locally (ViT-Up, arXiv 2606.14024).

``m = (1 + gamma) * t + beta`` modulates the LayerNormed token ``t`` nearest to the query by an MLP of where inside
that token's cell the query lies; the result is ``x + LNl(W2 gelu(W1 LN1(m) + b1) + b2)``.

``(gamma, beta)`` depend on the relative position alone. Queries on a regular grid share few relative positions, so
that a :class:`FilmTable` of them replaces the position MLP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .coordinates import nearest_token, position_code, position_dtype
from .implementations import resolve
from .operator import Kernels, Operator, autocast, run_reference
from .primitives import (
    LAYER_NORM_EPS,
    MLPWeights,
    layer_norm,
    layer_norm_backward,
    linear,
    mlp,
    mlp_backward,
    two_layers_backward,
)
from .residual_mlp import check_mlp


class PositionWeights(NamedTuple):
    """Parameters of the MLP from position code to ``[gamma, beta]``, widths 2 + 4 F -> D -> 2 D."""

    weight1: Tensor  # [D, 2 + 4 F]
    bias1: Tensor  # [D]
    weight2: Tensor  # [2 D, D]
    bias2: Tensor  # [2 D]


class FilmWeights(NamedTuple):
    """Parameters after the modulation: the MLP with its LayerNorm LN1, and the LayerNorm LNl of its output."""

    mlp: MLPWeights
    out_norm_weight: Tensor  # [D]
    out_norm_bias: Tensor  # [D]


class FilmTable(NamedTuple):
    """``[gamma, beta]`` of the few relative positions that N queries on a regular grid share."""

    gamma_beta: Tensor  # [R, 2 D]
    row: Tensor  # [N] int64, row of the table for each query
    token: Tensor  # [N] int64, flat index of the nearest token


def film_gamma_beta(relative: Tensor, freqs: Tensor, position: PositionWeights) -> Tensor:
    """``[gamma, beta]`` at relative positions, in the dtype of the weights; ``[..., 2] -> [..., 2 D]``."""
    code = position_code(relative, freqs).to(position.weight1.dtype)  # [..., 2 + 4 F]
    hidden = F.gelu(F.linear(code, position.weight1, position.bias1))  # [..., D]
    return F.linear(hidden, position.weight2, position.bias2)


def film_mlp_reference(
    x: Tensor, coords: Tensor, tokens: Tensor, freqs: Tensor, position: PositionWeights, weights: FilmWeights
) -> Tensor:
    """Definition of :func:`film_mlp`."""
    _, h, w, D = tokens.shape
    token, relative = nearest_token(coords.to(position_dtype(coords, x)), (h, w))  # [B, N], [B, N, 2]
    nearest = tokens.flatten(1, 2).gather(1, token.unsqueeze(-1).expand(-1, -1, D))  # [B, N, D]
    gamma, beta = film_gamma_beta(relative, freqs, position).chunk(2, dim=-1)  # [B, N, D] each
    modulated = (1 + gamma) * nearest + beta
    norm = weights.mlp.norm_weight, weights.mlp.norm_bias
    hidden = F.gelu(
        F.linear(F.layer_norm(modulated, (D,), *norm, LAYER_NORM_EPS), weights.mlp.weight1, weights.mlp.bias1)
    )  # [B, N, E]
    local = F.linear(hidden, weights.mlp.weight2, weights.mlp.bias2)  # [B, N, D]
    return x + F.layer_norm(local, (D,), weights.out_norm_weight, weights.out_norm_bias, LAYER_NORM_EPS)


def check_indices(table: Tensor, tokens: Tensor, row: Tensor, token: Tensor) -> None:
    """Check the indices of a table before a kernel follows them: on a GPU by an assertion there, so that nothing waits.

    Raises:
        InputError: an index of a CPU tensor is out of range.
    """
    for name, index, count in (
        ("row", row, table.shape[0]),
        ("token", token, tokens.shape[1] * tokens.shape[2]),
    ):
        if index.device.type != "cpu":
            index.new_empty(count).index_select(0, index)
        elif index.numel():
            low, high = (bound.item() for bound in index.aminmax())
            if low < 0 or high >= count:
                raise checks.expected(f"table.{name}", f"indices from 0 to {count - 1}", f"{low} to {high}")


class _Modulation(NamedTuple):
    """The modulated token and what its gradient needs."""

    modulated: Tensor  # [B, N, D]
    nearest: Tensor  # [B, N, D]
    token: Tensor  # [N] or [B, N]
    gamma_beta: Tensor  # [N, 2 D] or [B, N, 2 D]
    relative: Tensor | None  # [B, N, 2]
    code: Tensor | None  # [B, N, 2 + 4 F]


def _modulate(
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    position: tuple[Tensor | None, ...],
    table: Tensor | None,
    freqs: Tensor | None,
    row: Tensor | None,
    token: Tensor | None,
) -> _Modulation:
    """Gather each query's token and modulate it, from the table if there is one."""
    B, h, w, _ = tokens.shape
    flat = tokens.flatten(1, 2)  # [B, h * w, D]
    relative = code = None
    if table is not None:
        gamma_beta = table.index_select(0, row)  # [N, 2 D]
        nearest = flat.index_select(1, token)  # [B, N, D]
    else:
        token, relative = nearest_token(coords.to(position_dtype(coords, x)), (h, w))
        image = torch.arange(B, dtype=torch.int64, device=x.device).unsqueeze(-1) * (h * w)  # [B, 1]
        nearest = flat.flatten(0, 1).index_select(0, (image + token).flatten()).view(x.shape)
        code = position_code(relative, freqs).to(x.dtype)  # [B, N, 2 + 4 F]
        hidden = linear(code, position[0], position[1], gelu=True)  # [B, N, D]
        gamma_beta = linear(hidden, position[2], position[3])  # [B, N, 2 D]
    gamma, beta = gamma_beta.chunk(2, dim=-1)
    wide = nearest.to(gamma_beta.dtype)
    return _Modulation(
        torch.addcmul(wide + beta, wide, gamma).to(x.dtype), nearest, token, gamma_beta, relative, code
    )


def _forward(
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    position_weight1: Tensor | None,
    position_bias1: Tensor | None,
    position_weight2: Tensor | None,
    position_bias2: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    table: Tensor | None,
    freqs: Tensor | None,
    row: Tensor | None,
    token: Tensor | None,
) -> Tensor:
    if table is not None:
        check_indices(table, tokens, row, token)
    position = (position_weight1, position_bias1, position_weight2, position_bias2)
    modulated = _modulate(x, coords, tokens, position, table, freqs, row, token).modulated
    local = mlp(modulated, MLPWeights(norm_weight, norm_bias, weight1, bias1, weight2, bias2))
    return x + layer_norm(local, out_norm_weight, out_norm_bias)


def _backward(
    grad: Tensor,
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    position_weight1: Tensor | None,
    position_bias1: Tensor | None,
    position_weight2: Tensor | None,
    position_bias2: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    table: Tensor | None,
    freqs: Tensor | None,
    row: Tensor | None,
    token: Tensor | None,
    needs_grad: list[bool],
) -> list[Tensor]:
    needs_x, needs_coords, needs_tokens, *needs = needs_grad
    needs_position, needs_mlp, needs_out_norm, needs_table = needs[:4], needs[4:10], needs[10:12], needs[12]
    needs_gamma_beta = needs_coords or any(needs_position) or needs_table
    position = (position_weight1, position_bias1, position_weight2, position_bias2)
    weights = MLPWeights(norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    m = _modulate(x, coords, tokens, position, table, freqs, row, token)

    local = mlp(m.modulated, weights)
    grad_local, *grads_out_norm = layer_norm_backward(grad, local, out_norm_weight, (True, *needs_out_norm))
    needs_modulated = needs_tokens or needs_gamma_beta
    grad_modulated, *grads_mlp = mlp_backward(grad_local, m.modulated, weights, (needs_modulated, *needs_mlp))

    grad_coords = grad_tokens = grad_table = None
    grads_position = (None,) * 4
    if needs_tokens:
        B, h, w, D = tokens.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        image = torch.arange(B, dtype=torch.int64, device=x.device).unsqueeze(-1) * (h * w)  # [B, 1]
        grad_nearest = grad_modulated.to(wide) * (1 + m.gamma_beta[..., :D].to(wide))  # [B, N, D]
        total = torch.zeros(B * h * w, D, dtype=wide, device=x.device)
        total.index_add_(0, (image + m.token).flatten(), grad_nearest.flatten(0, 1))
        grad_tokens = total.view(tokens.shape).to(tokens.dtype)
    if needs_gamma_beta:
        grad_gamma_beta = torch.cat((grad_modulated * m.nearest, grad_modulated), dim=-1)  # [B, N, 2 D]
        if table is not None:
            wide = torch.promote_types(table.dtype, torch.float32)
            grad_table = torch.zeros(table.shape, dtype=wide, device=x.device)
            grad_table = grad_table.index_add_(0, row, grad_gamma_beta.to(wide).sum(0)).to(table.dtype)
        else:
            grad_code, *grads_position = two_layers_backward(
                grad_gamma_beta, m.code, *position, needs_coords, needs_position
            )
    if needs_coords:
        grad_coords = position_code_backward(grad_code, m.relative, freqs, tokens.shape[1:3]).to(coords.dtype)

    grad_x = grad.clone() if needs_x else None
    grads = (grad_x, grad_coords, grad_tokens, *grads_position, *grads_mlp, *grads_out_norm, grad_table)
    return [g.contiguous() for g, needed in zip(grads, needs_grad, strict=True) if needed]


def position_code_backward(
    grad_code: Tensor,  # [B, N, 2 + 4 F]
    relative: Tensor,  # [B, N, 2]
    freqs: Tensor,  # [F]
    token_grid: tuple[int, int],
) -> Tensor:
    """Gradient of the position code for coordinates in [0, 1].  # [B, N, 2]"""
    bands = freqs.shape[0]
    frequency = freqs.to(relative.dtype) * math.pi
    angles = relative.unsqueeze(-1) * frequency  # [B, N, 2, F]
    direct, grad_sin, grad_cos = grad_code.to(relative.dtype).split((2, 2 * bands, 2 * bands), dim=-1)
    grad_sin, grad_cos = grad_sin.unflatten(-1, (2, bands)), grad_cos.unflatten(-1, (2, bands))
    grad_angles = grad_sin * torch.cos(angles) - grad_cos * torch.sin(angles)
    grad_relative = direct + (grad_angles * frequency).sum(-1)  # [B, N, 2]
    h, w = token_grid
    return torch.stack((grad_relative[..., 0] * w, grad_relative[..., 1] * h), dim=-1)


_operator = Operator(
    "film_mlp",
    "Tensor x, Tensor? coords, Tensor tokens, "
    "Tensor? position_weight1, Tensor? position_bias1, Tensor? position_weight2, Tensor? position_bias2, "
    "Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor out_norm_weight, Tensor out_norm_bias, Tensor? table, Tensor? freqs, Tensor? row, Tensor? token",
    differentiable=16,
    output_shape=lambda x, *_: x.shape,
    torch_kernels=Kernels(_forward, _backward),
    residual=True,
)


def film_mlp(
    x: Tensor,  # [B, N, D]
    coords: Tensor,  # [B, N, 2]
    tokens: Tensor,  # [B, h, w, D]
    freqs: Tensor,  # [F]
    position: PositionWeights,
    weights: FilmWeights,
    *,
    table: FilmTable | None = None,
    impl: str = "auto",
) -> Tensor:  # [B, N, D]
    """Add the MLP of each query's nearest token, modulated by the query's position in that token's cell.

    Args:
        x: query states, any floating dtype.
        coords: (x, y) in [0, 1], float32 or float64; position codes are computed in float32 or better.
        tokens: hidden states after LNin.
        freqs: frequencies of the position code, taken as float32 numbers; a constant: no gradient flows to it.
        position: MLP from position code to ``[gamma, beta]``, in the dtype of ``x``.
        weights: MLP and output LayerNorm, in the dtype of ``x``.
        table: for queries on a regular grid, the same for every image; then ``coords`` and ``position`` are not
            read, and gradients for them flow through ``table.gamma_beta``. Not used by ``"reference"``. An index out
            of range is an error, on a GPU the device-side assertion that PyTorch's own indexing makes.
        impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

    Returns:
        New query states in the dtype of ``x``; differentiable for ``x``, ``coords``, ``tokens``, every weight and
        the table.

    Raises:
        InputError: wrong shape, dtype or device, or an ``impl`` that cannot run.
    """
    checks.check_features("x", x, "(B, N, D)")
    checks.check_coords(coords, *x.shape[:2])
    checks.check_device("coords", coords, x)
    x, tokens, *cast = autocast(x, tokens, *position, *weights.mlp, *weights[1:])
    position, mlp_weights, out_norm = PositionWeights(*cast[:4]), MLPWeights(*cast[4:10]), cast[10:]
    B, N, D = x.shape
    checks.check_features("tokens", tokens, "(B, h, w, D)", D)
    checks.check_weight("tokens", tokens, (B, *tokens.shape[1:3], D), x)
    if 0 in tokens.shape[1:3]:
        raise checks.expected("tokens", "at least one token", tuple(tokens.shape))
    freqs = checks.check_frequencies("freqs", freqs, x)
    code = 2 + 4 * freqs.shape[0]
    for field, weight, shape in zip(
        PositionWeights._fields, position, ((D, code), (D,), (2 * D, D), (2 * D,)), strict=True
    ):
        checks.check_weight(f"position.{field}", weight, shape, x)
    check_mlp("weights.mlp", mlp_weights, x)
    for field, weight in zip(FilmWeights._fields[1:], out_norm, strict=True):
        checks.check_weight(f"weights.{field}", weight, (D,), x)
    widths = {"the width D": D, "the hidden width": mlp_weights.weight1.shape[0]}
    tensors = (coords, tokens, *position, *mlp_weights, *out_norm)
    impl = resolve(impl, x, widths, operation="film_mlp", tensors=tensors)
    if impl == "reference":
        weights = FilmWeights(mlp_weights, *out_norm)
        return run_reference(film_mlp_reference, x, coords, tokens, freqs, position, weights)
    if table is None:
        return _operator(
            x, coords, tokens, *position, *mlp_weights, *out_norm, None, freqs, None, None, impl=impl
        )
    checks.check_features("table.gamma_beta", table.gamma_beta, "(R, 2 * D)", 2 * D)
    checks.check_device("table.gamma_beta", table.gamma_beta, x)
    for field, index in (("row", table.row), ("token", table.token)):
        checks.check_tensor(f"table.{field}", index, (N,))
        checks.check_device(f"table.{field}", index, x)
        if tuple(index.shape) != (N,) or index.dtype != torch.int64:
            raise checks.expected(f"table.{field}", f"({N},) int64", f"{tuple(index.shape)} {index.dtype}")
    return _operator(
        x,
        None,
        tokens,
        *(None,) * 4,
        *mlp_weights,
        *out_norm,
        table.gamma_beta,
        None,
        table.row,
        table.token,
        impl=impl,
    )
