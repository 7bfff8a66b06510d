"""One worker: windows are read ahead, computed in batches, blended, and written as blocks, all at the same time."""

from __future__ import annotations

import ctypes
import functools
import math
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, brief
from ..network.adaptive import AdaptiveReport
from ..upsampler import Upsampler
from .answers import Answers
from .plan import PIECE_BYTES, QUEUED, Grid, Segment, Span
from .read import Plane, Region, open_reader
from .resume import Progress
from .write import Store

Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """How an input is read; every worker opens it anew.

    Attributes:
        path: the image.
        bands: channels to read, from 1.
        level: resolution to work at, if ``mpp`` does not say.
        mpp: micrometres per pixel to work at.
        source_mpp: micrometres per pixel of level 0, where the image does not say, or says wrong.
        scale: values shown as black and white; None for 8 bits.
    """

    path: Path
    bands: tuple[int, ...] | None = None
    level: int = 0
    mpp: float | None = None
    source_mpp: float | None = None
    scale: tuple[float, float] | None = None

    def open(self) -> Plane:
        """Open the plane that windows are cut from.

        Raises:
            InputError: see :func:`open_reader` and :class:`Plane`.
        """
        reader = open_reader(self.path, self.bands)
        return Plane(reader, level=self.level, mpp=self.mpp, source_mpp=self.source_mpp)


