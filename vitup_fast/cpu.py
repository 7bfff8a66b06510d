"""The compiled kernels for CPUs, as operators and as a network walk them: addresses, packed weights and scratch.

Each kernel takes a tile of queries through a whole operation in one core's cache. Weights are packed for the
instruction set at hand: on every call of an operator, once for a network (:class:`CpuScheduler`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .config import LAYER_NORM_EPS
from .extension import load
from .ops.bilinear_sample import torch_backward as bilinear_sample_backward
from .ops.film_mlp import MLPPasses
from .ops.film_mlp import backward_by as film_backward_by
from .ops.norm_linear import torch_backward as norm_linear_torch_backward
from .ops.primitives import MLPWeights
from .ops.rope_cross_attention import AttentionPass, AttentionWeights
from .ops.rope_cross_attention import backward_by as attention_backward_by
from .schedule import Source, version

if TYPE_CHECKING:
    from .model import DecoderWeights, ImageCache, NetworkWeights
    from .ops import FilmTable


class Held(NamedTuple):
    """Arguments of a kernel, and the tensors whose memory they point to."""

    handle: Any
    tensors: tuple[Tensor, ...]


class _Arena(threading.local):
    """Memory that one call of an operator after the other uses, in each thread its own.

    Fresh memory costs a page fault for every 4 KiB, together as long as a small kernel takes.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.used = self.wanted = 0

    def begin(self) -> None:
        """Begin a call: what earlier calls took is free again."""
        size = min(self.wanted, ARENA_BYTES)
        if self.memory.nbytes < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        self.used = self.wanted = 0

    def take(self, size: int) -> Tensor:
        """Memory from the start of a cache line on, for this call alone."""
        size = -(-size // 64) * 64 + 64
        start = self.used
        self.wanted += size
        if start + size > self.memory.nbytes:
            return _aligned(torch.empty(size, dtype=torch.uint8))
        self.used += size
        return _aligned(self.memory[start : self.used])


def _aligned(memory: Tensor) -> Tensor:
    """Drop the bytes before the first whole cache line."""
    return memory[-memory.data_ptr() % 64 :]


_arena = _Arena()
# Most that a thread keeps for its next call of an operator.
ARENA_BYTES = 64 << 20


class Context:
    """Threads, scratch and number format of the kernels for rows of one dtype and width.

    Args:
        dtype: float32, bfloat16 or float16.
        width: the widest rows, in channels.
        int8: whether products are computed in 8-bit integers.
        max_bytes: most that the scratch of all threads may take; fewer threads and shorter tiles if need be.
        keep: whether packed weights outlive the call of an operator that this context is for.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        width: int,
        *,
        int8: bool = False,
        max_bytes: int | None = None,
        keep: bool = False,
    ) -> None:
        cpu = self.kernels = load().cpu
        self.dtype, self.int8, self.keep = dtype, int8, keep
        if not keep:
            _arena.begin()
        threads, rows = torch.get_num_threads(), cpu.tile_rows(width)
        if max_bytes is not None:
            while threads > 1 and threads * cpu.scratch_bytes(width, SHORTEST_TILE) + 64 > max_bytes:
                threads -= 1
            while rows > SHORTEST_TILE and threads * cpu.scratch_bytes(width, rows) + 64 > max_bytes:
                rows -= SHORTEST_TILE
        per_thread = cpu.scratch_bytes(width, rows)
        self.scratch = self._take(threads * per_thread)
        start = self.scratch.data_ptr()
        self.name = str(dtype).removeprefix("torch.")
        self.handle = cpu.Context(self.name, int8, threads, rows, start, per_thread)
        self.native = cpu.Context(self.name, False, threads, rows, start, per_thread)

    def _take(self, size: int) -> Tensor:
        """Memory of ``size`` bytes or a little more."""
        return _aligned(torch.empty(size + 64, dtype=torch.uint8)) if self.keep else _arena.take(size)

    def vector(self, values: Tensor) -> Tensor:
        """A vector of parameters as kernels take it."""
        return values.detach().float().contiguous()

    def norm(self, weight: Tensor, bias: Tensor) -> Held:
        """Parameters of a LayerNorm; ``[D]`` each."""
        tensors = self.vector(weight), self.vector(bias)
        return Held(self.kernels.Norm(*(t.data_ptr() for t in tensors), LAYER_NORM_EPS), tensors)

    def pack(self, matrices: Tensor, *, int8: bool = False) -> Tensor:
        """Pack matrices of any strides, ``[..., N, K]`` with at most one leading axis that is no matrix of its own."""
        *_, n, k = matrices.shape
        batch = matrices.flatten(0, -3) if matrices.dim() > 2 else matrices.unsqueeze(0)
        words = self.kernels.packed_words(self.name, int8, n, k)
        size = 4 * batch.shape[0] * words
        packed = self._take(size)[:size].view(torch.int32).view(batch.shape[0], words)
        context = self.handle if int8 else self.native
        self.kernels.pack(context, batch.data_ptr(), batch.shape[0], n, k, *batch.stride(), packed.data_ptr())
        return packed

    def matrix(self, weight: Tensor, bias: Tensor, *, int8: bool | None = None) -> Held:
        """A linear layer; ``weight`` is ``[N, K]``, ``bias`` ``[N]``."""
        packed = self.pack(weight.detach(), int8=self.int8 if int8 is None else int8)
        tensors = packed, self.vector(bias)
        return Held(self.kernels.Matrix(*(t.data_ptr() for t in tensors), *weight.shape), tensors)

    def mlp(self, weights: MLPWeights) -> Held:
        """An MLP with its LayerNorm."""
        parts = self.norm(*weights[:2]), self.matrix(*weights[2:4]), self.matrix(*weights[4:])
        tensors = tuple(t for part in parts for t in part.tensors)
        return Held(self.kernels.Mlp(*(part.handle for part in parts)), tensors)

    def attention(
        self,
        norm_weight: Tensor,
        norm_bias: Tensor,
        query_weight: Tensor,
        query_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
    ) -> Attention:
        """Parameters of the query side of an attention."""
        query, out = self.matrix(query_weight, query_bias), self.matrix(out_weight, out_bias)
        return Attention(self.norm(norm_weight, norm_bias), query, out)

    def position(
        self, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
    ) -> tuple[Held, Held, Held]:
        """The MLP from position code to gamma and beta, never in 8 bits: sines want more."""
        (gamma, beta), (gamma_bias, beta_bias) = weight2.chunk(2), bias2.chunk(2)
        layers = ((weight1, bias1), (gamma, gamma_bias), (beta, beta_bias))
        first, second, third = (self.matrix(*layer, int8=False) for layer in layers)
        return first, second, third


LOG2_E = 1 / math.log(2)
# Rows of the shortest tile: a block of rows of the widest instruction set.
SHORTEST_TILE = 6


def smallest_scratch(dim: int, bands: int) -> int:
    """Bytes of scratch with which a network can run, on one thread and with the shortest tiles."""
    return load().cpu.scratch_bytes(max(dim, 2 + 4 * bands), SHORTEST_TILE) + 64


def _coords(coords: Tensor) -> tuple[int, bool]:
    """Address and whether they are float64; the caller holds the tensor."""
    return coords.data_ptr(), coords.dtype == torch.float64


def bilinear_sample(context: Context, grid: Tensor, coords: Tensor, out: Tensor) -> None:
    """Sample ``grid`` ``[B, P, Q, D]`` at contiguous ``coords`` ``[B, N, 2]`` into ``out`` ``[B, N, D]``."""
    B, P, Q, D = grid.shape
    context.kernels.bilinear_sample(
        context.handle, grid.data_ptr(), *_coords(coords), out.data_ptr(), B, coords.shape[1], P, Q, D
    )


def norm_linear(context: Context, x: Tensor, norm: Held, matrix: Held, out: Tensor) -> None:
    """``W LN(x) + b`` of contiguous ``x`` ``[B, N, D]`` into ``out`` ``[B, N, E]``, each image of it contiguous."""
    B, N, D = x.shape
    context.kernels.norm_linear(
        context.handle, x.data_ptr(), norm.handle, matrix.handle, out.data_ptr(), B, N, D, out.stride(0)
    )


def residual_mlp(context: Context, x: Tensor, mlp: Held, out: Tensor, *, residual: bool = True) -> None:
    """``x + W2 gelu(W1 LN(x) + b1) + b2`` of contiguous ``x`` ``[..., D]``; ``out`` may be ``x``."""
    D = x.shape[-1]
    context.kernels.residual_mlp(
        context.handle, x.data_ptr(), mlp.handle, residual, out.data_ptr(), x.numel() // D, D
    )


def mlp_backward(
    grad: Tensor,  # [B, N, D]
    x: Tensor,  # [B, N, D]
    weights: MLPWeights,
    needs_grad: Sequence[bool],
    *,
    residual: bool = False,
) -> list[Tensor | None]:
    """Gradients of ``W2 gelu(W1 LN(x) + b1) + b2``, plus ``x`` if asked for, for x and the six weights."""
    grad, x = grad.contiguous(), x.contiguous()
    D, E = weights.weight2.shape
    rows = x.numel() // D
    context = Context(x.dtype, D)
    norm, first = context.norm(*weights[:2]), context.matrix(*weights[2:4])
    second_transposed = context.matrix(weights.weight2.mT, weights.bias1)
    first_transposed = context.matrix(weights.weight1.mT, weights.bias2)
    normed, hidden = (
        x.new_empty(rows, width) if needed else None
        for width, needed in ((D, needs_grad[3]), (E, needs_grad[5]))
    )
    grad_preactivation, grad_x = x.new_empty(rows, E), torch.empty_like(x)
    grad_norm = torch.empty(context.kernels.mlp_backward_tiles(context.handle, rows), 2, D)
    context.kernels.mlp_backward(
        context.handle,
        x.data_ptr(),
        grad.data_ptr(),
        *(held.handle for held in (norm, first, second_transposed, first_transposed)),
        residual,
        *(0 if t is None else t.data_ptr() for t in (normed, hidden, grad_preactivation, grad_x, grad_norm)),
        rows,
        D,
    )
    flat = grad.view(rows, D)
    grads = (
        lambda: grad_x,
        lambda: grad_norm[:, 0].sum(0).to(x.dtype),
        lambda: grad_norm[:, 1].sum(0).to(x.dtype),
        lambda: grad_preactivation.t() @ normed,
        lambda: grad_preactivation.sum(0),
        lambda: flat.t() @ hidden,
        lambda: flat.sum(0),
    )
    return [g() if needed else None for g, needed in zip(grads, needs_grad, strict=True)]


class Attention(NamedTuple):
    """Parameters of the query side of an attention."""

    norm: Held
    query: Held
    out: Held


class KeptAttention(NamedTuple):
    """What the backward pass of the attention wants of its forward pass."""

    attended: Tensor  # [B, N, D]
    rotated_query: Tensor  # [B, N, D], times log2(e) / sqrt(d)
    log2_sum: Tensor  # [B, Hh, N] float32


def rope_cross_attention(
    context: Context,
    x: Tensor,  # [B, N, D]
    coords: Tensor,  # [B, N, 2]
    key: int,  # address of the first image's packed keys
    value: int,
    weights: Attention,
    inv_freq: Tensor,  # [d / 4]
    heads: int,
    token_grid: tuple[int, int],
    out: Tensor | None,  # [B, N, D]
    kept: KeptAttention | None = None,
) -> None:
    """Attend from contiguous queries to all tokens; ``out`` may be ``x``, or is not written if ``kept`` is."""
    norm, query, projection = (held.handle for held in weights)
    context.kernels.rope_cross_attention(
        context.handle,
        x.data_ptr(),
        *_coords(coords),
        key,
        value,
        norm,
        query,
        projection,
        inv_freq.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (out, *(kept or (None,) * 3))),
        *x.shape,
        heads,
        *token_grid,
    )


class Film(NamedTuple):
    """Parameters of a FiLM MLP; ``position`` may be missing where a table replaces it."""

    position: tuple[Held, Held, Held] | None
    mlp: Held
    out_norm: Held


def film_mlp_at(
    context: Context, x: Tensor, coords: Tensor, tokens: Tensor, weights: Film, freqs: Tensor, out: Tensor
) -> None:
    """Add the MLP of the nearest token, modulated by where in its cell the query lies; ``out`` may be ``x``."""
    context.kernels.film_mlp_at(
        context.handle,
        x.data_ptr(),
        tokens.data_ptr(),
        *_coords(coords),
        *(held.handle for held in weights.position),
        freqs.data_ptr(),
        freqs.shape[0],
        weights.mlp.handle,
        weights.out_norm.handle,
        out.data_ptr(),
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
) -> None:
    """Do what :func:`film_mlp_at` does with gamma and beta from a table; ``out`` may be ``x``."""
    addresses = (t.data_ptr() for t in (x, tokens, table, row, token))
    context.kernels.film_mlp_from_table(
        context.handle,
        *addresses,
        weights.mlp.handle,
        weights.out_norm.handle,
        out.data_ptr(),
        *x.shape,
        *tokens.shape[1:3],
    )


def _packed_image(context: Context, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hh, T, d]`` as kernels take them, ``[B * Hh, words]`` each."""
    return context.pack(key), context.pack(value.mT)


def forward_bilinear_sample(int8: bool, grid: Tensor, coords: Tensor) -> Tensor:
    """Forward of the operator, which has no product that 8 bits could speed up."""
    grid, coords = grid.contiguous(), coords.contiguous()
    out = grid.new_empty(*coords.shape[:2], grid.shape[-1])
    bilinear_sample(Context(grid.dtype, grid.shape[-1]), grid, coords, out)
    return out


def forward_norm_linear(int8: bool, x: Tensor, *layer: Tensor) -> Tensor:
    """Forward of the operator."""
    x = x.contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    out = x.new_empty(*x.shape[:-1], layer[2].shape[0])
    norm, matrix = context.norm(*layer[:2]), context.matrix(*layer[2:])
    norm_linear(context, x, norm, matrix, out)
    return out


def forward_residual_mlp(int8: bool, x: Tensor, *weights: Tensor) -> Tensor:
    """Forward of the operator."""
    x = x.contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    mlp, out = context.mlp(MLPWeights(*weights)), torch.empty_like(x)
    residual_mlp(context, x, mlp, out)
    return out


def forward_rope_cross_attention(int8: bool, x: Tensor, coords: Tensor, *others: Any) -> Tensor:
    """Forward of the operator."""
    key, value, *weights, inv_freq, token_h, token_w = others
    x, coords, inv_freq = x.contiguous(), coords.contiguous(), inv_freq.float().contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    packed_key, packed_value = _packed_image(context, key, value)
    folded, out = context.attention(*weights), torch.empty_like(x)
    addresses = packed_key.data_ptr(), packed_value.data_ptr()
    token_grid = token_h, token_w
    rope_cross_attention(context, x, coords, *addresses, folded, inv_freq, key.shape[1], token_grid, out)
    return out


def forward_film_mlp(
    int8: bool, x: Tensor, coords: Tensor | None, tokens: Tensor, *others: Tensor | None
) -> Tensor:
    """Forward of the operator."""
    position, weights, (table, freqs, row, token) = others[:4], others[4:12], others[12:]
    x, tokens = x.contiguous(), tokens.contiguous()
    bands = 0 if freqs is None else freqs.shape[0]
    context = Context(x.dtype, max(x.shape[-1], 2 + 4 * bands), int8=int8)
    mlp, out_norm = context.mlp(MLPWeights(*weights[:6])), context.norm(*weights[6:])
    out = torch.empty_like(x)
    if table is None:
        coords, freqs = coords.contiguous(), freqs.float().contiguous()
        film = Film(context.position(*position), mlp, out_norm)
        film_mlp_at(context, x, coords, tokens, film, freqs, out)
    else:
        table, row, token = context.vector(table), row.contiguous(), token.contiguous()
        film_mlp_from_table(context, x, tokens, table, row, token, Film(None, mlp, out_norm), out)
    return out


def _attention_pass(
    x: Tensor,
    coords: Tensor,
    key: Tensor,
    value: Tensor,
    weights: AttentionWeights,
    inv_freq: Tensor,
    token_grid: tuple[int, int],
) -> AttentionPass:
    """Recompute the attention for its backward pass."""
    x, coords, inv_freq = x.contiguous(), coords.contiguous(), inv_freq.float().contiguous()
    key, value = key.contiguous(), value.contiguous()
    (B, N, D), (_, heads, T, d) = x.shape, key.shape
    context = Context(x.dtype, D)
    packed_key, packed_value = _packed_image(context, key, value)
    folded = context.attention(*weights)
    kept = KeptAttention(torch.empty_like(x), torch.empty_like(x), torch.empty(B, heads, N))
    addresses = packed_key.data_ptr(), packed_value.data_ptr()
    rope_cross_attention(context, x, coords, *addresses, folded, inv_freq, heads, token_grid, None, kept)

    def backward(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cpu, threads = context.kernels, torch.get_num_threads()
        per_thread = cpu.attention_backward_scratch_bytes(T, d)
        _arena.begin()
        scratch = _arena.take(threads * per_thread)
        handle = cpu.Context(context.name, False, threads, SHORTEST_TILE, scratch.data_ptr(), per_thread)
        # More groups of queries where images and heads are fewer than threads; each has gradients of its own.
        panels = -(-N // cpu.attention_backward_panel())
        groups = max(1, min(panels, -(-threads // max(1, B * heads))))
        grad = grad.contiguous()
        grad_query = torch.empty(B, N, heads, d)
        grad_key, grad_value = torch.empty(2, groups, B, heads, T, d)
        given = (grad, kept.rotated_query, key, value, kept.log2_sum, kept.attended)
        tensors = (*given, grad_query, grad_key, grad_value)
        cpu.attention_backward(handle, *(t.data_ptr() for t in tensors), groups, B, N, D, heads, T)
        return grad_query, grad_key.sum(0), grad_value.sum(0)

    query = kept.rotated_query.float().unflatten(-1, (heads, d)) * (math.sqrt(d) / LOG2_E)
    return AttentionPass(query, kept.attended, backward)


# Bound by memory and by products that oneDNN does as well.
backward_bilinear_sample = bilinear_sample_backward
backward_norm_linear = norm_linear_torch_backward


def backward_residual_mlp(grad: Tensor, x: Tensor, *weights_and_needs: Any) -> list[Tensor]:
    """Backward of the operator."""
    *weights, needs_grad = weights_and_needs
    grads = mlp_backward(grad, x, MLPWeights(*weights), needs_grad, residual=True)
    return [g for g in grads if g is not None]


def backward_film_mlp(*arguments: Any) -> list[Tensor]:
    """Backward of the operator."""

    def forward(x: Tensor, weights: MLPWeights) -> Tensor:
        context = Context(x.dtype, x.shape[-1])
        out = torch.empty_like(x)
        residual_mlp(context, x.contiguous(), context.mlp(weights), out, residual=False)
        return out

    return film_backward_by(MLPPasses(forward, mlp_backward), *arguments)


def backward_rope_cross_attention(*arguments: Any) -> list[Tensor]:
    """Backward of the operator."""
    return attention_backward_by(_attention_pass, *arguments)


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
                context.mlp(block.transition),
                context.attention(*block.attention),
                Film(
                    context.position(*block.position),
                    context.mlp(block.film.mlp),
                    context.norm(*block.film[1:]),
                ),
                context.mlp(block.mlp),
            )
            for block in weights.blocks
        ]
        self.images = [
            (
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
        for hidden, (norm, key_matrix, value_matrix, token_norm) in zip(
            hidden_states, self.images, strict=True
        ):
            hidden = hidden.contiguous()
            B, h, w, D = hidden.shape
            key = hidden.new_empty(B, self.heads, h * w, D // self.heads)
            value, tokens = torch.empty_like(key), torch.empty_like(hidden)
            context.kernels.project_image(
                context.handle,
                hidden.data_ptr(),
                norm.handle,
                key_matrix.handle,
                value_matrix.handle,
                self.inv_freq.data_ptr(),
                token_norm.handle,
                *(t.data_ptr() for t in (key, value, tokens)),
                *hidden.shape,
                self.heads,
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
            packed = [_packed_image(context, *pair) for pair in zip(cache.keys, cache.values, strict=True)]
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
