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
from .ops.coordinates import nearest_token
from .ops.film_mlp import kept_bytes as film_kept_bytes
from .ops.film_mlp import position_code_backward
from .ops.primitives import MLPWeights
from .ops.rope_cross_attention import AttentionWeights, rotation_backward
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
            self.memory = _aligned_bytes(size)
        self.used = self.wanted = 0

    def take(self, size: int) -> Tensor:
        """Memory from the start of a cache line on, for this call alone."""
        whole_lines = -(-size // 64) * 64
        start = self.used
        self.wanted += whole_lines
        if start + size > self.memory.nbytes:
            return _aligned_bytes(size)
        self.used += whole_lines
        return self.memory[start : start + size]

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in such memory."""
        return self.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def begin_call() -> None:
    """Begin the call of an operator: what the thread's last call needed is free again."""
    _arena.begin()


def _aligned_bytes(size: int) -> Tensor:
    """Memory from the start of a cache line on."""
    memory = torch.empty(size + 63, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


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
        tile_rows: most rows of a tile, of a kernel that wants scratch of its own.
        scratch_bytes: scratch that this kernel wants for a thread.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        width: int,
        *,
        int8: bool = False,
        max_bytes: int | None = None,
        keep: bool = False,
        tile_rows: int | None = None,
        scratch_bytes: int | None = None,
    ) -> None:
        cpu = self.kernels = load().cpu
        self.dtype, self.int8, self.keep = dtype, int8, keep
        threads, rows = torch.get_num_threads(), tile_rows or cpu.tile_rows(width)
        if max_bytes is not None:
            while threads > 1 and threads * cpu.scratch_bytes(width, SHORTEST_TILE) + 64 > max_bytes:
                threads -= 1
            while rows > SHORTEST_TILE and threads * cpu.scratch_bytes(width, rows) + 64 > max_bytes:
                rows -= SHORTEST_TILE
        per_thread = scratch_bytes or cpu.scratch_bytes(width, rows)
        self.scratch = self._take(threads * per_thread)
        start = self.scratch.data_ptr()
        self.name = str(dtype).removeprefix("torch.")
        self.handle = cpu.Context(self.name, int8, threads, rows, start, per_thread)
        self.native = cpu.Context(self.name, False, threads, rows, start, per_thread)

    def _take(self, size: int) -> Tensor:
        """Memory from the start of a cache line on, for as long as packed weights live."""
        return _aligned_bytes(size) if self.keep else _arena.take(size)

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
        packed = self._take(4 * batch.shape[0] * words).view(torch.int32).view(batch.shape[0], words)
        context = self.handle if int8 else self.native
        self.kernels.pack(context, batch.data_ptr(), batch.shape[0], n, k, *batch.stride(), packed.data_ptr())
        return packed

    def matrix(self, weight: Tensor, bias: Tensor | None, *, int8: bool | None = None) -> Held:
        """A linear layer; ``weight`` is ``[N, K]``, ``bias`` ``[N]``. Kernels of backward passes read no bias."""
        packed = self.pack(weight.detach(), int8=self.int8 if int8 is None else int8)
        tensors = (packed,) if bias is None else (packed, self.vector(bias))
        addresses = packed.data_ptr(), 0 if bias is None else tensors[1].data_ptr()
        return Held(self.kernels.Matrix(*addresses, *weight.shape), tensors)

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


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins, as kernels take it; zero where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def residual_mlp(
    context: Context,
    x: Tensor,  # [..., D]
    mlp: Held,
    out: Tensor | None,  # [..., D]
    preactivation: Tensor | None = None,  # [..., E]
) -> None:
    """``x + W2 gelu(W1 LN(x) + b1) + b2`` of contiguous ``x``; ``out`` may be ``x``.

    Where the preactivation ``W1 LN(x) + b1`` is kept for a backward pass, ``out`` may be left out.
    """
    D = x.shape[-1]
    addresses = _address(out), _address(preactivation)
    context.kernels.residual_mlp(context.handle, x.data_ptr(), mlp.handle, *addresses, x.numel() // D, D)


def weight_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a linear layer's weight and bias, ``grad^T x`` and the sum of ``grad`` over rows.

    Args:
        grad: contiguous, ``[..., E]``.
        x: contiguous, ``[..., D]``, D a multiple of 16.

    Returns:
        ``[E, D]`` and ``[E]``.
    """
    E, D = grad.shape[-1], x.shape[-1]
    cpu = load().cpu
    context = Context(x.dtype, D, tile_rows=SHORTEST_TILE, scratch_bytes=cpu.weight_gradient_scratch_bytes(D))
    grad_weight, grad_bias = x.new_empty(E, D), x.new_empty(E)
    sums = grad_weight, grad_bias
    if x.dtype != torch.float32:
        sums = _arena.tensor((E, D), torch.float32), _arena.tensor((E,), torch.float32)
    tensors = (grad, x, *sums, grad_weight, grad_bias)
    cpu.weight_gradient(context.handle, *(t.data_ptr() for t in tensors), grad.numel() // max(1, E), E, D)
    return grad_weight, grad_bias


def norm_linear_backward(
    grad: Tensor,  # [B, N, E]
    x: Tensor,  # [B, N, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    weight: Tensor,  # [E, D]
    needs_grad: Sequence[bool],
    residual: Tensor | None = None,  # [B, N, D]
) -> list[Tensor | None]:
    """Gradients of ``W LN(x) + b`` for x, the norm's weight and bias, W and b; ``residual`` joins that of x."""
    E, D = weight.shape
    rows = x.numel() // D
    context = Context(x.dtype, max(E, D))
    norm, transposed = context.norm(norm_weight, norm_bias), context.matrix(weight.mT, None)
    normed = _arena.tensor(x.shape, x.dtype) if needs_grad[3] or needs_grad[4] else None
    grad_x = torch.empty_like(x)
    norm_sums = _arena.tensor((context.kernels.tiles(context.handle, rows, 1), 2, D), torch.float32)
    grad_norm = x.new_empty(2, D)
    context.kernels.norm_linear_backward(
        context.handle,
        *(_address(t) for t in (grad, x, residual)),
        norm.handle,
        transposed.handle,
        *(_address(t) for t in (normed, grad_x, norm_sums, grad_norm)),
        rows,
        D,
    )
    grads = [grad_x, *(g.clone() for g in grad_norm), None, None]
    if normed is not None:
        grads[3:] = weight_gradient(grad, normed)
    return [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]


def mlp_backward(
    grad: Tensor,  # [B, N, D]
    x: Tensor,  # [B, N, D]
    preactivation: Tensor,  # [B, N, E]
    weights: MLPWeights,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``x + W2 gelu(W1 LN(x) + b1) + b2`` for x and the six weights."""
    D = x.shape[-1]
    rows = x.numel() // D
    context = Context(x.dtype, D)
    norm = context.norm(*weights[:2])
    second_transposed = context.matrix(weights.weight2.mT, None)
    first_transposed = context.matrix(weights.weight1.mT, None)
    needs_first, needs_second = any(needs_grad[3:5]), any(needs_grad[5:])
    normed = _arena.tensor(x.shape, x.dtype) if needs_first else None
    hidden = _arena.tensor(preactivation.shape, x.dtype) if needs_second else None
    grad_preactivation = _arena.tensor(preactivation.shape, x.dtype)
    grad_x = torch.empty_like(x)
    norm_sums = _arena.tensor((context.kernels.tiles(context.handle, rows, 1), 2, D), torch.float32)
    grad_norm = x.new_empty(2, D)
    context.kernels.mlp_backward(
        context.handle,
        *(t.data_ptr() for t in (x, grad, preactivation)),
        *(held.handle for held in (norm, second_transposed, first_transposed)),
        *(_address(t) for t in (normed, hidden, grad_preactivation, grad_x, norm_sums, grad_norm)),
        rows,
        D,
    )
    grads = [grad_x, *(g.clone() for g in grad_norm), None, None, None, None]
    if normed is not None:
        grads[3:5] = weight_gradient(grad_preactivation, normed)
    if hidden is not None:
        grads[5:] = weight_gradient(grad, hidden)
    return [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]


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
    """Attend from contiguous queries to all tokens; ``out`` may be ``x``, and left out where something is kept."""
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
        *(_address(t) for t in (out, *(kept or (None,) * 3))),
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
    context: Context,
    x: Tensor,
    coords: Tensor,
    tokens: Tensor,
    weights: Film,
    freqs: Tensor,
    out: Tensor,
    kept: Tensor | None = None,
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
        *(_address(t) for t in (out, kept)),
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
    kept: Tensor | None = None,
) -> None:
    """Do what :func:`film_mlp_at` does with gamma and beta from a table; ``out`` may be ``x``."""
    addresses = (t.data_ptr() for t in (x, tokens, table, row, token))
    context.kernels.film_mlp_from_table(
        context.handle,
        *addresses,
        weights.mlp.handle,
        weights.out_norm.handle,
        *(_address(t) for t in (out, kept)),
        *x.shape,
        *tokens.shape[1:3],
    )


def _packed_image(context: Context, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hh, T, d]`` as kernels take them, ``[B * Hh, words]`` each."""
    return context.pack(key), context.pack(value.mT)


def _parts(kept: Tensor, *parts: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Divide bytes among tensors of these shapes and dtypes."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    pieces = kept.split(sizes)
    return [piece.view(dtype).view(shape) for piece, (shape, dtype) in zip(pieces, parts, strict=True)]


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


def forward_residual_mlp(int8: bool, x: Tensor, *weights: Tensor, kept: Tensor | None = None) -> Tensor:
    """Forward of the operator."""
    x = x.contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    mlp, out = context.mlp(MLPWeights(*weights)), torch.empty_like(x)
    residual_mlp(context, x, mlp, out, kept)
    return out


def _kept_attention(kept: Tensor, x: Tensor, heads: int) -> KeptAttention:
    """What an attention keeps, in bytes that it was given."""
    B, N, D = x.shape
    rows = (B, N, D), x.dtype
    return KeptAttention(*_parts(kept, rows, rows, ((B, heads, N), torch.float32)))


def forward_rope_cross_attention(
    int8: bool, x: Tensor, coords: Tensor, *others: Any, kept: Tensor | None = None
) -> Tensor:
    """Forward of the operator."""
    key, value, *weights, inv_freq, token_h, token_w = others
    x, coords, inv_freq = x.contiguous(), coords.contiguous(), inv_freq.float().contiguous()
    context = Context(x.dtype, x.shape[-1], int8=int8)
    packed_key, packed_value = _packed_image(context, key, value)
    folded, out = context.attention(*weights), torch.empty_like(x)
    addresses = packed_key.data_ptr(), packed_value.data_ptr()
    heads, token_grid = key.shape[1], (token_h, token_w)
    for_backward = None if kept is None else _kept_attention(kept, x, heads)
    rope_cross_attention(
        context, x, coords, *addresses, folded, inv_freq, heads, token_grid, out, for_backward
    )
    return out


def forward_film_mlp(
    int8: bool,
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    *others: Tensor | None,
    kept: Tensor | None = None,
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
        film_mlp_at(context, x, coords, tokens, film, freqs, out, kept)
    else:
        table, row, token = context.vector(table), row.contiguous(), token.contiguous()
        film = Film(None, mlp, out_norm)
        film_mlp_from_table(context, x, tokens, table, row, token, film, out, kept)
    return out


# Bound by memory: PyTorch does it as well.
backward_bilinear_sample = bilinear_sample_backward


def _needed(grads: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Gradients that were asked for, as an operator returns them."""
    return [g.contiguous() for g, needed in zip(grads, needs_grad, strict=True) if needed]


def backward_norm_linear(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Backward of the operator."""
    grads = norm_linear_backward(grad, x.contiguous(), norm_weight, norm_bias, weight, needs_grad)
    return _needed(grads, needs_grad)


def backward_residual_mlp(
    grad: Tensor, x: Tensor, *weights_and_needs: Any, kept: Tensor | None
) -> list[Tensor]:
    """Backward of the operator."""
    *parameters, needs_grad = weights_and_needs
    weights = MLPWeights(*parameters)
    x, hidden = x.contiguous(), weights.weight1.shape[0]
    if kept is None:
        preactivation = _arena.tensor((*x.shape[:-1], hidden), x.dtype)
        context = Context(x.dtype, x.shape[-1])
        residual_mlp(context, x, context.mlp(weights), None, preactivation)
    else:
        preactivation = kept.view(x.dtype).view(*x.shape[:-1], hidden)
    return _needed(mlp_backward(grad, x, preactivation, weights, needs_grad), needs_grad)


def backward_rope_cross_attention(
    grad: Tensor,
    x: Tensor,
    coords: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Any,
    kept: Tensor | None,
) -> list[Tensor]:
    """Backward of the operator."""
    *parameters, inv_freq, token_h, token_w, needs_grad = others
    weights, token_grid = AttentionWeights(*parameters), (token_h, token_w)
    x, coords, key, value = (t.contiguous() for t in (x, coords, key, value))
    inv_freq = inv_freq.float().contiguous()
    (B, N, D), (_, heads, T, d) = x.shape, key.shape
    context = Context(x.dtype, D)
    if kept is None:
        rows = (_arena.tensor(x.shape, x.dtype) for _ in range(2))
        known = KeptAttention(*rows, _arena.tensor((B, heads, N), torch.float32))
        packed = _packed_image(context, key, value)
        addresses = (t.data_ptr() for t in packed)
        folded = context.attention(*weights)
        rope_cross_attention(context, x, coords, *addresses, folded, inv_freq, heads, token_grid, None, known)
    else:
        known = _kept_attention(kept, x, heads)

    grad_attended = _arena.tensor(x.shape, x.dtype)
    transposed = context.matrix(weights.out_weight.mT, torch.zeros(D))
    norm_linear(context, grad, Held(context.kernels.Norm(0, 0, 0.0), ()), transposed, grad_attended)

    cpu = context.kernels
    context = Context(
        x.dtype, D, tile_rows=SHORTEST_TILE, scratch_bytes=cpu.attention_backward_scratch_bytes(T, d)
    )
    # More groups of queries where images and heads are fewer than threads; each has gradients of its own.
    most = -(-N // cpu.attention_backward_queries())
    groups = max(1, min(most, -(-torch.get_num_threads() // max(1, B * heads))))
    grad_query = _arena.tensor(x.shape, x.dtype)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad_rotated = torch.empty(x.shape) if needs_grad[1] else None
    sums = _arena.tensor((2, groups, B, heads, T, d), torch.float32)
    given = (grad_attended, known.rotated_query, key, value, known.log2_sum, known.attended)
    cpu.attention_backward(
        context.handle,
        *(t.data_ptr() for t in given),
        *_coords(coords),
        inv_freq.data_ptr(),
        *(_address(t) for t in (grad_query, grad_rotated, *sums, grad_key, grad_value)),
        *(groups, B, N, D, heads, token_h, token_w),
    )

    grad_coords = grad_weight = grad_bias = None
    if needs_grad[1]:
        query = known.rotated_query.float().unflatten(-1, (heads, d)) * (math.sqrt(d) / LOG2_E)
        grad_rotated = grad_rotated.unflatten(-1, (heads, d))
        grad_coords = rotation_backward(query, grad_rotated, inv_freq, token_grid).to(coords.dtype)
    if needs_grad[8] or needs_grad[9]:
        grad_weight, grad_bias = weight_gradient(grad, known.attended)
    needs_query = [needs_grad[0], *needs_grad[4:8]]
    grad_x, *grads_query = norm_linear_backward(
        grad_query, x, weights.norm_weight, weights.norm_bias, weights.query_weight, needs_query, grad
    )
    grads = (grad_x, grad_coords, grad_key, grad_value, *grads_query, grad_weight, grad_bias)
    return _needed(grads, needs_grad)


def backward_film_mlp(
    grad: Tensor,
    x: Tensor,
    coords: Tensor | None,
    tokens: Tensor,
    *others: Any,
    kept: Tensor | None,
) -> list[Tensor]:
    """Backward of the operator."""
    *arguments, needs_grad = others
    position, weights, (table, freqs, row, token) = arguments[:4], arguments[4:12], arguments[12:]
    mlp, out_norm_weights = MLPWeights(*weights[:6]), weights[6:]
    D, E = mlp.weight2.shape
    if kept is None:
        kept = torch.empty(film_kept_bytes(x, coords, tokens, *arguments), dtype=torch.uint8)
        forward_film_mlp(False, x, coords, tokens, *arguments, kept=kept)
    tokens = tokens.contiguous()
    (B, N, _), (h, w) = x.shape, tokens.shape[1:3]
    needs_coords, needs_tokens = needs_grad[1:3]
    needs_first, needs_second = any(needs_grad[9:11]), any(needs_grad[11:13])

    cpu = load().cpu
    bands = 0 if freqs is None else freqs.shape[0]
    width = max(D, 2 + 4 * bands)
    tile_rows = cpu.tile_rows(width) // 2
    scratch_bytes = cpu.film_mlp_backward_scratch_bytes(width, tile_rows)
    context = Context(x.dtype, width, tile_rows=tile_rows, scratch_bytes=scratch_bytes)
    norm, out_norm = context.norm(*mlp[:2]), context.norm(*out_norm_weights)
    second_transposed = context.matrix(mlp.weight2.mT, None)
    first_transposed = context.matrix(mlp.weight1.mT, None)

    def rows(width: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return _arena.tensor((B, N, width), dtype)

    grad_local, grad_preactivation, grad_gamma_beta = rows(D), rows(E), rows(2 * D)
    normed, hidden = rows(D) if needs_first else None, rows(E) if needs_second else None
    nearest, grad_nearest = rows(1, torch.int64), rows(D, torch.float32)
    norm_sums = _arena.tensor((cpu.tiles(context.handle, N, B), 4, D), torch.float32)
    grad_norms = x.new_empty(4, D)
    grad_x = torch.empty_like(x) if needs_grad[0] else None
    grad_tokens = torch.empty_like(tokens) if needs_tokens else None
    token_sums = grad_tokens
    if needs_tokens and x.dtype != torch.float32:
        token_sums = _arena.tensor(tokens.shape, torch.float32)
    backward = cpu.FilmMlpBackward(
        *(t.data_ptr() for t in (grad, tokens, kept)),
        *(held.handle for held in (norm, out_norm, second_transposed, first_transposed)),
        *(_address(t) for t in (grad_local, normed, hidden, grad_preactivation)),
        *(t.data_ptr() for t in (nearest, grad_nearest, grad_gamma_beta, norm_sums, grad_norms)),
        *(_address(t) for t in (grad_x, token_sums, grad_tokens)),
        *(B, N, D, h, w),
    )
    if table is not None:
        known = context.vector(table), row.contiguous(), token.contiguous()
        backward.from_table(*(t.data_ptr() for t in known))
    else:
        coords, freqs = coords.contiguous(), freqs.float().contiguous()
        weight1, _, weight2, _ = position
        transposed = [context.matrix(weight.mT, None) for weight in (weight2, weight1)]
        padded = -(-weight1.shape[1] // 16) * 16
        code, position_hidden, grad_position = rows(padded), rows(D), rows(D)
        grad_code = rows(padded, torch.float32) if needs_coords else None
        backward.from_coordinates(
            *_coords(coords),
            *(held.handle for held in transposed),
            freqs.data_ptr(),
            bands,
            *(_address(t) for t in (code, position_hidden, grad_position, grad_code)),
        )
    cpu.film_mlp_backward(context.handle, backward)

    grad_coords = grad_table = None
    grads_first = grads_second = (None, None)
    if needs_first:
        grads_first = weight_gradient(grad_preactivation, normed)
    if needs_second:
        grads_second = weight_gradient(grad_local, hidden)
    if any(needs_grad[3:7]):
        grad_weight1, grad_bias1 = weight_gradient(grad_position, code)
        grads_position = grad_weight1[:, : weight1.shape[1]], grad_bias1
        grads_position += weight_gradient(grad_gamma_beta, position_hidden)
    else:
        grads_position = (None,) * 4
    if needs_grad[15]:
        grad_table = torch.zeros(table.shape).index_add_(0, row, grad_gamma_beta.float().sum(0))
        grad_table = grad_table.to(table.dtype)
    if needs_coords:
        _, relative = nearest_token(coords, (h, w))
        grad_code = grad_code[..., : weight1.shape[1]]
        grad_coords = position_code_backward(grad_code, relative, freqs, (h, w)).to(coords.dtype)
    grads_norm, grads_out_norm = (tuple(g.clone() for g in pair) for pair in grad_norms.split(2))
    grads_mlp = (*grads_norm, *grads_first, *grads_second)
    grads = (grad_x, grad_coords, grad_tokens, *grads_position, *grads_mlp, *grads_out_norm, grad_table)
    return _needed(grads, needs_grad)


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