class Pixels:
    """Windows of a plane as a network sees them.

    Args:
        plane: the open plane.
        source: how its values are understood.
        model: its backbone's mean and deviation.
    """

    def __init__(self, plane: Plane, source: Source, model: Upsampler) -> None:
        self.plane, self.device = plane, model.device
        byte = plane.reader.dtype == np.uint8
        low, high = source.scale or ((0, 255) if byte else (0, 1))
        self._scale = (float(low), float(high))
        self._clips = source.scale is not None
        mean, std = (np.asarray(v, np.float32) for v in (model.backbone.mean, model.backbone.std))
        channels = plane.reader.channels
        fill = low + mean * (high - low)
        self._fill = fill if channels == 3 else fill.mean(keepdims=True)
        self._mean, self._std = (
            torch.tensor(v.tolist(), dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
            for v in (mean, std)
        )

    def filled(self, region: Region) -> np.ndarray:  # [h, w, C] uint8 or float32
        """Give invalid pixels the mean colour, and every kind but bytes float32."""
        pixels = region.pixels
        if pixels.dtype not in (np.uint8, np.float32):
            pixels = pixels.astype(np.float32)
        if region.valid is not None and not region.valid.all():
            fill = np.rint(self._fill) if pixels.dtype == np.uint8 else self._fill
            pixels = np.where(region.valid[:, :, None], pixels, fill.astype(pixels.dtype))
        return pixels

    def normalised(self, windows: Sequence[np.ndarray]) -> Tensor:  # [B, 3, h, w]
        """Move windows to the device and normalise them."""
        batch = torch.from_numpy(np.stack(windows)).to(self.device)  # [B, h, w, C]
        batch = batch.permute(0, 3, 1, 2).to(torch.float32)
        low, high = self._scale
        if low:
            batch = batch - low
        if high - low != 1:
            batch = batch / (high - low)
        if self._clips:
            batch = batch.clamp(0, 1)
        return (batch.expand(-1, 3, -1, -1) - self._mean) / self._std


@dataclass(frozen=True)
class Job:
    """All that workers share of a run; it is pickled.

    Attributes:
        source: the input.
        grid: windows, cells and blocks.
        answers: what is asked of every cell.
        mask: foreground over the whole image, on a grid of its own.  # [h, w] bool
        home: folder of the run's own files.
        output: folder that sidecars name files from.
        stores: where each product goes.
        batch: windows computed at once.
        strict: whether a broken tile ends the run.
        tolerance: of adaptive windows; None computes all cells.
    """

    source: Source
    grid: Grid
    answers: Answers
    mask: np.ndarray | None
    home: Path
    output: Path
    stores: tuple[Store, ...]
    batch: int
    strict: bool
    tolerance: float | None = None

    def worker(self, model: Upsampler, tick: Callable[[int], object]) -> Worker:
        """Make a worker that reports windows done."""
        return Worker(self, model, tick)

    def count_windows(self, tasks: Sequence[Segment]) -> int:
        """Windows of segments."""
        return self.grid.count_windows(tasks)

    @property
    def window_pixels(self) -> int:
        """Pixels of the image that a window stands for."""
        return self.grid.step**2

    def count_foreground(self, segment: Segment) -> int:
        """Windows of a segment that the mask leaves something of."""
        grid, mask = self.grid, self.mask
        rows, columns = grid.rows_of(segment.row), grid.columns_of(segment)
        if mask is None:
            return len(rows) * len(columns)
        first, last = grid.band(segment.row)
        bands = [(max(first, r.first), min(last, r.last)) for r in rows]
        y = [grid.sample(0, *band, mask.shape[0])[[0, -1]] + (0, 1) for band in bands]
        x = [grid.sample(1, c.first, c.last, mask.shape[1])[[0, -1]] + (0, 1) for c in columns]
        sums = np.pad(mask, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
        corners = sums[np.ix_(np.concatenate(y), np.concatenate(x))]
        return int((np.diff(np.diff(corners, axis=0)[::2], axis=1)[:, ::2] > 0).sum())


class Column(NamedTuple):
    """Windows of one column of a row of blocks."""

    segment: Segment
    span: Span
    windows: list[tuple[Span, np.ndarray]]  # rows of windows with foreground, and their pixels [h, w, C]
    skipped: int
    valid: np.ndarray  # cells of the row of blocks under the column  # [h, w] bool
    faults: tuple[str, ...]
    last: bool  # of its segment


def ahead(items: Iterator[Item], depth: int = QUEUED) -> Iterator[Item]:
    """Yield items that another thread makes ahead, at most ``depth`` of them; its exception is raised here."""
    waiting: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    ended = threading.Event()

    def put(entry: tuple[Item | None, BaseException | None]) -> bool:
        while not ended.is_set():
            try:
                waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        ended.set()
        thread.join()


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return the function of glibc that returns freed memory to the system; None with other libraries."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return freed memory to the system: glibc keeps much of it, and the more, the longer a run takes."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


def part_name(row: int, column: int) -> str:
    """Name of a block's sidecar."""
    return f"{row:05d}-{column:05d}"


class Worker:
    """Makes blocks of a job.

    Args:
        job: what to make.
        model: features of windows.
        tick: called with the number of windows done, the background's among them.
    """

    def __init__(self, job: Job, model: Upsampler, tick: Callable[[int], object]) -> None:
        self.job, self.model, self.tick = job, model, tick
        self.answers = job.answers.to(model.device)
        self.plane = job.source.open()
        self.pixels = Pixels(self.plane, job.source, model)
        self.progress = Progress(job.home)
        self._weights: dict[Span, Tensor] = {}

    def close(self) -> None:
        """Close the input."""
        self.plane.reader.close()

    def run(self, segments: Sequence[Segment]) -> None:
        """Make all blocks of segments.

        Raises:
            InputError: a broken tile if the job is strict; results that are not finite, or cannot be written.
        """
        grid = self.job.grid
        waiting: deque[Future[None]] = deque()
        columns = ahead(column for segment in segments for column in self._columns(segment))
        with ThreadPoolExecutor(1) as writer, torch.no_grad():
            try:
                sums = None
                for column in columns:
                    if sums is None:
                        sums = _Sums(
                            grid, column.segment, self.answers.channels(self._dim), self.model.device
                        )
                    while sums.block < column.segment.last and column.span.first >= sums.end:
                        self._emit(sums, writer, waiting)
                    self._blend(column, sums)
                    if column.last:
                        while sums.block < column.segment.last:
                            self._emit(sums, writer, waiting)
                        sums = None
                while waiting:
                    waiting.popleft().result()
            finally:
                columns.close()
                for future in waiting:
                    future.cancel()

    @property
    def _dim(self) -> int:
        return self.model.vit_up.config.dim

    def _emit(self, sums: _Sums, writer: ThreadPoolExecutor, waiting: deque[Future[None]]) -> None:
        """Hand a block that no further window touches to the writer."""
        waiting.append(writer.submit(self._write, sums.take()))
        while len(waiting) > QUEUED:
            waiting.popleft().result()

    def _write(self, block: _Block) -> None:
        """Finish a block, write it, and its sidecar last."""
        products = self.answers.finish(block.sums, block.norm, block.valid)
        job = self.job
        try:
            for store in job.stores:
                store.write(block.row, block.column, products[store.product.name])
            files = [store.file(block.row, block.column) for store in job.stores]
            facts = {"computed": block.computed, "faults": sorted(block.faults)}
            if job.tolerance is not None:
                facts["spent"] = block.spent._asdict()
            self.progress.finish(part_name(block.row, block.column), job.output, files, facts)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"{brief(job.output, 500)}: cannot be written ({reason}). "
                "Blocks written so far are complete: the same command goes on."
            ) from error

    def _columns(self, segment: Segment) -> Iterator[Column]:
        """Read the columns of windows that touch a segment, from left to right."""
        grid, plane = self.job.grid, self.plane
        rows = grid.rows_of(segment.row)
        spans = grid.columns_of(segment)
        top, bottom = rows[0].start, min(grid.height, rows[-1].start + grid.window)
        pixel_bytes = plane.reader.channels * (1 if plane.reader.dtype == np.uint8 else 8)
        # Pieces lie at fixed places, so that their averages are the same whoever reads them.
        width = max(1, PIECE_BYTES // (pixel_bytes * (bottom - top)))
        pieces: dict[int, Region] = {}
        for span in spans:
            right = min(grid.width, span.start + grid.window)
            valid = self._foreground(segment.row, span)
            faults: list[str] = []
            strip = None
            if valid.any():
                needed = range(span.start // width, (right - 1) // width + 1)
                pieces = {number: piece for number, piece in pieces.items() if number >= needed[0]}
                for number in needed:
                    if number not in pieces:
                        give_back()
                        left = number * width
                        region = plane.read(top, left, bottom - top, min(width, grid.width - left))
                        faults += region.faults
                        pieces[number] = Region(self.pixels.filled(region), region.valid)
                strip = _cut(
                    [pieces[number] for number in needed], span.start - needed[0] * width, right - span.start
                )
                if strip.valid is not None:
                    valid &= self._sampled(strip.valid, segment.row, span, top)
            windows = []
            first, _ = grid.band(segment.row)
            for row in rows:
                inside = valid[max(0, row.first - first) : max(0, row.last - first)]
                if strip is not None and inside.any():
                    part = strip.pixels[row.start - top : row.start - top + grid.window]
                    windows.append((row, fill_window(part, grid.window)))
            skipped = len(rows) - len(windows)
            yield Column(segment, span, windows, skipped, valid, tuple(faults), span == spans[-1])

    def _foreground(self, row: int, span: Span) -> np.ndarray:  # [h, w] bool
        """Cells of a row of blocks under a column that the mask leaves."""
        grid, mask = self.job.grid, self.job.mask
        first, last = grid.band(row)
        if mask is None:
            return np.ones((last - first, span.last - span.first), bool)
        rows = grid.sample(0, first, last, mask.shape[0])
        return mask[np.ix_(rows, grid.sample(1, span.first, span.last, mask.shape[1]))]

    def _sampled(self, valid: np.ndarray, row: int, span: Span, top: int) -> np.ndarray:  # [h, w] bool
        """Whether the pixels under the cells' centres are valid."""
        y = self.job.grid.centres(0, *self.job.grid.band(row)) - top
        x = self.job.grid.centres(1, span.first, span.last) - span.start
        return valid[np.ix_(y.astype(np.int64), x.astype(np.int64))]

    def _blend(self, column: Column, sums: _Sums) -> None:
        """Compute the windows of a column and add them, weighted."""
        if column.faults and self.job.strict:
            raise InputError(f"{column.faults[0]}; --strict stops here.")
        sums.faults.update(column.faults)
        sums.set_valid(column.span, column.valid)
        groups: dict[tuple[bool, int], list[tuple[Span, np.ndarray]]] = {}
        grid = self.job.grid
        for row, pixels in column.windows:
            regular = grid.is_regular(row) and grid.is_regular(column.span)
            groups.setdefault((regular, row.last - row.first), []).append((row, pixels))
        for (regular, _), windows in groups.items():
            parts = -(-len(windows) // self.job.batch)
            edges = [len(windows) * i // parts for i in range(parts + 1)]
            for a, b in pairwise(edges):
                spent = self._blend_batch(windows[a:b], column.span, regular, sums)
                # A window counts for the block that it begins in, however the row was cut and continued.
                if column.span.first >= sums.left:
                    sums.computed += b - a
                    sums.spent = sums.spent.plus(spent)
                self.tick(b - a)
        if column.skipped:
            self.tick(column.skipped)

    def _blend_batch(
        self, windows: list[tuple[Span, np.ndarray]], span: Span, regular: bool, sums: _Sums
    ) -> Spent:
        """Compute windows that have as many cells each, and add them."""
        rows = [row for row, _ in windows]
        images = self.pixels.normalised([pixels for _, pixels in windows])
        size = rows[0].last - rows[0].first, span.last - span.first
        tolerance = self.job.tolerance
        coords = None
        if tolerance or not regular:
            coords = torch.stack([self._coords(row, span) for row in rows])
        if tolerance:
            pitch = float(self.job.grid.stride / self.job.grid.window)
            out, report = self.answers.of_windows_adaptively(
                self.model, images, size, coords, pitch, tolerance
            )
            spent = Spent.of(report, self.answers.by_margin)
        else:
            out = self.answers.of_windows(self.model, images, size, coords)
            cells = len(rows) * size[0] * size[1]
            spent = Spent(cells, cells)
        for row, values in zip(rows, out, strict=True):
            weight = self._weight(row)[:, None] * self._weight(span)
            sums.add(row, span, values, weight)
        return spent

    def _coords(self, row: Span, span: Span) -> Tensor:  # [h * w, 2]
        """Cell centres of a window in [0, 1]."""
        grid = self.job.grid
        y, x = (torch.from_numpy(grid.offsets(s) / grid.window).float() for s in (row, span))
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2)

    def _weight(self, span: Span) -> Tensor:
        """Blending weights along one axis, on the model's device."""
        if span not in self._weights:
            if len(self._weights) > 4096:
                self._weights.clear()
            self._weights[span] = torch.from_numpy(self.job.grid.weights(span)).to(self.model.device)
        return self._weights[span]


class Spent(NamedTuple):
    """What adaptive windows have cost, and how far they may be off."""

    cells: int = 0
    queries: int = 0
    error: float = 0.0  # sum over the cells: of squares of the relative error, or of chances of another label

    def plus(self, *others: Spent) -> Spent:
        """Add up."""
        return Spent(*map(sum, zip(self, *others, strict=True)))

    @classmethod
    def of(cls, report: AdaptiveReport, by_margin: bool) -> Spent:
        """Sum up a batch of windows."""
        errors = (error if by_margin else error**2 for error in report.error)
        return cls(report.cells * len(report.queries), sum(report.queries), report.cells * sum(errors))

    def report(self, by_margin: bool) -> AdaptiveReport:
        """Say what all windows together have cost."""
        mean = self.error / max(1, self.cells)
        return AdaptiveReport(self.cells, (self.queries,), (mean if by_margin else math.sqrt(mean),))


class _Block(NamedTuple):
    """A block that all its windows were added to."""

    row: int
    column: int
    sums: Tensor  # [h, w, channels]
    norm: Tensor  # [h, w]
    valid: np.ndarray  # [h, w] bool
    computed: int  # windows that begin in it
    faults: frozenset[str]
    spent: Spent


class _Sums:
    """Weighted sums of a block and of what its windows already say of the next ones."""

    def __init__(self, grid: Grid, segment: Segment, channels: int, device: torch.device) -> None:
        self.grid, self.row, self.block = grid, segment.row, segment.first
        self.top, self.bottom = grid.band(segment.row)
        self.left = segment.first * grid.block
        shape = self.bottom - self.top, grid.block + grid.window_cells
        self.sums = torch.zeros(*shape, channels, dtype=torch.float32, device=device)
        self.norm = torch.zeros(shape, dtype=torch.float32, device=device)
        self.valid = np.zeros(shape, bool)
        self.computed = 0
        self.faults: set[str] = set()
        self.spent = Spent()

    @property
    def end(self) -> int:
        """The first cell to the right of the block."""
        return self.left + self.grid.block

    def _columns(self, span: Span) -> tuple[slice, slice]:
        """Where a column lies here, and which of its cells do."""
        first = max(span.first, self.left)
        last = min(span.last, self.left + self.valid.shape[1])
        return slice(first - self.left, max(first, last) - self.left), slice(
            first - span.first, max(first, last) - span.first
        )

    def set_valid(self, span: Span, valid: np.ndarray) -> None:
        """Say which cells under a column are to be answered."""
        here, there = self._columns(span)
        self.valid[:, here] = valid[:, there]

    def add(self, row: Span, span: Span, values: Tensor, weight: Tensor) -> None:
        """Add the cells of a window, [h, w, channels], with their weights [h, w]."""
        here, there = self._columns(span)
        first, last = max(row.first, self.top), min(row.last, self.bottom)
        rows, source = slice(first - self.top, last - self.top), slice(first - row.first, last - row.first)
        weight = weight[source, there]
        self.sums[rows, here].addcmul_(values[source, there], weight.unsqueeze(-1))
        self.norm[rows, here] += weight

    def take(self) -> _Block:
        """Return the block and move on to the next one."""
        block = self.grid.block
        width = min(block, self.grid.cells[1] - self.left)
        taken = _Block(
            self.row,
            self.block,
            self.sums[:, :width].clone(),
            self.norm[:, :width].clone(),
            self.valid[:, :width].copy(),
            self.computed,
            frozenset(self.faults),
            self.spent,
        )
        for array in (self.sums, self.norm, self.valid):
            rest = array.shape[1] - block
            array[:, :rest] = (
                array[:, block:].clone() if isinstance(array, Tensor) else array[:, block:].copy()
            )
            array[:, rest:] = 0
        self.left += block
        self.block += 1
        self.computed, self.faults, self.spent = 0, set(), Spent()
        return taken


def _cut(pieces: list[Region], left: int, width: int) -> Region:
    """Copy a range of columns out of pieces that lie side by side, which may then be let go."""
    pixels, valid = [], []
    for piece in pieces:
        inside = slice(max(0, left), max(0, left + width))
        pixels.append(piece.pixels[:, inside])
        valid.append(None if piece.valid is None else piece.valid[:, inside])
        left -= piece.pixels.shape[1]
    known = None
    if any(v is not None for v in valid):
        each = [np.ones(p.shape[:2], bool) if v is None else v for p, v in zip(pixels, valid, strict=True)]
        known = np.concatenate(each, axis=1)
    return Region(np.concatenate(pixels, axis=1), known)


def fill_window(pixels: np.ndarray, window: int) -> np.ndarray:  # [window, window, C]
    """Repeat the last row and column of an image that is smaller than a window."""
    height, width = pixels.shape[:2]
    if (height, width) == (window, window):
        return pixels
    return np.pad(pixels, ((0, window - height), (0, window - width), (0, 0)), mode="edge")


def missing_blocks(job: Job, blocks: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks that are not finished, or whose files are not what their sidecars say."""
    progress = Progress(job.home)
    return [b for b in blocks if progress.finished(part_name(*b), job.output) is None]


def seconds_per_window(job: Job, model: Upsampler) -> float:
    """Measure how long a window takes in a batch."""
    grid = job.grid
    row, column = grid.rows[len(grid.rows) // 2], grid.columns[len(grid.columns) // 2]
    size = row.last - row.first, column.last - column.first
    images = torch.zeros(job.batch, 3, grid.window, grid.window, dtype=torch.float32, device=model.device)
    answers = job.answers.to(model.device)
    y, x = (torch.from_numpy(grid.offsets(s) / grid.window).float() for s in (row, column))
    pairs = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)
    coords = None if grid.is_regular(row) and grid.is_regular(column) else pairs.expand(job.batch, -1, -1)
    seconds = float("inf")
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            answers.of_windows(model, images, size, coords).sum().item()
            seconds = min(seconds, time.perf_counter() - start)
            if seconds > 10:
                break
    return seconds / job.batch
