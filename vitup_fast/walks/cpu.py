"""The compiled kernels for CPUs as a network walks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.cpu.bilinear_sample import bilinear_sample
from ..kernels.cpu.context import Context, Held
from ..kernels.cpu.film_mlp import Film, film_mlp_at, film_mlp_from_table, pack_position
from ..kernels.cpu.norm_linear import norm_linear
from ..kernels.cpu.project_image import Projection, project_image
from ..kernels.cpu.residual_mlp import pack_mlp, residual_mlp
from ..kernels.cpu.rope_cross_attention import Attention, pack_attention, pack_image, rope_cross_attention
from .gpu import Source, version

if TYPE_CHECKING:
    from ..network.model import DecoderWeights, ImageCache, NetworkWeights
    from ..ops import FilmTable


class Block(NamedTuple):
    """Parameters of one block as the kernels take them."""

    transition: Held
    attention: Attention
    film: Film
    mlp: Held


class ImageWeights(NamedTuple):
    """Parameters of one block that the image alone passes through: LNh, Wk, bk, Wv, bv, LNin."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    key_weight: Tensor  # [D, D]
    key_bias: Tensor  # [D]
    value_weight: Tensor  # [D, D]
    value_bias: Tensor  # [D]
    token_norm_weight: Tensor  # [D]
    token_norm_bias: Tensor  # [D]


class PackedImage(NamedTuple):
    """Keys and values of all images, packed, and what they were packed from."""

    keys: list[Tensor]  # [B * Hh, words] per block
    values: list[Tensor]  # [B * Hh, words] per block
    versions: list[tuple[int, int]]


class CpuWorkspace(NamedTuple):
    """What a chunk of queries needs while it walks: its state is all that outlives a kernel."""

    context: Context
    state: Tensor  # [rows, D]
    image: PackedImage


