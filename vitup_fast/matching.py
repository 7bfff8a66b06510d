"""Where points of one image lie in another: the best cell of a coarse map, refined at continuous coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import expected
from .ops.checks import COORDINATE_DTYPES, check_tensor

POINTS_AT_ONCE = 1024
CANDIDATES = 4  # cells of the coarse map that are looked at closely
REACH = 2  # steps looked at to each side
FINEST_STEP = 0.25  # pixels


class Matches(NamedTuple):
    """Where points were found, and how alike the features are there."""

    points: Tensor  # [N, 2] (x, y)
    similarity: Tensor  # [N] cosine


def check_points(name: str, points: Tensor) -> None:
    """Check points: ``(N, 2)``, finite, float32 or float64."""
    check_tensor(name, points, "(N, 2)")
    if points.dim() != 2 or points.shape[1] != 2:
        raise expected(name, "shape (N, 2) holding (x, y)", tuple(points.shape))
    if points.dtype not in COORDINATE_DTYPES:
        raise expected(name, "dtype float32 or float64", points.dtype)
    if not points.isfinite().all():
        raise expected(name, "finite coordinates", "NaN or infinity")


def find_matches(
    features: Tensor,  # [N, D]
    coarse_map: Tensor,  # [h, w, D]
    features_at: Callable[[Tensor], Tensor],
    size: tuple[int, int],
) -> Matches:
    """Find where an image's features are most like given ones (by cosine), to a fraction of a pixel.

    Around the best cells of the coarse map the image's features are asked for at continuous coordinates, at half the
    distance each time, down to a quarter of a pixel; the peak of a paraboloid through the last of them is the answer.
    This looks around instead of following a gradient because features may jump where the nearest token changes.

    Args:
        features: the features to find.
        coarse_map: the image's features at the cell centres of a grid.
        features_at: gives the image's features ``[M, D]`` at coordinates ``[M, 2]``, (x, y) in [0, 1].
        size: height and width of the image in pixels.

    Returns:
        Coordinates (x, y) in [0, 1] and similarities, float32.
    """
    h, w, _ = coarse_map.shape
    cells = _unit(coarse_map).flatten(0, 1)  # [h * w, D]
    cell = torch.tensor((1 / w, 1 / h), dtype=torch.float32, device=cells.device)
    cell_pixels = max(size[0] / h, size[1] / w)
    levels = 1 + max(0, math.ceil(math.log2(cell_pixels / (REACH * FINEST_STEP))))
    found = []
    for wanted in _unit(features).split(POINTS_AT_ONCE):
        centre = _best_cells(wanted, cells, (h, w))  # [n, K, 2]
        for level in range(levels):
            step = cell / (REACH * 2**level)
            K = centre.shape[1]
            around = _look_around(
                wanted.repeat_interleave(K, dim=0), centre.flatten(0, 1), step, REACH, features_at
            )
            moved = centre + (_steps_to_best(around) * step).view_as(centre)
            # What looked best on the coarse map need not be, looked at closely: one of several goes on.
            best = around.flatten(1).max(dim=1).values.view(-1, K).argmax(dim=1, keepdim=True)  # [n, 1]
            centre = moved.gather(1, best[:, :, None].expand(-1, -1, 2)).clamp(0, 1)  # [n, 1, 2]
        centre = centre[:, 0]
        # Beyond the border there is nothing to fit a paraboloid to.
        centre = torch.minimum(torch.maximum(centre, step), 1 - step)
        around = _look_around(wanted, centre, step, 1, features_at)
        peak = (centre + _steps_to_peak(around) * step).clamp(0, 1)
        at_peak = torch.einsum("nd,nd->n", _unit(features_at(peak)), wanted)
        best, similarity = centre + _steps_to_best(around) * step, around.flatten(1).max(dim=1).values
        better = at_peak >= similarity
        centre, similarity = torch.where(better[:, None], peak, best), torch.maximum(at_peak, similarity)
        found.append(Matches(centre, similarity))
    return Matches(*map(torch.cat, zip(*found, strict=True)))


def _best_cells(wanted: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the centres of the cells that are better than all around them, the best of those.  # [n, K, 2]

    Args:
        wanted: unit vectors.  # [n, D]
        cells: unit vectors.  # [h * w, D]
        size: rows and columns (h, w) of cells.
    """
    h, w = size
    similarity = (wanted @ cells.T).view(-1, 1, h, w)
    peaks = torch.where(similarity < F.max_pool2d(similarity, 3, 1, 1), -torch.inf, similarity)
    best = peaks.flatten(1).topk(min(CANDIDATES, h * w), dim=1).indices  # [n, K]
    return (torch.stack((best % w, best // w), dim=2) + 0.5) / torch.tensor(
        (w, h), dtype=torch.float32, device=wanted.device
    )


def _unit(features: Tensor) -> Tensor:
    """Scale feature vectors to length one, in float32."""
    return F.normalize(features.to(torch.float32), dim=-1)


def _look_around(
    wanted: Tensor,  # [n, D]
    centre: Tensor,  # [n, 2]
    step: Tensor,  # [2]
    reach: int,
    features_at: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the similarity at some steps to each side of every point.  # [n, rows, columns]"""
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=centre.device)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    places = centre[:, None, None] + torch.stack((x, y), dim=-1) * step  # [n, rows, columns, 2]
    features = features_at(places.clamp(0, 1).flatten(0, 2)).view(*places.shape[:3], wanted.shape[1])
    return torch.einsum("nrcd,nd->nrc", _unit(features), wanted)


def _steps_to_best(around: Tensor) -> Tensor:
    """Return columns and rows from the middle to the best; none where nothing is better than the middle.  # [n, 2]"""
    side, reach = around.shape[1], around.shape[1] // 2
    similarity, best = around.flatten(1).max(dim=1)
    steps = torch.stack((best % side, best // side), dim=1) - reach
    return steps * (similarity > around[:, reach, reach])[:, None]


def _steps_to_peak(around: Tensor) -> Tensor:
    """Return columns and rows from the middle to the peak of a paraboloid, or to the best.  # [n, 3, 3] -> [n, 2]"""
    best, around = _steps_to_best(around), around.to(torch.float64)
    at = lambda x, y: around[:, 1 + y, 1 + x]  # noqa: E731
    slope_x, slope_y = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    bend_x, bend_y = at(-1, 0) - 2 * at(0, 0) + at(1, 0), at(0, -1) - 2 * at(0, 0) + at(0, 1)
    twist = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = bend_x * bend_y - twist.square()
    peak = torch.stack((twist * slope_y - bend_y * slope_x, twist * slope_x - bend_x * slope_y), dim=1)
    peak = peak / determinant[:, None]
    # It is none of this surface if it is far from the best value.
    fits = (bend_x < 0) & (determinant > 0) & ((peak - best).abs() <= 1).all(dim=1)
    return torch.where(fits[:, None], peak, best).to(torch.float32)
