"""Continuous coordinates: nearest token, position code and rotary angles, always in float32 or better.

Everything here is plain differentiable PyTorch and part of the definition (ViT-Up, arXiv 2606.14024): positions are
in units of one token, ``(x * w, y * h)``, and token (row, col) has its centre at ``(col + 0.5, row + 0.5)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def position_dtype(coords: Tensor, features: Tensor) -> torch.dtype:
    """Dtype in which positions are computed: that of the coordinates, or float64 if the features have it."""
    return torch.promote_types(coords.dtype, features.dtype)


def token_positions(coords: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Convert coordinates in [0, 1] to token units; ``[..., 2] -> [..., 2]``."""
    h, w = token_grid
    return torch.stack((coords[..., 0] * w, coords[..., 1] * h), dim=-1)


def nearest_token(coords: Tensor, token_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Find the token nearest to each query, and the query's position relative to that token's centre.

    Ties go to the even index. The relative position is not clamped: outside the image it exceeds one half.
    A NaN coordinate gets token 0 and a NaN relative position. By definition, as with the rotary frequencies, the
    token centres ``(col + 0.5) / w`` are float32 numbers, widened where the rest is float64.

    Args:
        coords: (x, y) in [0, 1].  # [..., 2]
        token_grid: rows and columns of the tokens, (h, w).

    Returns:
        Flat token index ``row * w + col`` (int64) ``[...]`` and relative position in token units ``[..., 2]``.
    """
    h, w = token_grid
    nearest = torch.round(token_positions(coords.detach(), token_grid) - 0.5).nan_to_num(0.0)  # [..., 2]
    col = nearest[..., 0].clamp(0, w - 1).float()  # [...]
    row = nearest[..., 1].clamp(0, h - 1).float()  # [...]
    centre = torch.stack(((col + 0.5) / w, (row + 0.5) / h), dim=-1).to(coords.dtype)
    relative = token_positions(coords - centre, token_grid)  # [..., 2]
    return row.long() * w + col.long(), relative


def position_code(relative: Tensor, freqs: Tensor) -> Tensor:
    """Encode relative positions as ``[rx, ry, sin x, sin y, cos x, cos y]``; ``[..., 2] -> [..., 2 + 4 F]``.

    Args:
        relative: relative position in token units.  # [..., 2]
        freqs: frequencies f of the bands; angles are ``pi * r * f``.  # [F]
    """
    angles = (relative.unsqueeze(-1) * freqs.to(relative.dtype) * math.pi).flatten(-2)  # [..., 2 F]
    return torch.cat((relative, torch.sin(angles), torch.cos(angles)), dim=-1)


def rope_inv_freq(head_dim: int, base: float) -> Tensor:
    """Rotary frequencies of one axis: by definition these float32 numbers, computed on the CPU."""
    n = head_dim // 4
    return 1.0 / (base ** (torch.arange(n, dtype=torch.float32, device="cpu") / n))  # [d / 4]


def rope_angles(position: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles of the d/2 channel pairs of a head, first half from x, second from y.

    Args:
        position: positions in token units.  # [..., 2]
        inv_freq: frequencies of one axis.  # [d / 4]

    Returns:
        Angles in radians.  # [..., d / 2]
    """
    return (position.unsqueeze(-1) * inv_freq.to(position.dtype) * (2 * math.pi)).flatten(-2)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs (2k, 2k+1) by angle k, computed in the angles' dtype; ``[..., d] -> [..., d]``.

    Args:
        x: channels of one head.  # [..., d]
        angles: radians, broadcastable against the leading sizes of ``x``.  # [..., d / 2]
    """
    a, b = x.to(angles.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # [..., d / 2] each
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_complex(x: Tensor, angles: Tensor) -> Tensor:
    """Do what :func:`rotate_pairs` does, as one complex product, for which ``torch.compile`` makes no code."""
    pairs = torch.view_as_complex(x.to(angles.dtype).unflatten(-1, (-1, 2)).contiguous())  # [..., d / 2]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


def token_centres(token_grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres of all tokens in token units, row by row.  # [h * w, 2]"""
    h, w = token_grid
    rows = torch.arange(h, dtype=dtype, device=device) + 0.5
    cols = torch.arange(w, dtype=dtype, device=device) + 0.5
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)
