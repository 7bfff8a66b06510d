"""Adaptive maps: the network is asked where its answers change, and interpolated where they hardly do.

A lattice is refined in half steps, first by the centres of its cells, then by the middles of their edges; so each half
step doubles the points, and every new point lies amid four older ones. What a point is off the mean of these, its
*detail*, says what to expect of the points next to it in the following half step.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import expected

# Detail from one half step to the next, measured on photographs (bench/NOTES.md); white noise would keep it at 1.
DECAY = 0.76
# Points of the first lattice per token and axis, at least: fewer would overlook what happens inside a token.
START_DENSITY = 1.5
# Bytes for each cell of one image beside its answers: detail and error, a half step's positions and which are asked.
CELL_BYTES = 24
# Bytes for each row and column of the map: where the lattices of all levels have their points.
LINE_BYTES = 600

# Answers of all layers at cells of one image, counted row by row: [n] -> [n, E] each.
Ask: TypeAlias = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class AdaptiveReport:
    """What an adaptive map has cost, and how far it may be off; one entry for each image.

    Attributes:
        cells: cells of the map.
        queries: cells that the network was asked for; these are exact.
        error: estimated root mean square error of all cells, relative to the answers' root mean square; for labels
            the estimated share of cells with another label.
    """

    cells: int
    queries: tuple[int, ...]
    error: tuple[float, ...]

    @property
    def share(self) -> float:
        """Queries of all images as a share of their cells."""
        return sum(self.queries) / max(1, self.cells * len(self.queries))


def check_tolerance(tolerance: object) -> float | None:
    """Return a tolerance as a float, or None.

    Raises:
        InputError: not a finite number of at least 0.
    """
    if tolerance is None:
        return None
    is_number = isinstance(tolerance, numbers.Real) and not isinstance(tolerance, bool | np.bool_)
    if not is_number or not math.isfinite(tolerance) or tolerance < 0:
        raise expected("tolerance", "None or a finite number of at least 0", repr(tolerance))
    return float(tolerance)


def held_bytes(size: tuple[int, int], score_bytes: int) -> int:
    """Memory that filling a map takes beside its answers; ``score_bytes`` of it for the scores of each cell."""
    H, W = size
    return H * W * (CELL_BYTES + score_bytes) + (H + W) * LINE_BYTES


class _Axis(NamedTuple):
    """One axis of a lattice as it is refined: ``new`` positions halfway between ``kept`` ones."""

    kept: Tensor  # [k]
    new: Tensor  # [m]
    before: Tensor  # [m] the kept neighbours of new positions
    after: Tensor  # [m]
    weight: Tensor  # [m] of the one after in linear interpolation
    new_before: Tensor  # [k] the new neighbours of kept positions, at a border the only one twice
    new_after: Tensor  # [k]
    new_weight: Tensor  # [k]
    between: Tensor  # [k] 1 where there are new neighbours on both sides, else 0

    @classmethod
    def halve(cls, kept: np.ndarray, device: torch.device) -> _Axis:
        """Find the positions halfway between ascending ones."""
        new = (kept[:-1] + kept[1:]) // 2
        is_new = new > kept[:-1]
        before, new, after = kept[:-1][is_new], new[is_new], kept[1:][is_new]
        between = np.zeros(len(kept))
        new_before = new_after = np.zeros_like(kept)
        if len(new):
            between[1:-1] = is_new[:-1] & is_new[1:]
            place = np.searchsorted(new, kept)
            new_before, new_after = new[(place - 1).clip(0)], new[place.clip(0, len(new) - 1)]
        gap = np.maximum(new_after - new_before, 1)
        parts = (kept, new, before, after, (new - before) / (after - before))
        parts += (new_before, new_after, ((kept - new_before) / gap).clip(0, 1), between)
        kinds = (torch.float32 if part.dtype == np.float64 else torch.int64 for part in parts)
        return cls(*(torch.from_numpy(p).to(device, kind) for p, kind in zip(parts, kinds, strict=True)))


class _Parents(NamedTuple):
    """The K older points amid which each new one lies, and their weights: a row's times a column's."""

    row: Tensor  # [R, K]
    column: Tensor  # [C, K]
    row_weight: Tensor  # [R, K]
    column_weight: Tensor  # [C, K]

    @classmethod
    def create(cls, *parents: tuple[Tensor, Tensor, Tensor, Tensor]) -> _Parents:
        """Join parents, each given by rows, columns, and the weights of both."""
        return cls(*(torch.stack(part, dim=-1) for part in zip(*parents, strict=True)))

    def transposed(self) -> _Parents:
        """The same with rows and columns exchanged."""
        return _Parents(self.column, self.row, self.column_weight, self.row_weight)

    def cells(self, rows: slice, width: int) -> Tensor:  # [n, K]
        """Cells of the parents of a run of rows, row by row."""
        return (self.row[rows, None] * width + self.column).flatten(0, 1)

    def weights(self, rows: slice) -> Tensor:  # [n, K]
        """Their weights."""
        return (self.row_weight[rows, None] * self.column_weight).flatten(0, 1)


class _Candidates(NamedTuple):
    """New points of a half step: all pairs of some rows and columns."""

    rows: Tensor  # [R]
    columns: Tensor  # [C]
    parents: _Parents  # whose values make the prediction
    nearest: _Parents  # whose details make the expectation

    def cells(self, width: int) -> Tensor:
        """Their cells, row by row.  # [R * C]"""
        return (self.rows[:, None] * width + self.columns).flatten()

    @classmethod
    def centres(cls, y: _Axis, x: _Axis) -> _Candidates:
        """The centres of a lattice's cells."""
        parents = _Parents.create(
            *(
                (row, column, row_weight, column_weight)
                for row, row_weight in ((y.before, 1 - y.weight), (y.after, y.weight))
                for column, column_weight in ((x.before, 1 - x.weight), (x.after, x.weight))
            )
        )
        return cls(y.new, x.new, parents, parents)

    @classmethod
    def upright(cls, y: _Axis, x: _Axis) -> _Candidates:
        """The middles of a lattice's upright edges: between two of its points, and between two centres if it can be."""
        share = 1 - x.between / 2
        ends = [(y.before, x.kept, 1 - y.weight, share), (y.after, x.kept, y.weight, share)]
        if not len(x.new):
            parents = _Parents.create(*ends)
            return cls(y.new, x.kept, parents, parents)
        one, rest = torch.ones_like(y.weight), 1 - share
        beside = [
            (y.new, x.new_before, one, rest * (1 - x.new_weight)),
            (y.new, x.new_after, one, rest * x.new_weight),
        ]
        return cls(y.new, x.kept, _Parents.create(*ends, *beside), _Parents.create(*beside))

    def transposed(self) -> _Candidates:
        """The same with rows and columns exchanged."""
        return _Candidates(self.columns, self.rows, self.parents.transposed(), self.nearest.transposed())


