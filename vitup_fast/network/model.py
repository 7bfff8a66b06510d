"""The ViT-Up network: parameters under their published names, the image cache, and the walk of the queries."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import expected
from ..heads import Head, fold_head, head_parameters
from ..ops import (
    AttentionWeights,
    FilmTable,
    FilmWeights,
    MLPWeights,
    PositionWeights,
    bilinear_sample,
    film_mlp,
    norm_linear,
    norm_linear_argmax,
    residual_mlp,
    rope_cross_attention,
)
from ..ops.checks import check_coords, check_features
from ..ops.coordinates import rope_angles, rope_inv_freq, rotate_complex, rotate_pairs, token_centres
from ..ops.film_mlp import film_gamma_beta
from ..ops.implementations import compiled_operations, resolve
from ..ops.norm_linear import label_dtype
from ..ops.primitives import LAYER_NORM_EPS, pack
from ..walks.gpu import (
    SCHEDULERS,
    Constants,
    Scheduler,
    Source,
    Workspace,
    fold_block,
    fold_decoder,
    on_device,
    wants_graph,
)
from .config import (
    MLP_EXPANSION,
    POSITION_CODE_BANDS,
    POSITION_CODE_MAX_RESOLUTION,
    ROPE_BASE,
    TRANSITION_EXPANSION,
    ViTUpConfig,
)

if TYPE_CHECKING:
    from ..walks.cpu import CpuScheduler

if TYPE_CHECKING:
    from ..walks.cpu import CpuScheduler

# Queries whose activations stay in the last-level cache while a block's weights pass by.
CHUNK_QUERIES = {"cpu": 1568, "cuda": 8448}
# Implementations that walk chunks themselves where no gradient is asked for, without operators in between.
CPU_KERNELS = ("cpu", "cpu_int8")
SCHEDULED = ("triton", "cuda", *CPU_KERNELS)
# A table of relative positions is computed once per call up to this many rows, beyond that once per chunk.
SHARED_TABLE_ROWS = 2048


Weights = TypeVar("Weights")


class _FixedPrecision(nn.Module):
    """Holds a constant buffer that follows the module's device but never its dtype, nor a meta device."""

    def __init__(self, name: str, values: Tensor, persistent: bool) -> None:
        super().__init__()
        device = torch.get_default_device()
        self.register_buffer(
            name, values if device.type == "meta" else values.to(device), persistent=persistent
        )
        self._name = name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = getattr(self, self._name)
        super()._apply(fn, recurse)
        device = getattr(self, self._name).device
        setattr(self, self._name, before if device.type == "meta" else before.to(device))
        return self


class _MLP(nn.Module):
    """Two linear layers with GELU between, behind a LayerNorm if ``norm``; holds parameters only."""

    def __init__(self, dim: int, hidden: int, out: int, norm: bool) -> None:
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out)]
        self.mlp = nn.Sequential(*([nn.LayerNorm(dim, LAYER_NORM_EPS)] if norm else []), *layers)


class _CrossAttention(nn.Module):
    """Projections of the cross-attention; holds parameters only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)


class _Film(nn.Module):
    """The FiLM-modulated MLP of the nearest token; holds parameters only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_input = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.gamma_beta_mlp = _MLP(2 + 4 * POSITION_CODE_BANDS, dim, 2 * dim, norm=False)
        self.post_mlp = _MLP(dim, MLP_EXPANSION * dim, dim, norm=True)
        # Training starts without modulation.
        nn.init.zeros_(self.gamma_beta_mlp.mlp[-1].weight)
        nn.init.zeros_(self.gamma_beta_mlp.mlp[-1].bias)


class _Block(nn.Module):
    """One step of a query from one backbone depth to the next; holds parameters only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.transition_mlp = _MLP(dim, TRANSITION_EXPANSION * dim, dim, norm=True)
        self.norm_q_global = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.norm_h_global = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.cross_attention = _CrossAttention(dim)
        self.featx = _Film(dim)
        self.norm_h_local = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.norm_post = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = _MLP(dim, MLP_EXPANSION * dim, dim, norm=False)


class _Decoder(nn.Module):
    """LayerNorm and linear layer from a query to the feature of its depth; holds parameters only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim, LAYER_NORM_EPS), nn.Linear(dim, dim))


class BlockWeights(NamedTuple):
    """Parameters of one block as the operations take them."""

    transition: MLPWeights
    attention: AttentionWeights
    position: PositionWeights
    film: FilmWeights
    mlp: MLPWeights