class CpuScheduler:
    """Walks chunks of queries of one network; holds its packed weights. Safe for several threads.

    Args:
        weights: parameters of the network, in the compute type.
        images: per block, parameters for the image alone, in the compute type.
        heads: number of attention heads.
        inv_freq: rotary frequencies.
        freqs: frequencies of the position code.
        state: of the parameters that these come from.
        samples: a few numbers of these parameters.
        int8: whether products are computed in 8-bit integers.
    """

    def __init__(
        self,
        weights: NetworkWeights,
        images: Sequence[ImageWeights],
        heads: int,
        inv_freq: Tensor,
        freqs: Tensor,
        state: tuple[object, ...],
        samples: Tensor,
        int8: bool,
    ) -> None:
        weight = weights.decoders[0].weight
        self.dim, self.dtype, self.int8 = weight.shape[1], weight.dtype, int8
        self.heads = heads
        self.width = max(self.dim, 2 + 4 * freqs.shape[0])
        self.state, self.samples = state, samples
        self.inv_freq, self.freqs = inv_freq.float().contiguous(), freqs.float().contiguous()
        context = Context(self.dtype, self.width, int8=int8, keep=True)
        self.blocks = [
            Block(
                pack_mlp(context, block.transition),
                pack_attention(context, block.attention),
                Film(
                    pack_position(context, block.position),
                    pack_mlp(context, block.film.mlp),
                    context.norm(*block.film[1:]),
                ),
                pack_mlp(context, block.mlp),
            )
            for block in weights.blocks
        ]
        self.images = [
            Projection(
                context.norm(*image[:2]),
                context.matrix(*image[2:4]),
                context.matrix(*image[4:6]),
                context.norm(*image[6:]),
            )
            for image in images
        ]
        self.decoders = [self.fold_decoder(decoder) for decoder in weights.decoders]
        self._images: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def fold_decoder(self, decoder: DecoderWeights) -> tuple[Held, Held]:
        """Pack the parameters of a decoder."""
        context = Context(self.dtype, self.width, int8=self.int8, keep=True)
        return context.norm(*decoder[:2]), context.matrix(*decoder[2:])

    def project(
        self, hidden_states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys, values and tokens of every block, as an ImageCache holds them, from its hidden states."""
        context = Context(self.dtype, self.width, int8=self.int8, keep=True)
        projected = []
        for hidden, projection in zip(hidden_states, self.images, strict=True):
            key, value, tokens = project_image(
                context, hidden.contiguous(), projection, self.inv_freq, self.heads
            )
            projected.append((key, value, tokens))
        keys, values, tokens = zip(*projected, strict=True)
        return keys, values, tokens

    def workspace(self, rows: int, cache: ImageCache, max_bytes: int | None = None) -> CpuWorkspace:
        """Memory for chunks of ``rows`` queries of these images, of which the scratch takes at most ``max_bytes``."""
        context = Context(self.dtype, self.width, int8=self.int8, max_bytes=max_bytes, keep=True)
        state = torch.empty(rows, self.dim, dtype=self.dtype)
        return CpuWorkspace(context, state, self._packed(context, cache))

    def _packed(self, context: Context, cache: ImageCache) -> PackedImage:
        """Keys and values of a cache, packed at its first use."""
        versions = [(t.data_ptr(), version(t)) for t in (*cache.keys, *cache.values)]
        known = self._images.get(cache.keys[0])
        if known is None or known.versions != versions:
            packed = [pack_image(context, *pair) for pair in zip(cache.keys, cache.values, strict=True)]
            known = PackedImage(*(list(tensors) for tensors in zip(*packed, strict=True)), versions)
            self._images[cache.keys[0]] = known
        return known

    def walk(
        self,
        cache: ImageCache,
        coords: Tensor,  # [b, n, 2]
        tables: Sequence[FilmTable | None],
        decoders: Mapping[int, tuple[Held, Held]],
        outputs: Mapping[int, Tensor],  # [b, n, E] or [b, n] each
        memory: CpuWorkspace,
        source: Source,
    ) -> None:
        """Walk one chunk of queries and decode it into ``outputs``.

        Args:
            cache: the images of the chunk, in the compute type.
            coords: where the queries are.
            tables: per block, for queries of a grid.
            decoders: decoders of the depths asked for.
            outputs: per depth, where scores go, or labels: an integer dtype asks for the argmax.
            memory: from :meth:`workspace`.
            source: which images of the workspace's the chunk reads.
        """
        context, image = memory.context, memory.image
        b, n, _ = coords.shape
        coords = coords.contiguous()
        state = memory.state[: b * n].view(b, n, self.dim)
        heads, token_grid = cache.keys[0].shape[1], cache.token_grid
        first = source.images.start * heads

        def decode(depth: int) -> None:
            if depth not in decoders:
                return
            output, (norm, matrix) = outputs[depth], decoders[depth]
            if output.dtype.is_floating_point:
                norm_linear(context, state, norm, matrix, output)
            else:
                scores = torch.empty(b, n, len(matrix.tensors[1]), dtype=self.dtype)
                norm_linear(context, state, norm, matrix, scores)
                output.copy_(scores.argmax(-1))

        bilinear_sample(context, cache.patch_grid.contiguous(), coords, state)
        decode(0)
        steps = zip(self.blocks, image.keys, image.values, cache.tokens, tables, strict=True)
        for depth, (block, key, value, tokens, table) in enumerate(steps, start=1):
            residual_mlp(context, state, block.transition, state)
            addresses = key[first].data_ptr(), value[first].data_ptr()
            rope_cross_attention(
                context, state, coords, *addresses, block.attention, self.inv_freq, heads, token_grid, state
            )
            tokens = tokens.contiguous()
            if table is None:
                film_mlp_at(context, state, coords, tokens, block.film, self.freqs, state)
            else:
                gamma_beta, row, token = (t.contiguous() for t in table)
                film_mlp_from_table(context, state, tokens, gamma_beta, row, token, block.film, state)
            residual_mlp(context, state, block.mlp, state)
            decode(depth)
