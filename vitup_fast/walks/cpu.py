"""The walk by compiled kernels for CPUs: packed weights, and one state that every kernel changes in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.cpu.bilinear_sample import bilinear_sample
from ..kernels.cpu.context import Context, Held, smallest_scratch
from ..kernels.cpu.film_mlp import Film, film_mlp_at, film_mlp_from_table, pack_position
from ..kernels.cpu.norm_linear import norm_linear
from ..kernels.cpu.project_image import Projection, project_image
from ..kernels.cpu.residual_mlp import pack_mlp, residual_mlp
from ..kernels.cpu.rope_cross_attention import Attention, pack_attention, pack_image, rope_cross_attention
from ..network.image_cache import ImageCache
from ..network.weights import (
    EVERY_VALUE_QUERIES,
    BlockWeights,
    DecoderWeights,
    Look,
    NetworkWeights,
    Snapshot,
)
from .plan import Spans
from .walk import Chunk, Decoding, Settings, Step, Walk, plain_modes


class _Block(NamedTuple):
    """Packed parameters of one block."""

    transition: Held
    attention: Attention
    film: Film
    mlp: Held
    image: Projection

    @classmethod
    def pack(cls, context: Context, weights: BlockWeights) -> _Block:
        """Pack the parameters of one block."""
        image, film = weights.image, weights.film
        return cls(
            pack_mlp(context, weights.transition),
            pack_attention(context, weights.attention),
            Film(
                pack_position(context, weights.position),
                pack_mlp(context, film.mlp),
                context.norm(film.out_norm_weight, film.out_norm_bias),
            ),
            pack_mlp(context, weights.mlp),
            Projection(
                context.norm(image.norm_weight, image.norm_bias),
                context.matrix(image.key_weight, image.key_bias),
                context.matrix(image.value_weight, image.value_bias),
                context.norm(image.token_norm_weight, image.token_norm_bias),
            ),
        )


class _PackedImages(NamedTuple):
    """Keys and values of all images, packed, and what they were packed from."""

    keys: list[Tensor]  # [B * Hh, words] per block
    values: list[Tensor]  # [B * Hh, words] per block
    source: Snapshot


class CpuWalk(Walk):
    """Takes a tile of queries through an operation in one core's cache; safe for several threads."""

    remembered = True

    @classmethod
    def takes(cls, settings: Settings) -> bool:
        """See :meth:`Walk.takes`."""
        return settings.in_place and settings.implementation in ("cpu", "cpu_int8")

    @classmethod
    def query_bytes(cls, dim: int, dtype: torch.dtype) -> int:
        """See :meth:`Walk.query_bytes`: all but the query's state lies in the kernels' scratch."""
        return 2 * dim * dtype.itemsize

    @classmethod
    def least_scratch(cls, dim: int, bands: int) -> int:
        """See :meth:`Walk.least_scratch`."""
        return smallest_scratch(dim, bands)

    def __init__(self, weights: NetworkWeights, settings: Settings) -> None:
        self.dim, self.dtype, self.heads = weights.decoders[0].weight.shape[1], settings.dtype, settings.heads
        self.int8 = settings.implementation == "cpu_int8"
        self.width = max(self.dim, 2 + 4 * weights.freqs.shape[0])
        with plain_modes(weights.freqs.device):
            weights = weights.map(lambda t: t.detach().to(self.dtype))
            self.inv_freq, self.freqs = (
                t.detach().float().contiguous().clone() for t in (weights.inv_freq, weights.freqs)
            )
            context = self._context()
            self.blocks = [_Block.pack(context, block) for block in weights.blocks]
            self.decoders = [self._pack_decoder(context, decoder) for decoder in weights.decoders]
        self._images: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def project(self, hidden_states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """See :meth:`Walk.project`."""
        with plain_modes(hidden_states[0].device):
            context = self._context()
            projected = [
                project_image(context, hidden.contiguous(), block.image, self.inv_freq, self.heads)
                for hidden, block in zip(hidden_states, self.blocks, strict=True)
            ]
        keys, values, tokens = zip(*projected, strict=True)
        return keys, values, tokens

    def begin(
        self,
        cache: ImageCache,
        decoding: Decoding,
        spans: Spans,
        groups: Sequence[slice],
        scratch_bytes: int | None,
    ) -> Step:
        """See :meth:`Walk.begin`."""
        with plain_modes(cache.patch_grid.device):
            cache = cache.to(self.dtype)
            context = self._context(scratch_bytes)
            many = spans.lines * spans.length * cache.batch_size >= EVERY_VALUE_QUERIES
            images = self._packed(context, cache, Look.EVERY_VALUE if many else Look.NONE)
            decoders = {depth: self.decoders[depth] for depth in decoding.depths}
            if decoding.head is not None:
                last = decoding.depths[-1]
                matrix, bias = (t.detach().to(self.dtype) for t in decoding.head)
                decoders[last] = decoders[last][0], context.matrix(matrix, bias)
            rows = spans.longest * max(g.stop - g.start for g in groups)
            states = torch.empty(rows, self.dim, dtype=self.dtype, device="cpu")

        def step(chunk: Chunk, out: Sequence[Tensor]) -> Sequence[Tensor]:
            with plain_modes(cache.patch_grid.device):
                self._walk(
                    context, images, cache, chunk, states, decoders, dict(zip(decoders, out, strict=True))
                )
            return out

        return step

    def _context(self, max_bytes: int | None = None) -> Context:
        """Threads and scratch for this network, of which all threads' may take ``max_bytes``."""
        return Context(self.dtype, self.width, int8=self.int8, max_bytes=max_bytes, keep=True)

    @staticmethod
    def _pack_decoder(context: Context, decoder: DecoderWeights) -> tuple[Held, Held]:
        """Pack the parameters of a decoder."""
        return context.norm(*decoder[:2]), context.matrix(*decoder[2:])

    def _packed(self, context: Context, cache: ImageCache, look: Look) -> _PackedImages:
        """Keys and values of a cache, packed at its first use."""
        source = (*cache.keys, *cache.values)
        known = self._images.get(source[0])
        if known is None or not known.source.holds(source, look):
            pairs = [pack_image(context, *pair) for pair in zip(cache.keys, cache.values, strict=True)]
            keys, values = (list(tensors) for tensors in zip(*pairs, strict=True))
            known = self._images[source[0]] = _PackedImages(keys, values, Snapshot(source, checksums=True))
        return known

    def _walk(
        self,
        context: Context,
        images: _PackedImages,
        cache: ImageCache,
        chunk: Chunk,
        states: Tensor,  # [rows, D]
        decoders: dict[int, tuple[Held, Held]],
        outputs: dict[int, Tensor],  # [b, n, E] or [b, n] each
    ) -> None:
        """Walk one chunk and decode it into ``outputs``."""
        group, (coords, tables, _) = chunk
        b, n, _ = coords.shape
        coords = coords.contiguous()
        state = states[: b * n].view(b, n, self.dim)
        token_grid, first = cache.token_grid, group.start * self.heads

        def decode(depth: int) -> None:
            if depth not in decoders:
                return
            output, (norm, matrix) = outputs[depth], decoders[depth]
            if output.dtype.is_floating_point:
                norm_linear(context, state, norm, matrix, output)
            else:
                scores = torch.empty(b, n, len(matrix.tensors[1]), dtype=self.dtype, device="cpu")
                norm_linear(context, state, norm, matrix, scores)
                output.copy_(scores.argmax(-1))

        bilinear_sample(context, cache.patch_grid[group].contiguous(), coords, state)
        decode(0)
        steps = zip(self.blocks, images.keys, images.values, cache.tokens, tables, strict=True)
        for depth, (block, key, value, tokens, table) in enumerate(steps, start=1):
            residual_mlp(context, state, block.transition, state)
            addresses = key[first].data_ptr(), value[first].data_ptr()
            attended = (block.attention, self.inv_freq, self.heads, token_grid)
            rope_cross_attention(context, state, coords, *addresses, *attended, state)
            tokens = tokens[group].contiguous()
            if table is None:
                film_mlp_at(context, state, coords, tokens, block.film, self.freqs, state)
            else:
                gamma_beta, row, token = (t.contiguous() for t in table)
                film_mlp_from_table(context, state, tokens, gamma_beta, row, token, block.film, state)
            residual_mlp(context, state, block.mlp, state)
            decode(depth)
