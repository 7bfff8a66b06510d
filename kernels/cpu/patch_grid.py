"""Patches of an enlarged image on a CPU, interpolated straight into the operand of their embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...extension import load
from .context import Context


class Taps(NamedTuple):
    """Where targets of an axis lie between source pixels: lower pixel, upper pixel and weight of the upper one."""

    low: Tensor
    high: Tensor
    fraction: Tensor


class PatchEmbedder:
    """Embeds patches of images enlarged bilinearly.

    Args:
        images: of any dtype that kernels take, contiguous, ``[B, C, H, W]``; interpolated in float32.
        columns: of the patches' columns, ascending, ``[Q, patch]`` each.
        height: rows of pixels that a patch has, or sees.
        bias: ``[D]``.
        dtype: of operands and tokens.
    """

    def __init__(self, images: Tensor, columns: Taps, height: int, bias: Tensor, dtype: torch.dtype) -> None:
        self.images, self.columns, self.height = images, columns, height
        D, patch, depth = len(bias), columns.low.shape[1], height * images.shape[1]
        self.seen = int((columns.high[:, -1] - columns.low[:, 0]).max()) + 1
        rows = load().cpu.tile_rows(D)
        self.context = Context(
            dtype,
            D,
            keep=True,
            tile_rows=rows,
            scratch_bytes=load().cpu.embed_patches_scratch_bytes(D, patch, depth, self.seen, rows),
        )
        self.bias = self.context.vector(bias)

    def pack(self, kernels: Tensor) -> Tensor:
        """Pack the kernels of some phases, ``[F, patch * height * C, D]``."""
        return self.context.pack(kernels.mT)

    def embed(self, rows: Taps, packed: Tensor, out: Tensor) -> None:
        """Embed rows of patches, taps ``[F, R, height]``, into ``[F, B, R, Q, D]``, contiguous in the last two axes."""
        kernels = self.context.kernels
        kernels.embed_patches(
            self.context.handle,
            str(self.images.dtype).removeprefix("torch."),
            self.images.data_ptr(),
            *(kernels.Taps(*(t.data_ptr() for t in taps)) for taps in (rows, self.columns)),
            *(t.data_ptr() for t in (packed, self.bias, out)),
            *out.stride()[:3],
            len(out),
            *self.images.shape,
            *out.shape[2:4],
            self.height,
            self.columns.low.shape[1],
            out.shape[-1],
            self.seen,
        )