class _HalfStep(NamedTuple):
    """New points of a lattice that has one for every ``area`` cells."""

    area: float
    candidates: tuple[_Candidates, ...]


class Refinement:
    """The lattices of an H x W map, from a coarse one to all cells.

    Args:
        size: rows and columns of cells, (H, W).
        token_grid: rows and columns of tokens under the cells, (h, w).
        device: of the map.
    """

    def __init__(self, size: tuple[int, int], token_grid: tuple[float, float], device: torch.device) -> None:
        self.size = size
        # An axis of one cell has nothing to refine.
        per_token = min((n / t for n, t in zip(size, token_grid, strict=True) if n > 1), default=1.0)
        level = math.floor(math.log2(max(1.0, per_token / START_DENSITY)))
        kept = [np.unique(np.append(np.arange(0, n, 1 << level), n - 1)) for n in size]
        self.start = tuple(torch.from_numpy(k).to(device) for k in kept)
        self.steps: list[_HalfStep] = []
        for stride in (1 << k for k in range(level, 0, -1)):
            y, x = (_Axis.halve(k, device) for k in kept)
            edges = _Candidates.upright(y, x), _Candidates.upright(x, y).transposed()
            self.steps.append(_HalfStep(stride**2 / 2, (_Candidates.centres(y, x),)))
            self.steps.append(_HalfStep(stride**2 / 4, edges))
            kept = [np.union1d(k, (k[:-1] + k[1:]) // 2) for k in kept]

    def fill(
        self, layers: Sequence[Tensor], ask: Ask, tolerance: float, by_margin: bool, most: int
    ) -> tuple[int, Tensor]:
        """Fill the map of one image.

        Args:
            layers: memory for the answers at all cells, row by row.  # [H * W, E] each
            ask: the network.
            tolerance: a cell is asked for where the error expected of its prediction, times the square root of the
                cells for each of its lattice, exceeds this; relative to the answers' root mean square.
            by_margin: relative to the margin of the largest score before the second instead.
            most: cells that are asked for or predicted at once.

        Returns:
            How many cells were asked for, and the error to be expected of all, as :class:`AdaptiveReport` has it.
        """
        state = _Map(layers, self.size[1], by_margin, most)
        asked = state.ask_first(ask, *self.start)
        for step in self.steps:
            wanted = torch.cat([state.predict(c, tolerance**2 / step.area) for c in step.candidates])
            cells = torch.cat([c.cells(self.size[1]) for c in step.candidates])[wanted]
            state.ask(ask, cells)
            asked += len(cells)
        return asked, state.expected_error()


class _Map:
    """What is known of one image's map as it is filled, and how well.

    Args:
        layers: answers at all cells.  # [H * W, E] each
        width: cells of a row.
        by_margin: see :meth:`Refinement.fill`.
        most: cells that are worked on at once.
    """

    def __init__(self, layers: Sequence[Tensor], width: int, by_margin: bool, most: int) -> None:
        self.layers, self.width, self.by_margin, self.most = layers, width, by_margin, most
        cells, device = len(layers[0]), layers[0].device
        self.wide = torch.promote_types(layers[0].dtype, torch.float32)
        # Squares: of the detail of a point, and of the error to be expected there.
        self.detail = torch.zeros(cells, dtype=torch.float32, device=device)
        self.error = torch.zeros(cells, dtype=torch.float32, device=device)
        self.power = [torch.ones((), dtype=self.wide, device=device) for _ in layers]

    def ask_first(self, ask: Ask, rows: Tensor, columns: Tensor) -> int:
        """Ask for all points of a lattice, and take their second differences for details."""
        cells = (rows[:, None] * self.width + columns).flatten()
        for part in cells.split(self.most):
            for layer, answer in zip(self.layers, ask(part), strict=True):
                layer.index_copy_(0, part, answer)
        if not self.by_margin:
            for layer, power in zip(self.layers, self.power, strict=True):
                sums = [layer[part].to(self.wide).square().sum() for part in cells.split(self.most)]
                power.copy_((torch.stack(sums).sum() / len(cells)).clamp_min(torch.finfo(self.wide).tiny))
        known = []
        for positions, others, turned in ((rows, columns, False), (columns, rows, True)):
            if len(positions) < 3:
                continue
            inner = torch.arange(len(positions), dtype=torch.int64, device=cells.device).clamp(
                1, len(positions) - 2
            )
            before, here, after = (positions[inner + k] for k in (-1, 0, 1))
            weight = (here - before) / (after - before)
            ones = torch.ones(len(others), dtype=weight.dtype, device=cells.device)
            at = _Parents.create((here, others, torch.ones_like(weight), ones))
            around = _Parents.create((before, others, 1 - weight, ones), (after, others, weight, ones))
            if turned:
                at, around = at.transposed(), around.transposed()
            found = torch.empty(len(cells), dtype=torch.float32, device=cells.device)
            for strip, span in self._strips(len(rows), len(columns)):
                found[span] = self._size(
                    [self._mix(v, at, strip).to(self.wide) - self._mix(v, around, strip) for v in self.layers]
                )
            known.append(found)
        # Of two points in a row nothing is known of what lies between.
        unknown = torch.full((len(cells),), torch.inf, dtype=torch.float32, device=cells.device)
        self.detail.index_copy_(0, cells, torch.stack(known).mean(0) if known else unknown)
        return len(cells)

    def predict(self, new: _Candidates, least: float) -> Tensor:  # [n]
        """Interpolate at new points, and say for which the error to be expected makes asking worth it."""
        cells = new.cells(self.width)
        wanted = torch.empty(len(cells), dtype=torch.bool, device=cells.device)
        for strip, span in self._strips(len(new.rows), len(new.columns)):
            detail = self.detail[new.nearest.cells(strip, self.width)].mean(-1) * DECAY**2
            limit: float | Tensor = least
            for layer in self.layers:
                predicted = self._mix(layer, new.parents, strip)
                if self.by_margin:
                    limit = least * _margin(predicted.to(self.wide)).square()
                layer.index_copy_(0, cells[span], predicted)
            wanted[span] = ~(detail <= limit)
            inherited = (
                self.error[new.parents.cells(strip, self.width)].mul_(new.parents.weights(strip)).sum(-1)
            )
            self.error.index_copy_(0, cells[span], detail + inherited)
            self.detail.index_copy_(0, cells[span], detail)
        return wanted

    def ask(self, ask: Ask, cells: Tensor) -> None:
        """Ask for cells that were predicted, and see how far that was off."""
        for part in cells.split(self.most) if len(cells) else ():
            answers = ask(part)
            difference = [
                answer.to(self.wide) - layer[part] for layer, answer in zip(self.layers, answers, strict=True)
            ]
            self.detail.index_copy_(0, part, self._size(difference))
            self.error.index_fill_(0, part, 0)
            for layer, answer in zip(self.layers, answers, strict=True):
                layer.index_copy_(0, part, answer)

    def expected_error(self) -> Tensor:
        """The error to be expected of the whole map."""
        if not self.by_margin:
            return self.error.mean().sqrt()
        lost = []
        for scores, error in zip(self.layers[0].split(self.most), self.error.split(self.most), strict=True):
            ratio = _margin(scores.to(self.wide)) / (2 * error).sqrt()
            # A margin of 0 beside an error of 0 was asked for.
            lost.append(torch.special.erfc(ratio.nan_to_num(torch.inf)).sum() / 2)
        return torch.stack(lost).sum() / len(self.error)

    def _strips(self, rows: int, columns: int) -> list[tuple[slice, slice]]:
        """Runs of rows of new points, and where these lie among all of them."""
        lines = max(1, self.most // max(1, columns))
        starts = range(0, rows if columns else 0, lines)
        runs = [slice(start, min(rows, start + lines)) for start in starts]
        return [(run, slice(run.start * columns, run.stop * columns)) for run in runs]

    def _mix(self, values: Tensor, parents: _Parents, strip: slice) -> Tensor:  # [n, E]
        """Interpolate between parents; summed in float32 or better."""
        cells, weights = parents.cells(strip, self.width), parents.weights(strip).to(values.dtype)
        return F.embedding_bag(cells, values, mode="sum", per_sample_weights=weights)

    def _size(self, differences: Sequence[Tensor]) -> Tensor:  # [n, E] each -> [n]
        """Squares of details: of the layer where it is largest; of a difference of two scores for margins."""
        if self.by_margin:
            scores = differences[0]
            return 2 * scores.var(-1, correction=min(1, scores.shape[-1] - 1)).float()
        sizes = [d.square().sum(-1) / power for d, power in zip(differences, self.power, strict=True)]
        return torch.stack(sizes).amax(0).float()


def _margin(scores: Tensor) -> Tensor:  # [n, C] -> [n]
    """How far the largest score is before the second; infinitely of a single one."""
    if scores.shape[-1] == 1:
        return torch.full_like(scores[:, 0], torch.inf)
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    return first - second
