"""Keys, values and LayerNormed tokens of an image on a CPU, from its hidden states."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .context import Context, Held


class Projection(NamedTuple):
    """Packed parameters of one block that the image alone passes through."""

    norm: Held
    key: Held
    value: Held
    token_norm: Held


def project_image(
    context: Context,
    hidden: Tensor,  # [B, h, w, D]
    projection: Projection,
    inv_freq: Tensor,  # [d / 4]
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (rotated) and values ``[B, Hh, h * w, d]``, and tokens ``[B, h, w, D]``, of contiguous hidden states."""
    B, h, w, D = hidden.shape
    key = hidden.new_empty(B, heads, h * w, D // heads)
    value, tokens = key.new_empty(key.shape), hidden.new_empty(hidden.shape)
    context.kernels.project_image(
        context.handle,
        hidden.data_ptr(),
        *(held.handle for held in projection[:3]),
        inv_freq.data_ptr(),
        projection.token_norm.handle,
        *(t.data_ptr() for t in (key, value, tokens)),
        *hidden.shape,
        heads,
    )
    return key, value, tokens
