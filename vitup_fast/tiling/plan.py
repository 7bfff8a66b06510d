"""Which windows see which cells of the output, how they are blended, and in which blocks the output is made.

Windows lie at multiples of a step from the image's origin; the last of a row is moved inward. A block is a fixed
rectangle of output cells; it depends on all windows that touch it and on nothing else, so that blocks can be made in
any order, by any number of workers, and again.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..errors import expected
from ..network.adaptive import held_bytes

BLOCK_STEPS = 16  # window steps along a block's side: one row of windows in 17 is computed twice
PIECE_BYTES = 48 << 20  # pixels that are read at once; glibc gives more than 32 MiB back when they are freed
ADAPTIVE_CELLS = 4096  # of an adaptive window, asked for or interpolated at once
QUEUED = 2  # columns of windows read ahead, and blocks that wait to be written


class Span(NamedTuple):
    """A window along one axis."""

    start: int  # pixel
    first: int  # cell whose centre is the first inside
    last: int  # one after the last


class Segment(NamedTuple):
    """Blocks side by side, which share the windows between them."""

    row: int
    first: int
    last: int  # one after the last


@dataclass(frozen=True)
class Grid:
    """Windows, cells and blocks of an image.

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
        window: side of a window in pixels.
        overlap: share of a window that the next one sees too.
        stride: pixels between the centres of cells.
        block: cells along a block's side.
        chunk: cells along a chunk's side, of which blocks are a multiple.
    """

    height: int
    width: int
    window: int
    overlap: float
    stride: Fraction
    block: int
    chunk: int

    @property
    def step(self) -> int:
        """Pixels from one window to the next."""
        return max(1, round(self.window * (1 - self.overlap)))

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return count_cells(self.height, self.stride), count_cells(self.width, self.stride)

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return tuple(-(-n // self.block) for n in self.cells)

    @cached_property
    def rows(self) -> tuple[Span, ...]:
        """Windows along y."""
        return self._spans(self.height, self.cells[0])

    @cached_property
    def columns(self) -> tuple[Span, ...]:
        """Windows along x."""
        return self._spans(self.width, self.cells[1])

    def _spans(self, size: int, cells: int) -> tuple[Span, ...]:
        """Windows along an axis, without those that see no cell."""
        starts = list(range(0, max(1, size - self.window), self.step))
        if size > self.window and starts[-1] + self.window < size:
            starts.append(size - self.window)
        spans = []
        for start in starts:
            first = max(0, math.ceil(start / self.stride - Fraction(1, 2)))
            last = min(cells, math.ceil((start + self.window) / self.stride - Fraction(1, 2)))
            if first < last:
                spans.append(Span(start, first, last))
        return tuple(spans)

    @property
    def window_cells(self) -> int:
        """The most cells along a window's side."""
        return max(s.last - s.first for s in (*self.rows, *self.columns))

    def offsets(self, span: Span) -> np.ndarray:  # [n] float64
        """Centres of a window's cells, in pixels from the window's start."""
        exact = [(Fraction(2 * i + 1, 2) * self.stride - span.start) for i in range(span.first, span.last)]
        return np.array([float(t) for t in exact])

    def centres(self, axis: int, first: int, last: int) -> np.ndarray:  # [n] float64
        """Centres of cells, in pixels of the image."""
        return (np.arange(first, last) + 0.5) * float(self.stride)

    def sample(self, axis: int, first: int, last: int, count: int) -> np.ndarray:  # [n] int64
        """Under which of ``count`` equal parts of the axis the cells' centres lie."""
        return (self.centres(axis, first, last) / (self.height, self.width)[axis] * count).astype(np.int64)

    def is_regular(self, span: Span) -> bool:
        """Whether the window's cells tile it exactly."""
        count = span.last - span.first
        return count * self.stride == self.window and span.first * self.stride == span.start

    def weights(self, span: Span) -> np.ndarray:  # [n] float32
        """Raised cosine over the overlap, one in between; what overlaps sums to one where windows lie regularly."""
        ramp = min(self.window - self.step, self.window / 2)
        offsets = self.offsets(span)
        if ramp == 0:
            return np.ones(len(offsets), np.float32)
        nearest = np.minimum(offsets, self.window - offsets)
        return (np.sin(np.pi / 2 * np.minimum(1, nearest / ramp)) ** 2).astype(np.float32)

    def band(self, row: int) -> tuple[int, int]:
        """First cell and one after the last of a row of blocks."""
        return row * self.block, min(self.cells[0], (row + 1) * self.block)

    def extent(self, segment: Segment) -> tuple[int, int]:
        """First cell and one after the last of a segment, along x."""
        return segment.first * self.block, min(self.cells[1], segment.last * self.block)

    def rows_of(self, row: int) -> list[Span]:
        """Windows along y that touch a row of blocks."""
        return touching(self.rows, *self.band(row))

    def columns_of(self, segment: Segment) -> list[Span]:
        """Windows along x that touch a segment."""
        return touching(self.columns, *self.extent(segment))

    def count_windows(self, segments: Collection[Segment]) -> int:
        """Windows to be computed for segments, background included."""
        return sum(len(self.rows_of(s.row)) * len(self.columns_of(s)) for s in segments)

    def segments(self, blocks: Collection[tuple[int, int]], parts: int = 1) -> list[Segment]:
        """Join blocks that lie side by side, and cut the longest runs until there are enough parts to share.

        Args:
            blocks: row and column of each block.
            parts: segments wanted at least, as far as there are blocks.
        """
        segments: list[Segment] = []
        for row, column in sorted(blocks):
            if segments and segments[-1].row == row and segments[-1].last == column:
                segments[-1] = segments[-1]._replace(last=column + 1)
            else:
                segments.append(Segment(row, column, column + 1))
        longest = max(1, len(blocks) // parts)
        cut = []
        for s in segments:
            pieces = -(-(s.last - s.first) // longest)
            edges = np.linspace(s.first, s.last, pieces + 1).round().astype(int).tolist()
            cut += [Segment(s.row, a, b) for a, b in pairwise(edges)]
        return cut


def touching(spans: Collection[Span], first: int, last: int) -> list[Span]:
    """Windows that see one of the cells from ``first`` up to ``last``."""
    return [s for s in spans if s.first < last and s.last > first]


def count_cells(size: int, stride: Fraction) -> int:
    """Cells whose centres lie inside an axis of so many pixels."""
    return math.ceil(size / stride + Fraction(1, 2)) - 1


def make_grid(
    size: tuple[int, int],
    window: int,
    overlap: float,
    stride: Fraction,
    channels: int,
    pixel_bytes: int,
    chunk: int,
    max_memory: int,
    known: tuple[int, int] | None = None,
    adaptive: int = 0,
) -> Grid:
    """Choose blocks that memory can hold.

    Args:
        size: rows and columns of the image.
        window: see :class:`Grid`.
        overlap: see :class:`Grid`.
        stride: see :class:`Grid`.
        channels: float32 numbers that are blended in a cell.
        pixel_bytes: memory of a pixel.
        chunk: the largest side of a chunk in cells.
        max_memory: bytes for buffers of one worker.
        known: block and chunk of a run that is continued.
        adaptive: see :func:`memory`.

    Raises:
        InputError: no cell, or not enough memory for the smallest block.
    """
    smallest = min(size)
    if stride <= 0 or count_cells(smallest, stride) < 1:
        raise expected(
            "--stride", f"more than 0 and less than twice the image's {smallest} pixels", float(stride)
        )
    step = max(1, round(window * (1 - overlap)))
    sides = [known] if known is not None else []
    for steps in (BLOCK_STEPS, 8, 4, 2, 1) if known is None else ():
        target = max(1, math.floor(steps * step / stride))
        most = max(count_cells(n, stride) for n in size)
        target = min(target, -(-most // chunk) * chunk if most > chunk else most)
        side = min(chunk, target)
        sides.append((max(1, target // side) * side, side))
    for block, side in sides:
        grid = Grid(*size, window, overlap, stride, block, side)
        needed = memory(grid, channels, pixel_bytes, adaptive)
        if needed <= max_memory:
            return grid
    raise expected(
        "--max-memory", f"at least {needed / 2**20:,.0f} MiB a worker", f"{max_memory / 2**20:,.0f} MiB"
    )


def memory(grid: Grid, channels: int, pixel_bytes: int, adaptive: int = 0) -> int:
    """Upper bound of the buffers of one worker in bytes: pixels read ahead, sums, and blocks on their way to disk.

    With a tolerance, also what is known of the cells of an adaptive window, of each of which the network makes
    ``adaptive`` numbers.
    """
    block = grid.block
    rows = block * grid.stride + 2 * grid.window
    windows = math.ceil(min(rows, grid.height + grid.window) / grid.step)
    pixels = (QUEUED + 2) * windows * grid.window**2 * pixel_bytes
    sums = block * (block + grid.window_cells) * (channels + 1) * 4
    waiting = (QUEUED + 1) * 2 * block**2 * (channels + 1) * 4
    lattices = 0
    if adaptive:
        lattices = held_bytes((grid.window_cells, grid.window_cells), 0)
        lattices += ADAPTIVE_CELLS * (4 * 4 * adaptive + 128)
    return int(pixels + sums + waiting + lattices + 3 * PIECE_BYTES)
