"""The fine patch grid: patches of an enlarged image that is never made (ViT-Up, arXiv 2606.14024).

Enlarging an image bilinearly and embedding its patches are both linear, and separable per axis. A patch sees ``width``
source rows. Where these are fewer than its own rows, the interpolation of rows is folded into the weights, once for
each of the phases in which patches lie over source rows; elsewhere rows are interpolated. Columns always are. What
remains is one matrix product for a strip of patches, whose rows are contiguous from interpolation to product.
Kernels for CPUs interpolate straight into the operand of that product, a tile of patches at a time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.cpu.patch_grid import PatchEmbedder, Taps
from ..ops.checks import are_plain
from ..ops.implementations import resolve
from ..ops.memory import result_memory, zeros_of_few_writes
from ..ops.primitives import linear, pack

# Pixels of enlarged patches that are embedded at once.
_STRIP_ELEMENTS = 2**20
# Patches that compiled kernels embed at once: what becomes of them reads them from the cache.
_STRIP_PATCHES = 4096
# A product of fewer patches with weights of its own takes as long as twice these patches with shared weights.
_SHARING_PATCHES = 256
# Rows of a product from which packing its weights pays.
_PACKING_ROWS = 1024


class Embedding(NamedTuple):
    """How patches are embedded.

    Attributes:
        weight: the patch embedding.  # [D, C, patch, patch]
        bias: None where there is none.  # [D]
        dtype: compute type of the products.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return operator.index(self.weight.shape[-1])

    def product(self, pixels: Tensor, kernels: Tensor) -> Tensor:
        """Embed patches ``[F, N, K]`` by kernels ``[F, K, D]``, or by the only one as :meth:`packed` returns it."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        with torch.autocast(pixels.device.type, enabled=False):
            if kernels.is_mkldnn:
                return linear(pixels, kernels, bias)
            if len(kernels) == 1:
                return F.linear(pixels, kernels[0].t(), bias)
            products = torch.bmm(pixels, kernels) if bias is None else torch.baddbmm(bias, pixels, kernels)
            return products  # [F, N, D]

    def packed(self, kernels: Tensor) -> Tensor:
        """Pack the only kernel ``[1, K, D]`` of many patches where the CPU takes it so.

        As many pixels are summed in one chain as by PyTorch's convolution.
        """
        packed = pack(kernels[0].t(), longest=kernels.shape[1])
        return packed if packed.is_mkldnn else kernels


class Axis(NamedTuple):
    """How the patches of one axis see the source pixels.

    Patch ``k * period + i`` sees ``width`` pixels from ``starts[i] + k * stride`` on; beyond the border these are
    copies of the pixels at the border.
    """

    source: int
    patches: int
    patch: int
    stride: int
    period: int
    width: int
    starts: tuple[int, ...]

    def matrices(self, phases: range) -> Tensor:
        """Interpolation of the phases' pixels from those they see; ``[F, patch, width]``, float64, CPU."""
        index = torch.arange(
            phases.start * self.patch, phases.stop * self.patch, dtype=torch.int64, device="cpu"
        )
        floor, fraction = (
            t.view(-1, self.patch) for t in _positions(self.source, self.patches * self.patch, index)
        )
        tap = (floor - self._starts(phases))[..., None]  # [F, patch, 1]
        matrices = torch.zeros(len(phases), self.patch, self.width, dtype=torch.float64, device="cpu")
        matrices = matrices.scatter(2, tap, 1 - fraction[..., None])
        return matrices.scatter_add(2, (tap + 1).clamp(max=self.width - 1), fraction[..., None])

    def pixels(self, phases: range, repeats: range) -> Tensor:
        """Source pixels that the patches ``repeat * period + phase`` see; ``[F, R, width]``."""
        first = (
            torch.arange(repeats.start, repeats.stop, dtype=torch.int64, device="cpu")[:, None] * self.stride
        )
        seen = torch.arange(self.width, dtype=torch.int64, device="cpu")
        return (self._starts(phases)[..., None] + first + seen).clamp(0, self.source - 1)

    def _starts(self, phases: range) -> Tensor:
        """First source pixels of the phases; ``[F, 1]``."""
        starts = self.starts[phases.start : phases.stop]
        return torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None]


