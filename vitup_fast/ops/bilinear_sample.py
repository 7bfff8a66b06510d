"""Bilinear sampling of a grid of features at continuous coordinates: the start of every query.

ViT-Up, arXiv 2606.14024. ``align_corners=False`` with border clamping: pixel position
``x * Q - 0.5``, clamped to [0, Q - 1] before interpolating, the same for rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .coordinates import position_dtype
from .implementations import resolve
from .memory import zeros_of_few_writes
from .operator import Kernels, Operator, autocast, run_reference


def bilinear_sample_reference(grid: Tensor, coords: Tensor) -> Tensor:
    """Definition of :func:`bilinear_sample`."""
    B, P, Q, _ = grid.shape
    position = coords.to(position_dtype(coords, grid))  # [B, N, 2]
    x = (position[..., 0] * Q - 0.5).clamp(0, Q - 1)  # [B, N]
    y = (position[..., 1] * P - 0.5).clamp(0, P - 1)
    x0, y0 = x.detach().nan_to_num(0.0).floor(), y.detach().nan_to_num(0.0).floor()
    fx, fy = (x - x0).unsqueeze(-1), (y - y0).unsqueeze(-1)  # [B, N, 1]
    left, top = x0.long(), y0.long()
    right, bottom = (left + 1).clamp(max=Q - 1), (top + 1).clamp(max=P - 1)
    image = torch.arange(B, dtype=torch.int64, device=grid.device).unsqueeze(-1)  # [B, 1]
    sampled = (1 - fy) * ((1 - fx) * grid[image, top, left] + fx * grid[image, top, right]) + fy * (
        (1 - fx) * grid[image, bottom, left] + fx * grid[image, bottom, right]
    )
    return sampled.to(grid.dtype)  # [B, N, D]


def _corners(grid: Tensor, coords: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat indices of the four corners [4, B * N], weights of right and bottom, and which axes move."""
    B, P, Q, _ = grid.shape
    size = torch.tensor((Q, P), dtype=torch.int64, device=coords.device)
    position = coords.to(position_dtype(coords, grid)) * size - 0.5  # [B, N, 2]
    inside = (position >= 0) & (position <= size - 1)
    position = torch.minimum(position.clamp_min(0), (size - 1).to(position.dtype))
    first = position.nan_to_num(0.0).floor()
    fraction = position - first  # [B, N, 2]
    (left, top), (right, bottom) = (
        first.long().unbind(-1),
        torch.minimum(first.long() + 1, size - 1).unbind(-1),
    )
    image = torch.arange(B, dtype=torch.int64, device=grid.device).unsqueeze(-1) * (P * Q)  # [B, 1]
    indices = torch.stack(
        (
            image + top * Q + left,
            image + top * Q + right,
            image + bottom * Q + left,
            image + bottom * Q + right,
        )
    ).flatten(1)
    return indices, fraction.flatten(0, 1)[:, :1], fraction.flatten(0, 1)[:, 1:], inside


def _forward(grid: Tensor, coords: Tensor) -> Tensor:
    indices, fx, fy, _ = _corners(grid, coords)
    wide = fx.dtype
    rows = grid.reshape(-1, grid.shape[-1])
    top = torch.lerp(rows[indices[0]].to(wide), rows[indices[1]].to(wide), fx)  # [B * N, D]
    bottom = torch.lerp(rows[indices[2]].to(wide), rows[indices[3]].to(wide), fx)
    return torch.lerp(top, bottom, fy).to(grid.dtype).view(*coords.shape[:2], grid.shape[-1])


def torch_backward(grad: Tensor, grid: Tensor, coords: Tensor, needs_grad: list[bool]) -> list[Tensor]:
    """Gradients for grid and coordinates, by PyTorch."""
    B, P, Q, D = grid.shape
    indices, fx, fy, inside = _corners(grid, coords)
    grads = []
    g = grad.reshape(-1, D).to(fx.dtype)  # [B * N, D]
    if needs_grad[0]:
        weights = torch.stack(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy))  # [4, B * N, 1]
        # Where few cells were read only these are summed, and widely: a fine grid is large.
        few = indices.numel() < B * P * Q and (grid.device.type == "cpu" or g.dtype != grid.dtype)
        cells, places = indices.unique(return_inverse=True) if few else (None, indices)
        total = g.new_zeros(len(cells) if few else B * P * Q, D)
        for place, weight in zip(places, weights, strict=True):
            total.index_add_(0, place, g * weight)
        total = total.to(grid.dtype)
        if few:
            total = zeros_of_few_writes(total, (B * P * Q, D)).index_copy_(0, cells, total)
        grads.append(total.view(B, P, Q, D))
    if needs_grad[1]:
        rows = grid.reshape(-1, D)
        # <grad, corner> per query; the derivative is a difference of these four numbers.
        tl, tr, bl, br = ((g * rows[i].to(g.dtype)).sum(-1, keepdim=True) for i in indices)  # [B * N, 1]
        along_x = ((tr - tl) * (1 - fy) + (br - bl) * fy) * Q
        along_y = ((bl - tl) * (1 - fx) + (br - tr) * fx) * P
        along = torch.cat((along_x, along_y), dim=-1).view(coords.shape)
        grads.append(torch.where(inside, along, 0).to(coords.dtype))
    return grads


_operator = Operator(
    "bilinear_sample",
    "Tensor grid, Tensor coords",
    differentiable=2,
    output_shape=lambda grid, coords: (*coords.shape[:2], grid.shape[-1]),
    torch_kernels=Kernels(_forward, torch_backward),
)


def bilinear_sample(
    grid: Tensor,  # [B, P, Q, D]
    coords: Tensor,  # [B, N, 2]
    *,
    impl: str = "auto",
) -> Tensor:  # [B, N, D]
    """Sample a grid of features at continuous coordinates, bilinearly, clamped at the border.

    Args:
        grid: features, any floating dtype.
        coords: (x, y) in [0, 1] over the image, x to the right, float32 or float64. A NaN stays in its row.
        impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

    Returns:
        Sampled features in the dtype of ``grid``; differentiable for ``grid`` and ``coords``.

    Raises:
        InputError: wrong shape, dtype or device, or an ``impl`` that cannot run.
    """
    checks.check_features("grid", grid, "(B, P, Q, D)")
    if 0 in grid.shape[1:]:
        raise checks.expected("grid", "no empty axis but the batch", tuple(grid.shape))
    checks.check_coords(coords, batch=grid.shape[0])
    checks.check_device("coords", coords, grid)
    (grid,) = autocast(grid)
    impl = resolve(
        impl, grid, {"the width D": grid.shape[-1]}, operation="bilinear_sample", tensors=(coords,)
    )
    if impl == "reference":
        return run_reference(bilinear_sample_reference, grid, coords)
    return _operator(grid, coords, impl=impl)
