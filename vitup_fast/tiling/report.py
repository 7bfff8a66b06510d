"""One picture of a run: the input beside its answers, and both again across the border of a window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import require
from ..images import panels, write_atomically
from .plan import Grid
from .read import Region, thumbnail
from .work import Source
from .write import Store, count_levels

OVERVIEW = 640  # pixels of the longest side
ZOOM = 0.5  # windows on both sides of the border


def draw_report(path: Path, source: Source, stores: Sequence[Store], grid: Grid) -> None:
    """Draw overview and zoom of the first answer that can be shown; features alone have none."""
    order = ("pca", "labels", "scores", "similar")
    shown = sorted((s for s in stores if s.product.name in order), key=lambda s: order.index(s.product.name))
    if not shown:
        return
    plane = source.open()
    try:
        half = max(1, round(grid.window * ZOOM))
        row, column = _border(grid, shown[0].product.known(_overview(shown[0])))
        y0, x0 = max(0, min(row, grid.height - half) - half), max(0, min(column, grid.width - half) - half)
        height, width = min(2 * half, grid.height - y0), min(2 * half, grid.width - x0)
        overview = thumbnail(plane.reader, OVERVIEW)
        zoom = plane.read(y0, x0, height, width)
    finally:
        plane.reader.close()
    limits = _limits(source, plane.reader.dtype == np.uint8, overview)
    pictures = [("input", _grey_or_rgb(overview, limits))]
    for store in shown:
        pictures.append((store.product.name, _colours(_overview(store), store)))
    pictures.append(("input, across a window's border", _grey_or_rgb(zoom, limits)))
    s = float(grid.stride)
    cells = (
        slice(int(y0 / s), max(int(y0 / s) + 1, int((y0 + height) / s))),
        slice(int(x0 / s), max(int(x0 / s) + 1, int((x0 + width) / s))),
    )
    for store in shown:
        values = np.asarray(store.array()[(..., *cells)])
        pictures.append((f"{store.product.name}, there", _colours(values, store)))
    rows = len(shown) + 1
    scale = OVERVIEW / max(grid.height, grid.width)
    above = panels(pictures[:rows], (max(1, round(grid.height * scale)), max(1, round(grid.width * scale))))
    scale = OVERVIEW / max(height, width)
    below = panels(pictures[rows:], (max(1, round(height * scale)), max(1, round(width * scale))))
    pillow = require("PIL.Image", "demo", "drawing a picture")
    canvas = pillow.new("RGB", (max(above.width, below.width), above.height + below.height + 6), "white")
    canvas.paste(above, (0, 0))
    canvas.paste(below, (0, above.height + 6))
    write_atomically(path, lambda temporary: canvas.save(temporary, format="PNG"))


def _overview(store: Store) -> np.ndarray:  # [h, w] or [C, h, w]
    """Return a coarse picture of a product."""
    level = count_levels(store.product, store.placement.cells) - 1
    if (store.root / str(level)).exists():
        return np.asarray(store.array(level)[:])
    thin = max(1, max(store.placement.cells) // OVERVIEW)
    return np.asarray(store.array()[..., ::thin, ::thin])


def _border(grid: Grid, known: np.ndarray) -> tuple[int, int]:
    """Return row and column of the start of a window: near the middle, with answers all around as far as possible."""
    known = known if known.ndim == 2 else known[0]
    sums = np.pad(known, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    edges, starts, far = [], [], []
    for spans, size, count in zip(
        (grid.rows, grid.columns), (grid.height, grid.width), known.shape, strict=True
    ):
        at = np.array([span.start for span in spans[1:] or spans])
        reach = grid.window * ZOOM
        around = (np.stack((at - reach, at + reach)) / size * count).round().astype(np.int64)
        edges.append(np.clip(around, 0, count))
        starts.append(at)
        far.append(np.abs(at / size - 0.5))
    (y0, y1), (x0, x1) = edges
    inside = sums[np.ix_(y1, x1)] - sums[np.ix_(y0, x1)] - sums[np.ix_(y1, x0)] + sums[np.ix_(y0, x0)]
    # Windows that are as full as any within a twentieth differ by their distance from the middle.
    score = np.floor(20 * inside / max(1, inside.max())) - np.add.outer(*far)
    row, column = np.unravel_index(score.argmax(), score.shape)
    return int(starts[0][row]), int(starts[1][column])


def _limits(source: Source, byte: bool, region: Region) -> tuple[float, float]:
    """Values to show as black and white."""
    if source.scale is not None or byte:
        return source.scale or (0.0, 255.0)
    known = region.pixels[region.valid] if region.valid is not None else region.pixels
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, (1, 99))
    return float(low), float(max(high, low + 1e-12))


def _grey_or_rgb(region: Region, limits: tuple[float, float]) -> np.ndarray:  # [H, W, 3] uint8
    """Show pixels of an image."""
    low, high = limits
    share = np.clip((region.pixels.astype(np.float32) - low) / (high - low), 0, 1)
    shown = np.rint(share * 255).astype(np.uint8)
    shown = np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown
    return shown if region.valid is None else np.where(region.valid[:, :, None], shown, 255)


def _colours(values: np.ndarray, store: Store) -> np.ndarray:  # [H, W, 3] uint8
    """Show an answer: labels in colours of their own, components as colours, the first score as grey."""
    name = store.product.name
    if name == "labels":
        palette = np.random.default_rng(7).integers(40, 230, (65536, 3), dtype=np.uint8)
        palette[int(store.product.nodata)] = 255
        return palette[values]
    if name == "pca":
        three = values[[min(i, len(values) - 1) for i in range(3)]].transpose(1, 2, 0)
        return np.where((three == 0).all(axis=2, keepdims=True), 255, three).astype(np.uint8)
    first = values[0]
    known = first[np.isfinite(first)]
    low, high = (known.min(), known.max()) if known.size else (0, 1)
    share = np.nan_to_num((first - low) / max(high - low, 1e-12), nan=1.0)
    return np.repeat(np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)[:, :, None], 3, axis=2)
