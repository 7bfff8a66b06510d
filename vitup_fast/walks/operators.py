"""The walk operator by operator: any implementation, gradients, compilers and transforms of PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..network.image_cache import ImageCache
from ..network.weights import BlockWeights, NetworkWeights, recordable
from ..ops import (
    bilinear_sample,
    film_mlp,
    norm_linear,
    norm_linear_argmax,
    residual_mlp,
    rope_cross_attention,
)
from ..ops.coordinates import rope_angles, rotate_complex, rotate_pairs, token_centres
from ..ops.operator import inputs_alone
from ..ops.primitives import LAYER_NORM_EPS, pack
from .plan import Spans
from .walk import Chunk, Decoding, Settings, Step, Walk, plain_modes


class OperatorsWalk(Walk):
    """Calls the five operations one by one."""

    remembered = False

    @classmethod
    def takes(cls, settings: Settings) -> bool:
        """See :meth:`Walk.takes`: all of them."""
        return True

    @classmethod
    def query_bytes(cls, dim: int, dtype: torch.dtype) -> int:
        """See :meth:`Walk.query_bytes`: activations in ``dtype``, rotary parts in float32."""
        return dim * (13 * dtype.itemsize + 8)

    def __init__(self, weights: NetworkWeights, settings: Settings) -> None:
        self.weights, self.settings = weights, settings

    def project(self, hidden_states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """See :meth:`Walk.project`."""
        weights = self.weights
        if not self.settings.in_place:
            weights, hidden_states = weights.recordable(), [recordable(t) for t in hidden_states]
        return project(weights, hidden_states, self.settings)

    def begin(
        self,
        cache: ImageCache,
        decoding: Decoding,
        spans: Spans,
        groups: Sequence[slice],
        scratch_bytes: int | None,
    ) -> Step:
        """See :meth:`Walk.begin`."""
        weights, settings, impl = self.weights, self.settings, self.settings.impl
        if not settings.in_place:
            # Autograd saves no inference tensors.
            weights, cache = weights.recordable(), cache.map(recordable)
        decoders = decoding.decoders(weights)
        decode = norm_linear_argmax if decoding.labels else norm_linear
        caches = cache.split([group.stop - group.start for group in groups])

        def step(chunk: Chunk, out: Sequence[Tensor] | None) -> Sequence[Tensor]:
            images, (coords, tables, _) = caches[groups.index(chunk.images)], chunk.queries
            coords = coords if settings.in_place else recordable(coords)
            query = bilinear_sample(images.patch_grid, coords, impl=impl)  # [b, n, D]
            decoded = [decode(query, *decoders[0], impl=impl)] if 0 in decoders else []

            def advance(
                query: Tensor,
                depth: int,
                block: BlockWeights,
                key: Tensor,
                value: Tensor,
                tokens: Tensor,
                table: Any,
            ) -> tuple[Tensor, ...]:
                query = residual_mlp(query, block.transition, impl=impl)
                attended = (key, value, block.attention, weights.inv_freq, images.token_grid)
                query = rope_cross_attention(query, coords, *attended, impl=impl)
                local = (tokens, weights.freqs, block.position, block.film)
                query = film_mlp(query, coords, *local, table=table, impl=impl)
                query = residual_mlp(query, block.mlp, impl=impl)
                return query, *([decode(query, *decoders[depth], impl=impl)] if depth in decoders else [])

            blocks = zip(weights.blocks, images.keys, images.values, images.tokens, tables, strict=True)
            with inputs_alone() if settings.checkpoint == "op" else contextlib.nullcontext():
                for depth, image in enumerate(blocks, start=1):
                    if settings.checkpoint == "block" and not settings.in_place:
                        once = {"use_reentrant": False, "preserve_rng_state": False}
                        query, *layer = checkpoint(advance, query, depth, *image, **once)
                    else:
                        query, *layer = advance(query, depth, *image)
                    decoded += layer
            if out is None:
                return decoded
            for target, layer in zip(out, decoded, strict=True):
                target.copy_(layer)
            return out

        return step


class PackedOperatorsWalk(OperatorsWalk):
    """The same with matrices in the layout that PyTorch's products on a CPU want, as long as weights stay."""

    remembered = True

    @classmethod
    def takes(cls, settings: Settings) -> bool:
        """See :meth:`Walk.takes`."""
        return settings.in_place and settings.implementation == "torch" and settings.device.type == "cpu"

    def __init__(self, weights: NetworkWeights, settings: Settings) -> None:
        with plain_modes(settings.device):
            given = weights.map(lambda t: t.detach().to(settings.dtype))
            packed = given.map(lambda t: pack(t) if t.dim() == 2 else t)
            # An image's projections join keys and values, and happen once.
            blocks = [p._replace(image=g.image) for p, g in zip(packed.blocks, given.blocks, strict=True)]
        super().__init__(packed._replace(blocks=blocks), settings)


def project(
    weights: NetworkWeights, hidden_states: Sequence[Tensor], settings: Settings
) -> tuple[tuple[Tensor, ...], ...]:
    """Keys, values and tokens of every block by operators; see :meth:`Walk.project`."""
    _, h, w, D = hidden_states[0].shape
    wide = torch.promote_types(hidden_states[0].dtype, torch.float32)
    centres = token_centres((h, w), wide, hidden_states[0].device)
    angles = rope_angles(centres, weights.inv_freq).unsqueeze(1)  # [h * w, 1, d / 2]
    heads = (settings.heads, D // settings.heads)
    rotate = rotate_pairs if torch.compiler.is_compiling() else rotate_complex
    keys, values, tokens = [], [], []
    for block, hidden in zip(weights.blocks, hidden_states, strict=True):
        image = block.image
        weight = torch.cat((image.key_weight, image.value_weight))  # [2 D, D]
        bias = torch.cat((image.key_bias, image.value_bias))  # [2 D]
        norm = image.norm_weight, image.norm_bias
        both = norm_linear(hidden.flatten(1, 2), *norm, weight, bias, impl=settings.impl)  # [B, h * w, 2 D]
        key, value = both.chunk(2, dim=-1)  # [B, h * w, D] each
        key = rotate(key.unflatten(-1, heads), angles)  # [B, h * w, Hh, d]
        keys.append(key.transpose(1, 2).contiguous())
        values.append(value.unflatten(-1, heads).transpose(1, 2).contiguous())
        tokens.append(
            F.layer_norm(hidden, (D,), image.token_norm_weight, image.token_norm_bias, LAYER_NORM_EPS)
        )
    return tuple(keys), tuple(values), tuple(tokens)