class DecoderWeights(NamedTuple):
    """Parameters of one decoder as :func:`norm_linear` takes them."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    weight: Tensor  # [E, D]
    bias: Tensor  # [E]


class NetworkWeights(NamedTuple):
    """Parameters of the whole network as the operations take them."""

    blocks: list[BlockWeights]
    decoders: list[DecoderWeights]


class _Queries(NamedTuple):
    """A chunk of queries: coordinates, and per block a table of their relative positions if they share some."""

    coords: Tensor  # [B, n, 2]
    tables: Sequence[FilmTable | None]


class _Options(NamedTuple):
    """How a set of queries is walked through the network."""

    return_all_layers: bool
    head: Head | None
    labels: bool
    chunk: int
    scratch_bytes: int | None  # what a budget leaves beside the chunk's activations
    impl: str
    coords_require_grad: bool = False
    progress: Callable[[int], object] | None = None


def _parameters(*modules: nn.Linear | nn.LayerNorm) -> Iterator[Tensor]:
    """Weight and bias of each module in turn."""
    for module in modules:
        yield from (module.weight, module.bias)


def _block_weights(block: _Block) -> BlockWeights:
    """Collect the parameters of one block."""
    transition, post, mlp = block.transition_mlp.mlp, block.featx.post_mlp.mlp, block.mlp.mlp
    position, attention = block.featx.gamma_beta_mlp.mlp, block.cross_attention
    return BlockWeights(
        MLPWeights(*_parameters(transition[0], transition[1], transition[3])),
        AttentionWeights(*_parameters(block.norm_q_global, attention.q_proj, attention.out_proj)),
        PositionWeights(*_parameters(position[0], position[2])),
        FilmWeights(MLPWeights(*_parameters(post[0], post[1], post[3])), *_parameters(block.norm_h_local)),
        MLPWeights(*_parameters(block.norm_post, mlp[0], mlp[2])),
    )


def _map(value: Weights, fn: Callable[[Tensor], Tensor]) -> Weights:
    """Apply ``fn`` to every tensor of nested named tuples and lists."""
    if isinstance(value, Tensor):
        return fn(value)
    mapped = [_map(v, fn) for v in value]
    return mapped if isinstance(value, list) else type(value)(*mapped)


def _cast(value: Weights, dtype: torch.dtype) -> Weights:
    """Cast every tensor of nested named tuples and lists."""
    return _map(value, lambda t: t.to(dtype))


@dataclass(frozen=True)
class ImageCache:
    """What a network needs to know of a batch of images, computed once and used by any number of query sets.

    It holds projections by the network's weights: after changing those, call ``prepare`` again.

    Attributes:
        keys: per block, projected and rotated keys.  # L - 1 times [B, Hh, h * w, d]
        values: per block, projected values.  # L - 1 times [B, Hh, h * w, d]
        tokens: per block, LayerNormed hidden states.  # L - 1 times [B, h, w, D]
        patch_grid: the fine patch grid.  # [B, P, Q, D]
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    patch_grid: Tensor

    @property
    def batch_size(self) -> int:
        """Number of images B."""
        return self.patch_grid.shape[0]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens, (h, w)."""
        return self.tokens[0].shape[1], self.tokens[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(t.nbytes for t in (*self.keys, *self.values, *self.tokens, self.patch_grid))

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, images: SupportsIndex | slice | Sequence[int] | Tensor) -> ImageCache:
        """Select images; an integer keeps the batch axis, so that the result is a cache of one image."""
        if isinstance(images, SupportsIndex) and not (isinstance(images, Tensor) and images.dim()):
            image = operator.index(images)
            if not -self.batch_size <= image < self.batch_size:
                raise IndexError(f"image {image} of a cache of {self.batch_size}")
            image %= self.batch_size
            images = slice(image, image + 1)
        return self._map(lambda t: t[images])

    def _split(self, sizes: Sequence[int]) -> list[ImageCache]:
        """Cut into caches of as many images each, whose gradients are joined in one pass, not padded and added."""
        if len(sizes) == 1:
            return [self]
        tensors, blocks = (*self.keys, *self.values, *self.tokens, self.patch_grid), len(self.keys)
        parts = zip(*(t.split(sizes) for t in tensors), strict=True)
        return [ImageCache(*(p[i * blocks : (i + 1) * blocks] for i in range(3)), p[-1]) for p in parts]

    def to(self, *args: object, **kwargs: object) -> ImageCache:
        """Move or cast every tensor, with the arguments of :meth:`torch.Tensor.to`."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> ImageCache:
        """Apply ``fn`` to every tensor."""
        per_block = (tuple(fn(t) for t in ts) for ts in (self.keys, self.values, self.tokens))
        return ImageCache(*per_block, fn(self.patch_grid))

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient may flow back into the image."""
        return any(t.requires_grad for t in (*self.keys, *self.values, *self.tokens, self.patch_grid))


class _GridAxis(NamedTuple):
    """The cells of one axis of a regular grid, placed exactly in rational arithmetic."""

    coords: Tensor  # [n] cell centres in [0, 1]
    token: Tensor  # [n] index of the nearest token
    phase: Tensor  # [n] index into relative
    relative: Tensor  # [R] distinct relative positions in token units

    @classmethod
    def create(cls, cells: int, tokens: int, dtype: torch.dtype, device: torch.device) -> _GridAxis:
        """Place ``cells`` cell centres over ``tokens`` tokens; all counts in units of 1 / (2 cells) token."""
        centre = (2 * np.arange(cells, dtype=np.int64) + 1) * tokens
        token, remainder = np.divmod(centre - cells, 2 * cells)
        token += (remainder > cells) | ((remainder == cells) & (token % 2 == 1))  # ties to the even index
        token = token.clip(0, tokens - 1)
        relative, phase = np.unique(centre - (2 * token + 1) * cells, return_inverse=True)
        coords = (np.arange(cells) + 0.5) / cells
        to = lambda values, kind: torch.from_numpy(np.asarray(values)).to(device, kind)  # noqa: E731
        return cls(
            to(coords, dtype),
            to(token, torch.int64),
            to(phase, torch.int64),
            to(relative / (2 * cells), dtype),
        )

    def part(self, cells: slice, keep_relative: bool = False) -> _GridAxis:
        """A run of cells, with all relative positions or only those that occur in it."""
        phase, relative = self.phase[cells], self.relative
        if not keep_relative:
            used, phase = torch.unique(phase, return_inverse=True)
            relative = relative[used]
        return _GridAxis(self.coords[cells], self.token[cells], phase, relative)


class ViTUp(nn.Module):
    """ViT-Up (arXiv 2606.14024): features of a vision transformer at any continuous image coordinate.

    Parameters carry the names of the published checkpoints, so that ``load_state_dict`` of one is strict. The
    frequencies of the position code stay float32 whatever dtype the module is cast to.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: ViTUpConfig) -> None:
        super().__init__()
        self.config = config
        steps = torch.linspace(0.0, math.log(POSITION_CODE_MAX_RESOLUTION), POSITION_CODE_BANDS, device="cpu")
        self.rel_pos_enc = _FixedPrecision("freqs", torch.exp(steps), persistent=True)
        self.rope = _FixedPrecision("inv_freq", rope_inv_freq(config.head_dim, ROPE_BASE), persistent=False)
        self.vit_up_blocks = nn.ModuleList(_Block(config.dim) for _ in range(config.num_layers - 1))
        self.decoder_mlp = nn.ModuleList(_Decoder(config.dim) for _ in range(config.num_layers))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.decoder_mlp[0].mlp[1].weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.decoder_mlp[0].mlp[1].weight.device

    def prepare(
        self, hidden_states: Sequence[Tensor], patch_grid: Tensor, *, impl: str = "auto"
    ) -> ImageCache:
        """Compute once what queries need of a batch of images: keys, values, LayerNormed tokens.

        Args:
            hidden_states: the L hidden states of the backbone, cast to the network's dtype.  # [B, h, w, D] each
            patch_grid: the fine patch grid, cast to the network's dtype.  # [B, P, Q, D]
            impl: implementation of the projections.

        Returns:
            A cache for any number of query sets; gradients flow through it.

        Raises:
            InputError: wrong number of layers, or a shape, width, dtype or device that does not fit.
        """
        L, D = self.config.num_layers, self.config.dim
        hidden_states = list(hidden_states)
        if len(hidden_states) != L:
            raise expected(
                "hidden_states", f"{L} layers for depths {self.config.layer_indices}", len(hidden_states)
            )
        check_features("patch_grid", patch_grid, "(B, P, Q, D)", D)
        for i, hidden in enumerate(hidden_states):
            check_features(f"hidden_states[{i}]", hidden, "(B, h, w, D)", D)
            if hidden.shape != hidden_states[0].shape or hidden.shape[0] != patch_grid.shape[0]:
                raise expected(
                    f"hidden_states[{i}]",
                    f"the shape of hidden_states[0] {tuple(hidden_states[0].shape)} and the batch of "
                    f"patch_grid {tuple(patch_grid.shape)}",
                    tuple(hidden.shape),
                )
            if hidden.device != self.device:
                raise expected(f"hidden_states[{i}]", f"device {self.device} of the network", hidden.device)
        if 0 in hidden_states[0].shape or 0 in patch_grid.shape:
            raise expected("hidden_states and patch_grid", "no empty axis", tuple(patch_grid.shape))
        self._forget_stale_weights()

        hidden_states = [hidden.to(self.dtype) for hidden in hidden_states[1:]]
        grid = patch_grid.to(self.device, self.dtype).contiguous()
        implementation = resolve(impl, grid, {"the width D": D}, self.config.head_dim)
        tracks_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in (grid, *hidden_states, *self.parameters())
        )
        plain = not tracks_grad and not torch.compiler.is_compiling() and self._compute_dtype() == self.dtype
        if implementation in CPU_KERNELS and plain:
            with torch.no_grad():
                scheduler = self._scheduler(implementation, (), self.dtype)
                return ImageCache(*scheduler.project(hidden_states), grid)

        token_grid = tuple(hidden_states[0].shape[1:3])
        wide = torch.promote_types(self.dtype, torch.float32)
        centres = token_centres(token_grid, wide, self.device)
        angles = rope_angles(centres, self.rope.inv_freq).unsqueeze(1)  # [h * w, 1, d / 2]
        heads = (self.config.num_heads, self.config.head_dim)
        rotate = rotate_pairs if torch.compiler.is_compiling() else rotate_complex
        keys, values, tokens = [], [], []
        for block, hidden in zip(self.vit_up_blocks, hidden_states, strict=True):
            attention = block.cross_attention
            projections = (_parameters(layer) for layer in (attention.k_proj, attention.v_proj))
            weight, bias = (torch.cat(pair) for pair in zip(*projections, strict=True))  # [2 D, D], [2 D]
            norm = _parameters(block.norm_h_global)
            both = norm_linear(hidden.flatten(1, 2), *norm, weight, bias, impl=impl)  # [B, h * w, 2 D]
            key, value = both.chunk(2, dim=-1)  # [B, h * w, D] each
            key = rotate(key.unflatten(-1, heads), angles)  # [B, h * w, Hh, d]
            keys.append(key.transpose(1, 2).contiguous())
            values.append(value.unflatten(-1, heads).transpose(1, 2).contiguous())
            norm = block.featx.norm_input
            tokens.append(F.layer_norm(hidden, (D,), norm.weight, norm.bias, LAYER_NORM_EPS))
        return ImageCache(tuple(keys), tuple(values), tuple(tokens), grid)

    def forward(
        self,
        cache: ImageCache,
        coords: Tensor,  # [B, N, 2]
        *,
        return_all_layers: bool = False,
        head: Head | None = None,
        labels: bool = False,
        query_chunk_size: int | None = None,
        max_memory: int | None = None,
        impl: str = "auto",
    ) -> Tensor | list[Tensor]:  # [B, N, D]
        """Predict features at continuous coordinates (ViT-Up, arXiv 2606.14024).

        Args:
            cache: the images, from :meth:`prepare`.
            coords: (x, y) in [0, 1] over the image, x to the right, float32 or float64.
            return_all_layers: return the features of all L depths instead of the last.
            head: linear head folded into the last decoder, so that scores ``[B, N, C]`` come without features.
            labels: return the index of each query's largest score instead, ``[B, N]``: uint8 up to 256 classes.
            query_chunk_size: queries walked through the network at once; the result does not depend on it.
            max_memory: bytes that the pass may use beyond weights, cache and output, instead of a chunk size.
            impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

        Returns:
            Features in the network's dtype, or the list of L; differentiable unless gradients are disabled.

        Raises:
            InputError: an argument that does not fit.
        """
        self._check_cache(cache)
        check_coords(coords, batch=cache.batch_size)
        if coords.device != self.device:
            raise expected("coords", f"device {self.device} of the network", coords.device)
        count = coords.shape[1]
        single = torch.compiler.is_compiling() and query_chunk_size is None and max_memory is None
        implementation = self._resolve(impl, cache)
        per_query = self._query_bytes(implementation, return_all_layers, head)
        chunk, scratch = self._chunk(implementation, query_chunk_size, max_memory, per_query)
        chunk = count if single else chunk
        spans = [slice(0, count)] if single else _spans(count, chunk)

        def queries(span: slice) -> _Queries:
            return _Queries(coords[:, span], [None] * len(self.vit_up_blocks))

        options = _Options(return_all_layers, head, labels, chunk, scratch, impl, coords.requires_grad)
        return self._run(cache, count, spans, queries, options)

    def dense(
        self,
        cache: ImageCache,
        size: tuple[int, int],
        *,
        return_all_layers: bool = False,
        head: Head | None = None,
        labels: bool = False,
        query_chunk_size: int | None = None,
        max_memory: int | None = None,
        impl: str = "auto",
        progress: Callable[[int], object] | None = None,
    ) -> Tensor | list[Tensor]:  # [B, H, W, D]
        """Predict features at the cell centres ``((j + 0.5) / W, (i + 0.5) / H)`` of an H x W grid.

        Does what :meth:`forward` does at these coordinates, with less work: queries of a grid share relative
        positions, for each of which the position MLP runs once.

        Args:
            cache: the images, from :meth:`prepare`.
            size: rows and columns of the output, (H, W).
            return_all_layers: see :meth:`forward`.
            head: see :meth:`forward`.
            labels: see :meth:`forward`.
            query_chunk_size: see :meth:`forward`.
            max_memory: see :meth:`forward`.
            impl: see :meth:`forward`.
            progress: called after every chunk with the number of grid cells done in it, for all images together.

        Returns:
            Features in the network's dtype, or the list of L; differentiable unless gradients are disabled.

        Raises:
            InputError: an argument that does not fit.
        """
        self._check_cache(cache)
        H, W = check_size("size", size)
        wide = torch.promote_types(self.dtype, torch.float32)
        # A chunk's table has at most half as many rows as the chunk queries, and so has a shared one on a budget.
        table_bytes = len(self.vit_up_blocks) * self.config.dim * wide.itemsize
        # It comes from a wide copy of a block's position weights, for which a small budget has no room.
        position = _block_weights(self.vit_up_blocks[0]).position
        copy_bytes = 0 if self.dtype == wide else sum(t.numel() for t in position) * wide.itemsize
        limited = copy_bytes > 0 and isinstance(max_memory, int)
        fits = not limited or max_memory >= 4 * copy_bytes
        budget = max_memory - copy_bytes if limited and fits else max_memory
        implementation = self._resolve(impl, cache)
        per_query = self._query_bytes(implementation, return_all_layers, head) + table_bytes
        chunk, scratch = self._chunk(implementation, query_chunk_size, budget, per_query)
        rows, cols = (
            _GridAxis.create(cells, tokens, wide, self.device)
            for cells, tokens in zip((H, W), cache.token_grid, strict=True)
        )
        # A table differs from the definition, whose token centres are float32 numbers, by less than rounding the
        # cell centres to float32 does. Where float32 holds these, each query is computed, and in float64 always.
        exact_cells = all(n & (n - 1) == 0 for n in (H, W))
        dtype = self._compute_dtype()
        precise = dtype == torch.float64 or (dtype == torch.float32 and exact_cells)
        tabulate = implementation != "reference" and not precise and fits
        shared = None
        distinct = len(rows.relative) * len(cols.relative)
        if tabulate and distinct <= (SHARED_TABLE_ROWS if max_memory is None else chunk // 2):
            shared = self._gamma_beta(rows.relative, cols.relative)

        def queries(span: slice) -> _Queries:
            y, x = slice(span.start // W, (span.stop - 1) // W + 1), slice(0, W)
            if y.stop - y.start == 1:
                x = slice(span.start % W, (span.stop - 1) % W + 1)
            keep = shared is not None
            return self._grid_queries(rows.part(y, keep), cols.part(x, keep), cache, tabulate, shared)

        if chunk >= W:
            spans = [slice(y.start * W, y.stop * W) for y in _spans(H, chunk // W)]
        else:
            spans = [slice(row * W + x.start, row * W + x.stop) for row in range(H) for x in _spans(W, chunk)]
        options = _Options(return_all_layers, head, labels, chunk, scratch, impl, progress=progress)
        output = self._run(cache, H * W, spans, queries, options)
        if return_all_layers:
            return [layer.unflatten(1, (H, W)) for layer in output]
        return output.unflatten(1, (H, W))

    def _grid_queries(
        self, rows: _GridAxis, cols: _GridAxis, cache: ImageCache, tabulate: bool, shared: list[Tensor] | None
    ) -> _Queries:
        """Coordinates and tables of a rectangle of a grid, row by row."""
        y, x = torch.meshgrid(rows.coords, cols.coords, indexing="ij")
        coords = torch.stack((x, y), dim=-1).flatten(0, 1).expand(cache.batch_size, -1, -1)  # [B, n, 2]
        distinct = len(rows.relative) * len(cols.relative)
        if not tabulate or (shared is None and 2 * distinct > coords.shape[1]):
            return _Queries(coords, [None] * len(self.vit_up_blocks))
        tables = self._gamma_beta(rows.relative, cols.relative) if shared is None else shared
        row = (rows.phase[:, None] * len(cols.relative) + cols.phase).flatten()  # [n]
        token = (rows.token[:, None] * cache.token_grid[1] + cols.token).flatten()  # [n]
        return _Queries(coords, [FilmTable(gamma_beta, row, token) for gamma_beta in tables])

    def _gamma_beta(self, relative_y: Tensor, relative_x: Tensor) -> list[Tensor]:
        """``[gamma, beta]`` of every block for all pairs of relative positions, in float32 or better."""
        y, x = torch.meshgrid(relative_y, relative_x, indexing="ij")
        relative = torch.stack((x, y), dim=-1).flatten(0, 1)  # [R, 2]
        with torch.autocast(self.device.type, enabled=False):
            return [
                film_gamma_beta(relative, self.rel_pos_enc.freqs, _cast(_block_weights(b).position, y.dtype))
                for b in self.vit_up_blocks
            ]

    def _run(
        self,
        cache: ImageCache,
        count: int,
        spans: Sequence[slice],
        queries: Callable[[slice], _Queries],
        options: _Options,
    ) -> Tensor | list[Tensor]:  # [B, count, E]
        """Walk spans of queries through the network and collect their decoded features."""
        head, impl = options.head, options.impl
        if head is not None and options.return_all_layers:
            raise expected("head", "no head together with return_all_layers", "both")
        if options.labels and head is None:
            raise expected("labels", "a head whose scores to compare", "labels=True without a head")
        B, L = cache.batch_size, self.config.num_layers
        folded: tuple[Tensor, ...] = ()
        if head is not None:
            folded = fold_head(head, *_parameters(self.decoder_mlp[L - 1].mlp[1]))
        sources = (*self.parameters(), *folded)
        tracks_grad = torch.is_grad_enabled() and (
            options.coords_require_grad or cache.requires_grad or any(t.requires_grad for t in sources)
        )
        implementation = self._resolve(impl, cache)
        depths = range(L) if options.return_all_layers else (L - 1,)
        images = max(1, options.chunk // max(1, count))  # whose queries share a chunk
        groups = _spans(B, images)
        if implementation in SCHEDULED and not tracks_grad and not torch.compiler.is_compiling():
            outputs = self._run_scheduled(
                implementation, cache, count, spans, groups, queries, depths, folded, options
            )
            return outputs if options.return_all_layers else outputs[0]
        weights = self._weights(packed=not tracks_grad and implementation == "torch")
        decoders = {depth: weights.decoders[depth] for depth in depths}
        if folded:
            decoders[L - 1] = DecoderWeights(*decoders[L - 1][:2], *folded)
        decode = norm_linear_argmax if options.labels else norm_linear

        caches = cache._split([group.stop - group.start for group in groups])
        # Pieces to concatenate where a graph is recorded or there is one piece; else written where they belong.
        concatenates = tracks_grad or len(spans) * len(groups) == 1
        pieces: list[list[Tensor]] = []
        outputs: list[Tensor] = []
        for span in spans:
            part = queries(span)
            walked: list[list[Tensor]] = []
            for images, group in zip(caches, groups, strict=True):
                layers = self._walk(
                    images, part.coords[group], part.tables, weights, decoders, decode, impl
                )  # [b, n, E] or [b, n] each
                if concatenates:
                    walked.append(layers)
                    continue
                outputs = outputs or [layer.new_empty(B, count, *layer.shape[2:]) for layer in layers]
                for output, layer in zip(outputs, layers, strict=True):
                    output[group, span] = layer
            if concatenates:
                pieces.append([_cat(layer, 0) for layer in zip(*walked, strict=True)])
            if options.progress is not None:
                options.progress(part.coords.shape[1])
        if concatenates:
            outputs = [_cat(layer, 1) for layer in zip(*pieces, strict=True)]
        return outputs if options.return_all_layers else outputs[0]

    def _walk(
        self,
        cache: ImageCache,
        coords: Tensor,  # [B, n, 2]
        tables: Sequence[FilmTable | None],
        weights: NetworkWeights,
        decoders: dict[int, DecoderWeights],
        decode: Callable[..., Tensor],
        impl: str,
    ) -> list[Tensor]:  # [B, n, E] or [B, n] each
        """Walk one chunk of queries through the network and decode the depths asked for."""
        inv_freq, freqs = self.rope.inv_freq, self.rel_pos_enc.freqs
        query = bilinear_sample(cache.patch_grid, coords, impl=impl)  # [B, n, D]
        decoded = [decode(query, *decoders[0], impl=impl)] if 0 in decoders else []
        steps = zip(weights.blocks, cache.keys, cache.values, cache.tokens, tables, strict=True)
        for depth, (block, key, value, tokens, table) in enumerate(steps, start=1):
            query = residual_mlp(query, block.transition, impl=impl)
            query = rope_cross_attention(
                query, coords, key, value, block.attention, inv_freq, cache.token_grid, impl=impl
            )
            query = film_mlp(query, coords, tokens, freqs, block.position, block.film, table=table, impl=impl)
            query = residual_mlp(query, block.mlp, impl=impl)
            if depth in decoders:
                decoded.append(decode(query, *decoders[depth], impl=impl))
        return decoded

    def _run_scheduled(
        self,
        implementation: str,
        cache: ImageCache,
        count: int,
        spans: Sequence[slice],
        groups: Sequence[slice],
        queries: Callable[[slice], _Queries],
        depths: Sequence[int],
        folded: tuple[Tensor, ...],
        options: _Options,
    ) -> list[Tensor]:  # [B, count, E] or [B, count] each
        """Walk spans of queries through the network with fused kernels, in memory that is reused."""
        B, last, device = cache.batch_size, self.config.num_layers - 1, self.device
        dtype = self._compute_dtype()
        # What is kept for later calls must not be inference tensors: those could not be written outside that mode.
        plain = torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False)
        with ExitStack() as modes:
            for mode in (on_device(device), *plain):
                modes.enter_context(mode)
            compiled = compiled_operations(options.impl, cache.patch_grid)
            if compiled:
                from ..kernels.cuda import compiled_kernels

                modes.enter_context(compiled_kernels(compiled))
            scheduler = self._scheduler(implementation, compiled, dtype)
            decoders = {depth: scheduler.decoders[depth] for depth in depths}
            if folded:
                norm, _ = self.decoder_mlp[last].mlp
                parameters = (t.detach().to(dtype) for t in (*_parameters(norm), *folded))
                decoders[last] = scheduler.fold_decoder(DecoderWeights(*parameters))
            outputs = {}
            for depth in depths:
                classes = folded[0].shape[0] if folded and depth == last else self.config.dim
                shape = (B, count) if options.labels else (B, count, classes)
                kind = label_dtype(classes) if options.labels else dtype
                outputs[depth] = torch.empty(shape, dtype=kind, device=device)
            if B == 0 or count == 0:
                return list(outputs.values())
            sources = [*cache.keys, *cache.values, *cache.tokens]
            cache = cache.to(dtype)
            rows = max((g.stop - g.start) * (s.stop - s.start) for g in groups for s in spans)
            session = session_shape = workspace = None
            if implementation in CPU_KERNELS:
                workspace = scheduler.workspace(rows, cache, options.scratch_bytes)
            elif options.scratch_bytes is not None or not wants_graph(device, depths, last):
                workspace = Workspace(rows, self.config.dim, dtype, device)
            for span in spans:
                part = queries(span)
                tables = [t.gamma_beta for t in part.tables if t is not None]
                for group in groups:
                    coords = part.coords[group]
                    shape = (coords.shape[0], coords.dtype, *cache.token_grid, *(len(t) for t in tables[:1]))
                    if session_shape is None and workspace is None:
                        session, session_shape = scheduler.session(rows, shape, device), shape
                        workspace = session.workspace
                    replays = shape == session_shape and coords.shape[0] * coords.shape[1] == rows
                    scheduler.walk(
                        cache[group],
                        coords,
                        part.tables,
                        decoders,
                        {depth: output[group, span] for depth, output in outputs.items()},
                        session if replays else workspace,
                        Source([*sources, *tables], group),
                    )
                if options.progress is not None:
                    options.progress(part.coords.shape[1])
        return list(outputs.values())

    def _scheduler(
        self, implementation: str, compiled: tuple[str, ...], dtype: torch.dtype
    ) -> Scheduler | CpuScheduler:
        """Folded weights and graphs for a compute type, made anew when a parameter has changed."""
        state = parameter_state(self.parameters())
        schedulers = SCHEDULERS.setdefault(self, {})
        scheduler = schedulers.get((implementation, compiled, dtype))
        if scheduler is None or scheduler.state != state:
            weights = _map(_cast(self._weights(packed=False), dtype), Tensor.detach)
            inv_freq, freqs = self.rope.inv_freq, self.rel_pos_enc.freqs
            capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            samples = None if capturing else self._samples()
            if implementation not in CPU_KERNELS:
                blocks = [fold_block(block, self.config.head_dim) for block in weights.blocks]
                decoders = [fold_decoder(decoder) for decoder in weights.decoders]
                constants = Constants(blocks, inv_freq, freqs)
                scheduler = Scheduler(constants, decoders, state, samples, self.config.dim, dtype)
            else:
                from ..walks.cpu import CpuScheduler, ImageWeights

                int8 = implementation == "cpu_int8"
                images = [
                    ImageWeights(
                        *(t.detach().to(dtype) for t in _parameters(block.norm_h_global)),
                        *(t.detach().to(dtype) for t in _parameters(block.cross_attention.k_proj)),
                        *(t.detach().to(dtype) for t in _parameters(block.cross_attention.v_proj)),
                        *(t.detach().to(dtype) for t in _parameters(block.featx.norm_input)),
                    )
                    for block in self.vit_up_blocks
                ]
                heads = self.config.num_heads
                scheduler = CpuScheduler(weights, images, heads, inv_freq, freqs, state, samples, int8)
            # What is folded inside a caller's graph exists only when that graph is replayed.
            if not capturing:
                schedulers[implementation, compiled, dtype] = scheduler
        return scheduler

    def _forget_stale_weights(self) -> None:
        """Drop weights packed or folded from other values of the parameters.

        Versions do not see writes through ``.data``; a look at some numbers of every parameter does.
        """
        kept = [*SCHEDULERS.get(self, {}).values(), *([_PACKED[self]] if self in _PACKED else [])]
        if not kept or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        samples = self._samples()
        if any(not torch.equal(known.samples, samples) for known in kept):
            _PACKED.pop(self, None)
            SCHEDULERS.pop(self, None)

    def _resolve(self, impl: str, cache: ImageCache) -> str:
        """The implementation that runs for ``impl``, as every operation would choose it."""
        head_dim = cache.keys[0].shape[-1] if cache.keys else None
        return resolve(impl, cache.patch_grid, {"the width D": self.config.dim}, head_dim)

    def _weights(self, packed: bool) -> NetworkWeights:
        """Parameters as the operations take them, packed for inference on the CPU if asked for."""
        kind, dtype = self.device.type, self._compute_dtype()
        weights = NetworkWeights(
            [_block_weights(block) for block in self.vit_up_blocks],
            [DecoderWeights(*_parameters(*decoder.mlp)) for decoder in self.decoder_mlp],
        )
        if not packed or kind != "cpu" or torch.compiler.is_compiling():
            return weights
        state = (dtype, *parameter_state(self.parameters()))
        cached = _PACKED.get(self)
        if cached is None or cached.state != state:
            with torch.no_grad():
                prepared = _map(_cast(weights, dtype), lambda t: pack(t) if t.dim() == 2 else t.detach())
            cached = _PACKED[self] = _Packed(state, self._samples(), prepared)
        return cached.weights

    def _compute_dtype(self) -> torch.dtype:
        """Dtype of the parameters, or that of autocast where it is on."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and self.dtype != torch.float64
        return torch.get_autocast_dtype(kind) if autocast else self.dtype

    def _samples(self) -> Tensor:
        """A few numbers of every parameter, or on a GPU its norm, which takes one launch for all."""
        if self.device.type == "cuda":
            norms = torch._foreach_norm([p.detach() for p in self.parameters()], 2, torch.float32)
            return torch.stack(norms).cpu()
        with torch.no_grad():
            parameters = (p if p.is_contiguous() else p.contiguous() for p in self.parameters())
            steps = ((p, max(1, p.numel() // 32)) for p in parameters)
            return torch.cat([p.as_strided((-(-p.numel() // step),), (step,)) for p, step in steps]).cpu()

    def _query_bytes(self, implementation: str, return_all_layers: bool, head: Head | None) -> int:
        """Upper bound of the memory of one query: its walk, and what is decoded of it."""
        D, itemsize = self.config.dim, self.dtype.itemsize
        width = D * (self.config.num_layers if return_all_layers else 1)
        if head is not None:
            width = head_parameters(head, D)[0].shape[0]
        # The compiled kernels keep all but the query's state in their scratch.
        walk = 2 * D * itemsize if implementation in CPU_KERNELS else query_bytes(D, self.dtype)
        return walk + width * itemsize

    def _chunk(
        self, implementation: str, query_chunk_size: int | None, max_memory: int | None, per_query: int
    ) -> tuple[int, int | None]:
        """Queries per chunk, from the caller's budget or as suits the device, and what a budget leaves beside them."""
        if query_chunk_size is not None and max_memory is not None:
            raise expected("query_chunk_size and max_memory", "one of the two", "both")
        if query_chunk_size is not None:
            if (
                isinstance(query_chunk_size, bool)
                or not isinstance(query_chunk_size, int)
                or query_chunk_size < 1
            ):
                raise expected("query_chunk_size", "a positive integer", repr(query_chunk_size))
            return query_chunk_size, None
        chunk = CHUNK_QUERIES.get(self.device.type, CHUNK_QUERIES["cuda"])
        if max_memory is None:
            return chunk, None
        scratch = 0
        if implementation in CPU_KERNELS:
            from ..kernels.cpu.context import smallest_scratch

            scratch = smallest_scratch(self.config.dim, len(self.rel_pos_enc.freqs))
        least = per_query + scratch
        if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < least:
            raise expected("max_memory", f"at least {least} bytes, the need of one query", repr(max_memory))
        for_queries = max_memory - max(scratch, max_memory // 2 if scratch else 0)
        chunk = min(chunk, max(1, for_queries // per_query))
        return chunk, max_memory - chunk * per_query

    def _check_cache(self, cache: ImageCache) -> None:
        """Check that a cache comes from a network of these sizes and lies on this network's device."""
        if not isinstance(cache, ImageCache):
            raise expected("cache", "an ImageCache from ViTUp.prepare", type(cache).__name__)
        blocks, width = len(cache.keys), cache.patch_grid.shape[-1]
        if blocks != len(self.vit_up_blocks) or width != self.config.dim:
            raise expected(
                "cache",
                f"{len(self.vit_up_blocks)} blocks of width {self.config.dim}",
                f"{blocks} blocks of width {width}",
                "Prepare it with this network.",
            )
        if cache.patch_grid.dtype != self.dtype:
            raise expected(
                "cache", f"dtype {self.dtype} of the network", cache.patch_grid.dtype, "Use cache.to."
            )
        if cache.patch_grid.device != self.device:
            raise expected(
                "cache", f"device {self.device} of the network", cache.patch_grid.device, "Use cache.to."
            )


class _Packed(NamedTuple):
    """Packed weights, and the parameters they were made from."""

    state: tuple
    samples: Tensor
    weights: NetworkWeights


_PACKED: WeakKeyDictionary[ViTUp, _Packed] = WeakKeyDictionary()


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate, without a copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _spans(count: int, chunk: int) -> list[slice]:
    """Cut ``count`` into as few spans of at most ``chunk`` as possible, of nearly equal length; at least one."""
    pieces = max(1, -(-count // chunk))
    return [slice(i * count // pieces, (i + 1) * count // pieces) for i in range(pieces)]


def parameter_state(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Address and version of each tensor, which change when it is replaced or written in place."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def query_bytes(dim: int, dtype: torch.dtype) -> int:
    """Upper bound of the memory of one query on its walk: activations in ``dtype``, rotary parts in float32."""
    return dim * (13 * dtype.itemsize + 8)


def check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Check a size in rows and columns.

    Raises:
        InputError: not two positive integers.
    """
    valid = isinstance(size, tuple | list | torch.Size) and len(size) == 2
    if not valid or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise expected(name, "two positive integers (rows, columns)", repr(size))
    return int(size[0]), int(size[1])
