"""The ViT-Up network: checks, plan, and the choice of a walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, expected
from ..heads import Head, fold_head, head_parameters
from ..ops.checks import are_plain, check_budget, check_coords, check_count, check_features
from ..ops.implementations import resolve
from ..walks import choose_walk
from ..walks.plan import PLACE_BYTES, Budget, Spans, cut, total_memory
from ..walks.walk import Chunk, Decoding, Settings, Walk, plain_modes
from .adaptive import AdaptiveReport, Refinement, check_tolerance, held_bytes
from .config import ViTUpConfig
from .grid import LINE_BYTES, SHARED_TABLE_ROWS, Grid, Queries, cell_centres
from .image_cache import ImageCache
from .layers import Block, Decoder, PositionCode, RotaryFrequencies
from .weights import Look, NetworkWeights, Snapshot, affordable_look, collect

CHECKPOINTS = ("none", "op", "block")


class _Remembered(NamedTuple):
    """A walk, and the weights that it was made of."""

    walk: Walk
    source: Snapshot


class _Walks(dict[tuple[object, ...], _Remembered]):
    """Walks of one network: its copies make their own."""

    def __deepcopy__(self, memo: object) -> _Walks:
        return _Walks()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Walks, ()


class _Options(NamedTuple):
    """What a caller asks of a set of queries."""

    return_all_layers: bool
    head: Head | None
    labels: bool
    impl: str
    progress: Callable[[int], object] | None = None


class ViTUp(nn.Module):
    """ViT-Up (arXiv 2606.14024): features of a vision transformer at any continuous image coordinate.

    Parameters carry the names of the published checkpoints, so that ``load_state_dict`` of one is strict. The
    frequencies of the position code stay float32 whatever dtype the module is cast to.

    The layers are read, not called: a hook or a wrapper on one of them is refused, a parametrization is honoured.

    Weights are packed for the kernels once. Whatever PyTorch counts as a change (an optimiser's step,
    ``load_state_dict``, a replaced parameter or layer) is noticed in the next call. Writes past it (``weight.data``,
    NumPy) are looked for as closely as costs at most two percent: every value is compared in networks of up to 4 MB
    and in calls of 4096 queries or more (on a GPU in :meth:`prepare`), every row in :meth:`prepare`, and one row
    of 32 in smaller calls, which notices what changes whole matrices (averages of weights). Write under
    ``torch.no_grad()`` instead, ``weight[i, j] = x``, and nothing has to be looked for.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: ViTUpConfig) -> None:
        super().__init__()
        self.config = config
        self.rel_pos_enc = PositionCode()
        self.rope = RotaryFrequencies(config.head_dim)
        self.vit_up_blocks = nn.ModuleList(Block(config.dim) for _ in range(config.num_layers - 1))
        self.decoder_mlp = nn.ModuleList(Decoder(config.dim) for _ in range(config.num_layers))
        self._walks = _Walks()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.decoder_mlp[0].mlp[1].weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.decoder_mlp[0].mlp[1].weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the parameters, or that of autocast where it is on."""
        kind = self.device.type
        available = torch.amp.is_autocast_available(kind)
        autocast = available and torch.is_autocast_enabled(kind) and self.dtype != torch.float64
        return torch.get_autocast_dtype(kind) if autocast else self.dtype

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
        weights = collect(self)
        hidden_states = [hidden.to(self.dtype) for hidden in hidden_states[1:]]
        grid = patch_grid.to(self.device, self.dtype).contiguous()
        inputs = (grid, *hidden_states)
        implementation = resolve(impl, grid, {"the width D": D}, self.config.head_dim)
        in_place = self._computes_in_place(weights, inputs) and self.compute_dtype == self.dtype
        settings = self._settings(impl, implementation, in_place)
        self._forget_changed_walks(weights)
        walk = self._walk(choose_walk(settings), settings, weights)
        return ImageCache(*walk.project(hidden_states), grid)

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
        checkpoint: str = "none",
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
            checkpoint: what is kept for a backward pass: what makes it fastest (``"none"``), the inputs of every
                ``"op"``, or of every ``"block"`` alone; the rest is computed once more then.

        Returns:
            Features in the network's dtype, or the list of L; differentiable unless gradients are disabled.

        Raises:
            InputError: an argument that does not fit.
        """
        self._check_cache(cache)
        check_coords(coords, batch=cache.batch_size)
        if coords.device != self.device:
            raise expected("coords", f"device {self.device} of the network", coords.device)
        if checkpoint not in CHECKPOINTS:
            raise expected("checkpoint", f"one of {CHECKPOINTS}", repr(checkpoint))
        options = _Options(return_all_layers, head, labels, impl)
        weights, settings = self._prepare_pass(cache, coords, options)
        settings = settings._replace(checkpoint=checkpoint)
        count = coords.shape[1]
        if torch.compiler.is_compiling() and query_chunk_size is None and max_memory is None:
            spans, scratch = Spans(count, 1, max(1, count)), None
        else:
            walk = choose_walk(settings)
            needs = self._query_bytes(walk, options), self._least_scratch(walk), *self._head_bytes(options)
            usual = settings.usual_chunk(self.config.dim)
            chunk, scratch = Budget.divide(usual, query_chunk_size, max_memory, *needs)
            spans = Spans(count, 1, chunk, not settings.on_gpu)
        without_tables = [None] * len(self.vit_up_blocks)
        queries = lambda span: Queries(coords[:, span], without_tables)  # noqa: E731
        return self._run(cache, weights, settings, count, spans, scratch, queries, options)

    def dense(
        self,
        cache: ImageCache,
        size: tuple[int, int],
        *,
        return_all_layers: bool = False,
        head: Head | None = None,
        labels: bool = False,
        tolerance: float | None = None,
        query_chunk_size: int | None = None,
        max_memory: int | None = None,
        impl: str = "auto",
        progress: Callable[[int], object] | None = None,
        report: Callable[[AdaptiveReport], object] | None = None,
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
            tolerance: None computes every cell. A number makes the map adaptive: cells of a coarse lattice are
                computed, then those between them where interpolation is expected to be off by more, and so on; the
                rest is interpolated. It bounds what an interpolated cell is expected to be off by, relative to the
                root mean square of what is returned, and is divided by sqrt(n) for a lattice that has one cell in n,
                since so many depend on each. With ``labels`` it is relative to the margin between the two largest
                scores. 0.1 to 0.2 suit features, 0.5 to 2 labels; 0 computes every cell. An adaptive map has no
                gradients.
            query_chunk_size: see :meth:`forward`.
            max_memory: see :meth:`forward`; with a tolerance some 24 bytes for every cell of one image, and the
                scores of these where labels are asked for, are the least.
            impl: see :meth:`forward`.
            progress: called after every chunk with the number of grid cells done in it, for all images together.
            report: called at the end of an adaptive map with what it has cost and how far it may be off.

        Returns:
            Features in the network's dtype, or the list of L; differentiable unless gradients are disabled.

        Raises:
            InputError: an argument that does not fit.
        """
        self._check_cache(cache)
        H, W = check_size("size", size)
        query_chunk_size, max_memory = check_budget(query_chunk_size, max_memory)
        tolerance = check_tolerance(tolerance)
        if report is not None and tolerance is None:
            raise expected("report", "a tolerance beside it", "none")
        options = _Options(return_all_layers, head, labels, impl, progress)
        wide = torch.promote_types(self.dtype, torch.float32)
        if torch.compiler.is_compiling():
            if tolerance:
                raise _not_adaptive(tolerance)
            # Shapes of tables depend on numbers that compilers do not follow.
            coords = cell_centres((H, W), wide, self.device).expand(cache.batch_size, -1, -1)
            outputs = {"return_all_layers": return_all_layers, "head": head, "labels": labels}
            layers = self(cache, coords, **outputs, impl=impl)
            layers = [layer.unflatten(1, (H, W)) for layer in (layers if return_all_layers else [layers])]
            return layers if return_all_layers else layers[0]
        self._check_output_fits(cache, H * W, options)
        weights, settings = self._prepare_pass(cache, None, options)
        if tolerance and not settings.in_place:
            raise _not_adaptive(tolerance)
        walk = choose_walk(settings)
        # A chunk's table has at most half as many rows as the chunk queries, and so has a shared one on a budget.
        # One of them is made at a time, of position codes and through a hidden layer.
        code_width = 2 + 4 * self.rel_pos_enc.freqs.shape[0]
        table_bytes = (
            len(self.vit_up_blocks) * self.config.dim + self.config.dim + code_width
        ) * wide.itemsize
        # It comes from a wide copy of a block's position weights, for which a small budget has no room.
        positions = [block.position for block in weights.blocks]
        copy_bytes = 0 if self.dtype == wide else sum(t.numel() for t in positions[0]) * wide.itemsize
        per_query, least_scratch = self._query_bytes(walk, options) + table_bytes, self._least_scratch(walk)
        held, at_first = self._head_bytes(options)
        held += (H + W) * LINE_BYTES
        if tolerance:
            width = self._output_width(options)
            per_query += 4 * width * wide.itemsize + 128
            held += held_bytes((H, W), width * self.dtype.itemsize if labels else 0)
            least = max(held + per_query + least_scratch, at_first)
            if max_memory is not None and max_memory < least:
                wanted = f"at least {least} bytes, the need of an adaptive map of {H} x {W} cells"
                raise expected("max_memory", wanted, max_memory)
        fits = copy_bytes == 0 or max_memory is None or max_memory - held >= 4 * copy_bytes
        held += copy_bytes if fits else 0
        limits = query_chunk_size, max_memory, per_query, least_scratch, held, at_first
        chunk, scratch = Budget.divide(settings.usual_chunk(self.config.dim), *limits)
        # A table differs from the definition, whose token centres are float32 numbers, by less than rounding the
        # cell centres to float32 does. Where float32 holds these, each query is computed, and in float64 always.
        exact_cells = all(n & (n - 1) == 0 for n in (H, W))
        precise = settings.dtype == torch.float64 or (settings.dtype == torch.float32 and exact_cells)
        most_rows = SHARED_TABLE_ROWS if max_memory is None else chunk // 2
        if settings.implementation == "reference" or precise or not fits:
            most_rows = None
        place = cache.token_grid, cache.batch_size, wide, self.device
        grid = Grid(
            (H, W), *place, weights.freqs, positions, most_rows, not settings.on_gpu, walk.makes_tables
        )
        if tolerance:
            output, spent = self._run_adaptive(
                cache, weights, settings, chunk, scratch, grid, options, tolerance
            )
        else:
            spans = Spans(H, W, chunk, not settings.on_gpu)
            output = self._run(cache, weights, settings, H * W, spans, scratch, grid.queries, options)
            spent = AdaptiveReport(H * W, (H * W,) * cache.batch_size, (0.0,) * cache.batch_size)
        if report is not None:
            report(spent)
        if return_all_layers:
            return [layer.unflatten(1, (H, W)) for layer in output]
        return output.unflatten(1, (H, W))

    def _prepare_pass(
        self, cache: ImageCache, coords: Tensor | None, options: _Options
    ) -> tuple[NetworkWeights, Settings]:
        """Check what is asked for, read the weights, and say how the queries may walk."""
        head = options.head
        if head is not None and options.return_all_layers:
            raise expected("head", "no head together with return_all_layers", "both")
        if options.labels and head is None:
            raise expected("labels", "a head whose scores to compare", "labels=True without a head")
        weights = collect(self)
        inputs = [*cache.tensors, *(() if coords is None else (coords,))]
        if head is not None:
            inputs += [t for t in head_parameters(head, self.config.dim) if t is not None]
        in_place = self._computes_in_place(weights, inputs)
        head_dim = cache.keys[0].shape[-1]
        widths = {"the width D": self.config.dim}
        implementation = resolve(options.impl, cache.patch_grid, widths, head_dim)
        return weights, self._settings(options.impl, implementation, in_place)

    def _run(
        self,
        cache: ImageCache,
        weights: NetworkWeights,
        settings: Settings,
        count: int,
        spans: Spans,
        scratch_bytes: int | None,
        queries: Callable[[slice], Queries],
        options: _Options,
    ) -> Tensor | list[Tensor]:  # [B, count, E]
        """Walk spans of queries through the network and collect what is decoded of them."""
        B = cache.batch_size
        decoding = self._decoding(weights, options)
        groups = [slice(0, B)]
        if not torch.compiler.is_compiling():
            groups = list(cut(B, max(1, spans.chunk // max(1, count))))  # images whose queries share a chunk
        walk = self._walk_for(weights, settings, B * count)
        outputs: Sequence[Tensor] = ()
        if settings.in_place:
            with plain_modes(self.device):
                outputs = decoding.empty_outputs(B, count, self.config.dim, settings.dtype, self.device)
            if B * count == 0:
                return list(outputs) if options.return_all_layers else outputs[0]
        step = walk.begin(cache, decoding, spans, groups, scratch_bytes)
        pieces = []
        for span in spans:
            part = queries(span)
            walked = []
            for group in groups:
                chunk = Chunk(group, part._replace(coords=part.coords[group]))
                out = [output[group, span] for output in outputs] if settings.in_place else None
                walked.append(step(chunk, out))
            if not settings.in_place:
                pieces.append([_cat(layer, 0) for layer in zip(*walked, strict=True)])
            if options.progress is not None:
                options.progress(part.coords.shape[1])
        if not settings.in_place:
            outputs = [_cat(layer, 1) for layer in zip(*pieces, strict=True)]
        return list(outputs) if options.return_all_layers else outputs[0]

    def _run_adaptive(
        self,
        cache: ImageCache,
        weights: NetworkWeights,
        settings: Settings,
        chunk: int,
        scratch_bytes: int | None,
        grid: Grid,
        options: _Options,
        tolerance: float,
    ) -> tuple[Tensor | list[Tensor], AdaptiveReport]:  # [B, H * W, E]
        """Walk the cells that are worth it, image by image, and interpolate the others."""
        B, cells, dim = cache.batch_size, math.prod(grid.size), self.config.dim
        decoding = self._decoding(weights, options)
        numbers = decoding._replace(labels=False)
        with plain_modes(self.device):
            outputs = decoding.empty_outputs(B, cells, dim, settings.dtype, self.device)
            # Labels are found by scores, of which those of one image are held.
            scores = (
                numbers.empty_outputs(1, cells, dim, settings.dtype, self.device) if decoding.labels else []
            )
        groups = [slice(i, i + 1) for i in range(B)]
        spans = Spans(cells, 1, chunk, not settings.on_gpu)
        queries, errors, told = [], [], 0
        if B:
            walk = self._walk_for(weights, settings, B * cells)
            step = walk.begin(cache, numbers, spans, groups, scratch_bytes)
            refinement = Refinement(grid.size, cache.token_grid, self.device)

        def tell(done: int) -> None:
            """Report cells of the grid, for all images together."""
            nonlocal told
            if options.progress is not None and done // B > told:
                options.progress(done // B - told)
                told = done // B

        for group in groups:
            asked = 0

            def ask(part: Tensor, group: slice = group) -> list[Tensor]:
                nonlocal asked
                found = grid.cells(part)
                out = numbers.empty_outputs(1, len(part), dim, settings.dtype, self.device)
                answers = step(Chunk(group, found._replace(coords=found.coords[group])), out)
                asked += len(part)
                tell(group.start * cells + asked)
                return [answer[0] for answer in answers]

            layers = [layer[0] for layer in scores or [output[group] for output in outputs]]
            spent, error = refinement.fill(layers, ask, tolerance, decoding.labels, spans.longest)
            if decoding.labels:
                parts = layers[0].split(chunk), outputs[0][group.start].split(chunk)
                for part, best in zip(*parts, strict=True):
                    best.copy_(part.argmax(-1))
            queries.append(spent)
            errors.append(error)
            tell(group.stop * cells)
        expected_errors = tuple(torch.stack(errors).tolist()) if errors else ()
        report = AdaptiveReport(cells, tuple(queries), expected_errors)
        return list(outputs) if options.return_all_layers else outputs[0], report

    def _decoding(self, weights: NetworkWeights, options: _Options) -> Decoding:
        """What is decoded for a caller."""
        L, folded = self.config.num_layers, None
        if options.head is not None:
            folded = fold_head(options.head, weights.decoders[-1].weight, weights.decoders[-1].bias)
        depths = tuple(range(L)) if options.return_all_layers else (L - 1,)
        return Decoding(depths, folded, options.labels)

    def _walk_for(self, weights: NetworkWeights, settings: Settings, queries: int) -> Walk:
        """The walk for so many queries."""
        kind = choose_walk(settings)
        look = self._look(weights, queries) if kind.remembered else Look.NONE
        return self._walk(kind, settings, weights, look)

    def _walk(
        self,
        kind: type[Walk],
        settings: Settings,
        weights: NetworkWeights,
        look: Look = Look.NONE,
    ) -> Walk:
        """A walk by these weights: the remembered one if they are what it was made of, as far as a look shows."""
        if not kind.remembered:
            return kind(weights, settings)
        key = (kind, *settings)
        known = self._walks.get(key)
        if known is not None and known.source.holds(weights.tensors, look):
            return known.walk
        walk = kind(weights, settings)
        # What is folded inside a caller's graph exists only when that graph is replayed.
        if not self._is_captured():
            self._walks[key] = _Remembered(walk, Snapshot(weights.tensors, checksums=True))
        return walk

    def _look(self, weights: NetworkWeights, queries: int | None) -> Look:
        """How closely to look at the weights of remembered walks; see :func:`affordable_look`."""
        return Look.NONE if self._is_captured() else affordable_look(weights.parameters, queries)

    def _is_captured(self) -> bool:
        """Whether a caller records a CUDA graph, in which nothing can be waited for."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _forget_changed_walks(self, weights: NetworkWeights) -> None:
        """Forget walks by weights that were other ones, as a new image is computed."""
        if self._walks and not torch.compiler.is_compiling():
            look = self._look(weights, None)
            for key, known in list(self._walks.items()):
                if not known.source.holds(weights.tensors, look):
                    self._walks.pop(key, None)

    def _computes_in_place(self, weights: NetworkWeights, inputs: Sequence[Tensor]) -> bool:
        """Whether kernels may write where they are told: no gradient is recorded, nothing traced or transformed."""
        if not are_plain(*inputs):
            return False
        parameters = weights.parameters
        if not all(type(t) in (Tensor, nn.Parameter) for t in parameters):
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (*inputs, *parameters))

    def _settings(self, impl: str, implementation: str, in_place: bool) -> Settings:
        """What a walk of this network is made for."""
        heads = self.config.num_heads
        return Settings(impl, implementation, heads, self.compute_dtype, self.device, in_place)

    def _output_width(self, options: _Options) -> int:
        """Numbers decoded of one query."""
        if options.head is not None:
            return head_parameters(options.head, self.config.dim)[0].shape[0]
        return self.config.dim * (self.config.num_layers if options.return_all_layers else 1)

    def _query_bytes(self, walk: type[Walk], options: _Options) -> int:
        """Upper bound of the memory of one query: its walk, and what is decoded of it."""
        decoded = self._output_width(options) * self.dtype.itemsize
        return walk.query_bytes(self.config.dim, self.dtype) + decoded + PLACE_BYTES

    def _head_bytes(self, options: _Options) -> tuple[int, int]:
        """Upper bounds of a head's memory: folded and as kernels want it; and while it is folded."""
        if options.head is None:
            return 0, 0
        weight, _ = head_parameters(options.head, self.config.dim)
        C, D = weight.shape
        wide = torch.promote_types(torch.promote_types(self.dtype, weight.dtype), torch.float32)
        folded = C * (D + 1) * self.dtype.itemsize
        # The head, the decoder and their product, each with a vector or two.
        sides = (weight.dtype != wide, self.dtype != wide, self.dtype != wide)
        numbers = sum(n for n, copied in zip((C * D, D * D, C * D), sides, strict=True) if copied)
        at_first = folded + (numbers + D + 4 * C) * wide.itemsize
        return folded + 4 * (C + 16) * (D + 16), at_first

    def _least_scratch(self, walk: type[Walk]) -> int:
        """Bytes that a walk needs beside its queries."""
        return walk.least_scratch(self.config.dim, self.rel_pos_enc.freqs.shape[0])

    def _check_output_fits(self, cache: ImageCache, cells: int, options: _Options) -> None:
        """Refuse a grid whose result cannot be held, before any of it is computed."""
        cell_bytes = 1 if options.labels else self._output_width(options) * self.dtype.itemsize
        needed, total = cache.batch_size * cells * cell_bytes, total_memory(self.device)
        if needed > total:
            raise expected(
                "size",
                f"a result that fits the {total / 2**30:.0f} GiB of {self.device}",
                f"one of {needed / 2**30:.0f} GiB",
                "Compute parts of the image, or labels=True with a head.",
            )

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
        dtypes = {t.dtype for t in (*cache.keys, *cache.values)}
        if not dtypes <= {self.dtype, self.compute_dtype}:
            raise expected(
                "cache",
                f"keys and values in {self.compute_dtype}, in which the network computes now",
                ", ".join(map(str, dtypes)),
                "It was prepared under autocast: prepare it again, or use it under autocast.",
            )
        if cache.patch_grid.device != self.device:
            raise expected(
                "cache", f"device {self.device} of the network", cache.patch_grid.device, "Use cache.to."
            )


def _not_adaptive(tolerance: float) -> InputError:
    """The error where the cells to compute cannot depend on what was computed."""
    return expected(
        "tolerance",
        "no gradient to be recorded, and nothing traced or transformed",
        tolerance,
        "Use torch.no_grad(), or tolerance=None.",
    )


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate, without a copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Check a size in rows and columns.

    Raises:
        InputError: not two positive integers.
    """
    try:
        if not isinstance(size, tuple | list | np.ndarray):
            raise InputError
        height, width = (check_count(name, n) for n in size)
    except ValueError:
        raise expected(name, "two positive integers (rows, columns)", repr(size)) from None
    return height, width
