"""Bilinear sampling on a CPU."""

from __future__ import annotations

from torch import Tensor

from ...ops.bilinear_sample import torch_backward
from .context import Context, coords_address


def bilinear_sample(context: Context, grid: Tensor, coords: Tensor, out: Tensor) -> None:
    """Sample ``grid`` ``[B, P, Q, D]`` at contiguous ``coords`` ``[B, N, 2]`` into ``out`` ``[B, N, D]``."""
    B, P, Q, D = grid.shape
    context.kernels.bilinear_sample(
        context.handle, grid.data_ptr(), *coords_address(coords), out.data_ptr(), B, coords.shape[1], P, Q, D
    )


def forward(int8: bool, grid: Tensor, coords: Tensor) -> Tensor:
    """Forward of the operator, which has no product that 8 bits could speed up."""
    grid, coords = grid.contiguous(), coords.contiguous()
    out = grid.new_empty(*coords.shape[:2], grid.shape[-1])
    bilinear_sample(Context(grid.dtype, grid.shape[-1]), grid, coords, out)
    return out


# Bound by memory: PyTorch does it as well.
backward = torch_backward