@lru_cache(maxsize=64)
def plan_axis(source: int, patches: int, patch: int) -> Axis:
    """Plan one axis of ``source`` pixels enlarged to ``patches * patch``."""
    repeats = math.gcd(source, patches)
    stride, period = source // repeats, patches // repeats

    def position(pixel: int) -> tuple[int, int]:
        """Source pixels below and above the centre of a target pixel."""
        floor, rest = divmod((2 * pixel + 1) * source - patches * patch, 2 * patches * patch)
        return floor, floor + (rest > 0)

    starts = tuple(position(i * patch)[0] for i in range(period))
    width = max(position((i + 1) * patch - 1)[1] - starts[i] + 1 for i in range(period))
    return Axis(source, patches, patch, stride, period, width, starts)


def interpolation_dtype(images: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which images are resized: never narrower than float32, images or weights."""
    return torch.promote_types(torch.promote_types(images.dtype, weight.dtype), torch.float32)


def folding_pays(images: Tensor, patch: int, size: tuple[int, int]) -> bool:
    """Compare multiplications: few source rows with weights for each phase, or full patches with the same weights."""
    rows = _plan_rows(images, patch, size)
    patches_of_phase = len(images) * size[0] // rows.period * size[1]
    return rows.width * (1 + _SHARING_PATCHES / patches_of_phase) < patch


def embed_grid(
    images: Tensor,  # [B, C, H, W]
    embedding: Embedding,
    size: tuple[int, int],
    finish: Callable[[Tensor, Tensor], Tensor],
    *,
    fold: bool | None = None,
) -> Tensor:  # [B, P, Q, D]
    """Embed all patches of the images enlarged to P x Q of them, a strip at a time.

    Args:
        images: of any floating dtype.
        embedding: how patches are embedded.
        size: rows and columns of patches, (P, Q).
        finish: what becomes of a strip ``[F, B, R, Q, D]`` of the rows ``[F, 1, R]``.
        fold: whether to fold the interpolation of rows into the weights; None lets the work decide.
    """
    B, C = images.shape[:2]
    P, Q = size
    wide = interpolation_dtype(images, embedding.weight)
    patch, D = embedding.patch, embedding.weight.shape[0]
    rows = _plan_rows(images, patch, size)
    fold = folding_pays(images, patch, size) if fold is None else fold
    period = rows.period if fold else 1
    height = rows.width if fold else patch
    of_rows, of_columns = (_taps(images, axis, count * patch, wide) for axis, count in ((2, P), (3, Q)))
    by_column = embedding.weight.to(wide).permute(3, 2, 1, 0).flatten(2)  # [patch v, patch u, C * D]
    parameters = [t for t in (embedding.weight, embedding.bias) if t is not None]
    plain = are_plain(images, *parameters)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (images, *parameters))
    packs = plain and not recorded and B * P // period * Q >= _PACKING_ROWS
    compiled = None
    if plain and not recorded and _takes_compiled(images, embedding):
        columns = Taps(*(tap.view(Q, patch) for tap in of_columns))
        bias = embedding.weight.new_zeros(D) if embedding.bias is None else embedding.bias
        compiled = PatchEmbedder(images.contiguous(), columns, height, bias, embedding.dtype)
    else:
        images = images.to(wide)

    def kernels_of(phases: range) -> Tensor:
        """The kernels of patches of these phases; ``[F, patch v * height * C, D]``."""
        kernels = by_column[None]
        if fold:
            kernels = rows.matrices(phases).to(by_column).mT[:, None] @ kernels  # [F, patch v, height, C * D]
        return kernels.to(embedding.dtype).reshape(len(phases), -1, D)

    def packed_of(phases: range) -> Tensor:
        """The kernels of patches of these phases as products take them."""
        kernels = kernels_of(phases)
        if compiled:
            return compiled.pack(kernels)
        return embedding.packed(kernels) if packs and len(phases) == 1 else kernels

    def taps_of(phases: range, repeats: range) -> Taps:
        """Where the rows of pixels of these patches lie; ``[F, R, height]``, in the kernels' order."""
        if not fold:
            pixels = slice(repeats.start * patch, repeats.stop * patch)
            return Taps(*(tap[pixels].view(1, -1, patch) for tap in of_rows))
        seen = rows.pixels(phases, repeats).to(images.device)
        return Taps(seen, seen, torch.zeros(seen.shape, dtype=wide, device=images.device))

    def embed(
        phases: range, repeats: range, kernels: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Embed the rows ``repeat * period + phase`` of patches; ``[F, B, R, Q, D]``, maybe in ``out``."""
        kinds, R = len(phases), len(repeats)
        taps = taps_of(phases, repeats)
        if compiled:
            shape = (kinds, B, R, Q, D)
            tokens = torch.empty(shape, dtype=embedding.dtype, device=images.device) if out is None else out
            compiled.embed(taps, packed_of(phases) if kernels is None else kernels, tokens)
        else:
            low, high, fraction = (tap.flatten() for tap in taps)
            strip = images.index_select(2, low) if fold else _lerp(images, 2, low, high, fraction)
            columns = strip.unflatten(2, (kinds, R, height)).permute(5, 2, 0, 3, 4, 1).flatten(1)  # [W, ...]
            enlarged = _lerp(columns, 0, *of_columns).view(Q, patch, kinds, B, R, height * C)
            pixels = enlarged.permute(2, 3, 4, 0, 1, 5)
            pixels = pixels.to(embedding.dtype, memory_format=torch.contiguous_format)
            kernels = kernels_of(phases) if kernels is None else kernels
            tokens = embedding.product(pixels.reshape(kinds, B * R * Q, -1), kernels).view(kinds, B, R, Q, D)
        index = torch.arange(P, dtype=torch.int64, device=images.device).view(-1, period)  # [repeats, phases]
        return finish(tokens, index[repeats.start : repeats.stop, phases.start : phases.stop].t()[:, None])

    patches = _STRIP_PATCHES if compiled else _STRIP_ELEMENTS // (C * patch * height)
    strips = _strips(period, P // period, max(1, patches // (B * Q)))
    # Transforms of gradients know no checkpoints.
    checkpoints = plain and recorded
    run = partial(checkpoint, embed, use_reentrant=False, preserve_rng_state=False) if checkpoints else embed
    first = run(*strips[0])
    if plain and not first.requires_grad:
        grid = result_memory(first, (B, P // period, period, Q, first.shape[-1]))
        known, kernels = None, None
        for phases, repeats in strips:
            if phases != known:
                known, kernels = phases, packed_of(phases)
            place = grid[:, repeats.start : repeats.stop, phases.start : phases.stop].permute(2, 0, 1, 3, 4)
            out = place if place.dtype == embedding.dtype and place.shape[-1] == D else None
            strip = first if (phases, repeats) == strips[0] else embed(phases, repeats, kernels, out)
            if strip is not place:
                place.copy_(strip)
    else:
        parts = [first, *(run(*strip) for strip in strips[1:])]
        of_phases = [
            torch.cat([part for part, strip in zip(parts, strips, strict=True) if strip[0] == phases], 2)
            for phases in dict.fromkeys(phases for phases, _ in strips)
        ]
        grid = torch.cat(of_phases, 0).permute(1, 2, 0, 3, 4)
    return grid.flatten(1, 2)


def _strips(phases: int, repeats: int, rows: int) -> list[tuple[range, range]]:
    """Divide rows of patches into strips of at most so many: phases together only where all of their rows fit."""
    together = min(phases, max(1, rows // repeats))
    step = min(rows, repeats)
    return [
        (range(i, min(i + together, phases)), range(k, min(k + step, repeats)))
        for i in range(0, phases, together)
        for k in range(0, repeats, step)
    ]


def embed_places(
    images: Tensor,  # [B, C, H, W]
    embedding: Embedding,
    size: tuple[int, int],
    places: Tensor,  # [N, 3]
    finish: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # [B, P, Q, D]
    """Embed single patches of the grid that :func:`embed_grid` returns; the others are zeros.

    Args:
        images: see :func:`embed_grid`.
        embedding: see :func:`embed_grid`.
        size: see :func:`embed_grid`.
        places: image, row and column of each patch, int64.
        finish: what becomes of patches ``[N, D]`` in the rows and columns given.
    """
    patch, C = embedding.patch, images.shape[1]
    wide = interpolation_dtype(images, embedding.weight)
    of_rows, of_columns = (
        [tap.view(-1, patch) for tap in _taps(images, axis, size[axis - 2] * patch, wide)] for axis in (2, 3)
    )
    kernel = embedding.weight.permute(3, 2, 1, 0).flatten(0, 2)  # [patch v * patch u * C, D]
    kernel = kernel.to(embedding.dtype)[None]
    pixels_of = images.permute(0, 2, 3, 1)  # [B, H, W, C]
    grid = None
    for part in places.split(max(1, _STRIP_ELEMENTS // (C * patch**2))):
        image, row, column = part.unbind(1)
        top, bottom, down = (tap[row][:, None, :] for tap in of_rows)  # [n, 1, patch u]
        left, right, along = (tap[column][:, :, None] for tap in of_columns)  # [n, patch v, 1]
        image = image[:, None, None]
        down, along = down[..., None], along[..., None]
        corners = ((y, x) for x in (left, right) for y in (top, bottom))
        corners = [
            pixels_of[(image, *corner)].to(wide) for corner in corners
        ]  # [n, patch v, patch u, C] each
        pixels = torch.lerp(torch.lerp(*corners[:2], down), torch.lerp(*corners[2:], down), along)
        tokens = embedding.product(pixels.flatten(1).to(embedding.dtype)[None], kernel)
        tokens = finish(tokens[0], row, column)  # [n, D]
        if grid is None:
            grid = zeros_of_few_writes(tokens, (len(images), *size, tokens.shape[-1]))
        grid = grid.index_put_(tuple(part.unbind(1)), tokens)
    return grid


def touched_places(coords: Tensor, size: tuple[int, int]) -> Tensor:  # [B, N, 2] -> [M, 3]
    """List the patches that sampling a grid bilinearly at coordinates may read, in whatever precision it rounds."""
    P, Q = size
    counts = torch.tensor((Q, P), dtype=torch.float64, device=coords.device)
    position = (coords.double() * counts - 0.5).nan_to_num(0.0)
    lowest = torch.minimum((position - 1e-3).clamp(min=0), counts - 1).floor().long()  # [B, N, 2]
    highest = torch.minimum((position + 1e-3).clamp(min=0), counts - 1).floor().long() + 1
    touched = torch.zeros(len(coords), P, Q, dtype=torch.bool, device=coords.device)
    image = torch.arange(len(coords), dtype=torch.int64, device=coords.device)[:, None]
    near = [lowest, torch.minimum(lowest + 1, highest), highest]
    for rows in near:
        for columns in near:
            touched[image, rows[..., 1].clamp(max=P - 1), columns[..., 0].clamp(max=Q - 1)] = True
    return touched.nonzero()


def _takes_compiled(images: Tensor, embedding: Embedding) -> bool:
    """Whether the kernels for CPUs embed patches without gradients."""
    tokens = images.new_empty(0, dtype=embedding.dtype)
    implementation = resolve("auto", tokens, {"the width D": embedding.weight.shape[0]})
    wide = interpolation_dtype(images, embedding.weight)
    return wide == torch.float32 and implementation == "cpu"


def _plan_rows(images: Tensor, patch: int, size: tuple[int, int]) -> Axis:
    """Plan the rows; the plan depends on the very numbers, also where a tracer would have them vary."""
    return plan_axis(operator.index(images.shape[2]), size[0], patch)


def _positions(source: int, target: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return floor and fraction of ``(i + 0.5) * source / target - 0.5`` for each index, computed exactly."""
    numerator = (2 * index + 1) * source - target
    floor = torch.div(numerator, 2 * target, rounding_mode="floor")
    return floor, (numerator - floor * 2 * target).double() / (2 * target)


def _taps(images: Tensor, axis: int, target: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower pixel, upper pixel and weight of the upper one for every target pixel of an axis."""
    last = operator.index(images.shape[axis]) - 1
    index = torch.arange(target, dtype=torch.int64, device="cpu")
    floor, fraction = _positions(last + 1, target, index)
    low, high = floor.clamp(0, last), (floor + 1).clamp(0, last)
    return low.to(images.device), high.to(images.device), fraction.to(images.device, dtype)  # [target] each


def _lerp(values: Tensor, axis: int, low: Tensor, high: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate one axis linearly."""
    fraction = fraction.view(-1, *[1] * (values.dim() - axis - 1))
    return torch.lerp(values.index_select(axis, low), values.index_select(axis, high), fraction)
