"""Queries on a regular grid: cells placed exactly over tokens, and tables of what their relative positions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import FilmTable, PositionWeights
from ..ops.coordinates import position_code
from ..ops.film_mlp import film_gamma_beta

# A table of relative positions is computed once per call up to this many rows, beyond that once per chunk.
SHARED_TABLE_ROWS = 2048
# Bytes for each row and column: where it lies, its nearest token, and both again as they are put together.
LINE_BYTES = 104


class Queries(NamedTuple):
    """Coordinates of queries, and per block a table of their relative positions if they share some."""

    coords: Tensor  # [B, n, 2]
    tables: Sequence[FilmTable | None]
    shared: SharedPositions | None = None  # where the walk makes the tables


class SharedPositions(NamedTuple):
    """Relative positions that queries share, for a walk that computes ``[gamma, beta]`` of them itself."""

    relative: Tensor  # [R, 2] in token units
    row: Tensor  # [n] row of relative for each query
    token: Tensor  # [n] flat index of the nearest token


class GridAxis(NamedTuple):
    """The cells of one axis of a regular grid, placed exactly in rational arithmetic, in the CPU's memory."""

    coords: np.ndarray  # [n] cell centres in [0, 1]
    token: np.ndarray  # [n] index of the nearest token
    phase: np.ndarray  # [n] index into relative
    relative: np.ndarray  # [R] distinct relative positions in token units

    @classmethod
    def create(cls, cells: int, tokens: int, dtype: torch.dtype) -> GridAxis:
        """Place ``cells`` cell centres over ``tokens`` tokens; all counts in units of 1 / (2 cells) token."""
        centre = (2 * np.arange(cells, dtype=np.int64) + 1) * tokens
        token, remainder = np.divmod(centre - cells, 2 * cells)
        token += (remainder > cells) | ((remainder == cells) & (token % 2 == 1))  # ties to the even index
        token = token.clip(0, tokens - 1)
        relative, phase = np.unique(centre - (2 * token + 1) * cells, return_inverse=True)
        kind = np.float64 if dtype == torch.float64 else np.float32
        coords = ((np.arange(cells) + 0.5) / cells).astype(kind)
        return cls(coords, token, phase.astype(np.int64), (relative / (2 * cells)).astype(kind))

    def over_their_tokens(self, tokens: int) -> GridAxis:
        """The same with coordinates moved, by the last digit of a few, to where their nearest token is the exact one.

        A centre midway between two tokens may be rounded to the side of the other one.
        """
        coords, kind = self.coords.copy(), self.coords.dtype.type
        for _ in range(4):
            exact = coords.astype(np.float64) * tokens - 0.5
            # As computed step by step, with a fused multiply-add, and without rounding.
            found = [(coords * kind(tokens) - kind(0.5)), exact.astype(kind), exact]
            nearest = [np.rint(f).clip(0, tokens - 1).astype(np.int64) for f in found]
            high = np.any([n > self.token for n in nearest], axis=0)
            low = np.any([n < self.token for n in nearest], axis=0)
            if not (high | low).any():
                break
            coords[high] = np.nextafter(coords[high], kind(0))
            coords[low] = np.nextafter(coords[low], kind(1))
        return self._replace(coords=coords)

    def part(self, cells: slice) -> GridAxis:
        """A run of cells, with the relative positions that occur in it."""
        used, phase = np.unique(self.phase[cells], return_inverse=True)
        return GridAxis(self.coords[cells], self.token[cells], phase.astype(np.int64), self.relative[used])


class _Axes(NamedTuple):
    """Rows and columns of a grid where they are used; what belongs to a cell is the sum, or the pair, of both."""

    first: tuple[int, int]  # row and column
    coords: tuple[Tensor, Tensor]  # [H], [W]
    index: tuple[Tensor, Tensor]  # [2, H], [2, W]: row of the table, and token
    relative: tuple[Tensor, Tensor]  # [Ry], [Rx]


class Grid:
    """The cell centres of an H x W grid over the tokens of ``batch`` images, as queries.

    Args:
        size: rows and columns of cells, (H, W).
        token_grid: rows and columns of tokens, (h, w).
        batch: number of images B.
        dtype: of coordinates and tables, float32 or float64.
        device: where they are made.
        freqs: frequencies of the position code.
        positions: per block, the position MLP.
        most_rows: longest table that is computed once for all chunks; None computes no tables.
        per_chunk: compute the others for each chunk in which enough queries share relative positions; without it,
            the many small steps of which would cost a GPU more, each query has its own.
        for_walk: leave these to the walk, which gets the relative positions that a chunk shares.
    """

    def __init__(
        self,
        size: tuple[int, int],
        token_grid: tuple[int, int],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        freqs: Tensor,
        positions: Sequence[PositionWeights],
        most_rows: int | None,
        per_chunk: bool = True,
        for_walk: bool = False,
    ) -> None:
        self.size, self.token_grid, self.batch, self.dtype, self.device = (
            size,
            token_grid,
            batch,
            dtype,
            device,
        )
        self.freqs, self.positions = freqs, positions
        rows, columns = (GridAxis.create(*counts, dtype) for counts in zip(size, token_grid, strict=True))
        distinct = len(rows.relative) * len(columns.relative)
        shares = most_rows is not None and distinct <= most_rows
        if not per_chunk:
            shares = shares and 2 * distinct <= batch * size[0] * size[1]
        self.tables_per_chunk = most_rows is not None and not shares and per_chunk
        self.for_walk = most_rows is not None and not shares and for_walk
        if most_rows is not None and not shares:
            rows, columns = (
                axis.over_their_tokens(n) for axis, n in zip((rows, columns), token_grid, strict=True)
            )
        self.rows, self.columns = rows, columns
        self.axes = self._on_device(rows, columns, (0, 0))
        self.shared = self._gamma_beta(self.axes) if shares else None

    def queries(self, span: slice) -> Queries:
        """The queries of a part of the grid, with tables where enough share relative positions.

        Args:
            span: of the cells, counted row by row.
        """
        _, W = self.size
        axes, tables = self.axes, self.shared
        if self.tables_per_chunk:
            y, x = slice(span.start // W, (span.stop - 1) // W + 1), slice(0, W)
            if y.stop - y.start == 1:
                x = slice(span.start % W, (span.stop - 1) % W + 1)
            rows, columns = self.rows.part(y), self.columns.part(x)
            if 2 * len(rows.relative) * len(columns.relative) <= span.stop - span.start:
                axes = self._on_device(rows, columns, (y.start, x.start))
                tables = self._gamma_beta(axes)
        cells = torch.arange(span.start, span.stop, dtype=torch.int64, device=self.device)  # [n]
        queries = self._queries(cells, axes, tables)
        return queries._replace(shared=self._shared_positions(span, cells)) if self.for_walk else queries

    def cells(self, cells: Tensor) -> Queries:  # [n]
        """The queries of any cells, counted row by row, with the table of all relative positions if there is one."""
        return self._queries(cells, self.axes, self.shared)

    def _queries(self, cells: Tensor, axes: _Axes, tables: Sequence[Tensor] | None) -> Queries:
        """The queries of cells, by rows and columns that hold them, with tables if there are some."""
        y = cells.div(self.size[1], rounding_mode="floor") - axes.first[0]
        x = cells.remainder(self.size[1]) - axes.first[1]
        coords = torch.stack((axes.coords[1][x], axes.coords[0][y]), dim=-1).expand(self.batch, -1, -1)
        if tables is None:
            return Queries(coords, [None] * len(self.positions))
        row, token = (axes.index[0][:, y] + axes.index[1][:, x]).unbind()  # [n] each
        return Queries(coords, [FilmTable(gamma_beta, row, token) for gamma_beta in tables])

    def _shared_positions(self, span: slice, cells: Tensor) -> SharedPositions | None:
        """Relative positions of all columns in each row that a span touches, as many for all spans of its length.

        None where they are more than half as many as the queries.
        """
        (H, W), count = self.size, span.stop - span.start
        lines = min(H, (count + W - 2) // W + 1)
        wide = len(self.columns.relative)
        if 2 * lines * wide > count:
            return None
        first = min(span.start // W, H - lines)
        relative_y, relative_x = self.axes.relative
        phase_y = self.axes.index[0][0].div(wide, rounding_mode="floor")  # [H]
        own_y = relative_y[phase_y[first : first + lines]]
        along_y, along_x = torch.meshgrid(own_y, relative_x, indexing="ij")
        relative = torch.stack((along_x, along_y), dim=-1).flatten(0, 1)  # [lines * Rx, 2]
        y, x = cells.div(W, rounding_mode="floor"), cells.remainder(W)
        row = (y - first) * wide + self.axes.index[1][0][x]
        token = self.axes.index[0][1][y] + self.axes.index[1][1][x]
        return SharedPositions(relative, row, token)

    def _on_device(self, rows: GridAxis, columns: GridAxis, first: tuple[int, int]) -> _Axes:
        """Bring rows and columns to where they are used, in one copy that nothing waits for."""
        index = (
            np.stack((rows.phase * len(columns.relative), rows.token * self.token_grid[1])),
            np.stack((columns.phase, columns.token)),
        )
        floats = (rows.coords, columns.coords, rows.relative, columns.relative)
        packed = np.concatenate([a.astype(np.int64).ravel() for a in index] + [_as_words(a) for a in floats])
        on_device = torch.from_numpy(packed).to(self.device, non_blocking=True)
        parts = on_device.split([a.size for a in index] + [len(_as_words(a)) for a in floats])
        coords_y, coords_x, relative_y, relative_x = (
            part.view(self.dtype)[: len(a)] for part, a in zip(parts[2:], floats, strict=True)
        )
        return _Axes(
            first,
            (coords_y, coords_x),
            (parts[0].view(2, -1), parts[1].view(2, -1)),
            (relative_y, relative_x),
        )

    def _gamma_beta(self, axes: _Axes) -> list[Tensor]:
        """``[gamma, beta]`` of every block for all pairs of relative positions, in float32 or better."""
        y, x = torch.meshgrid(*axes.relative, indexing="ij")
        relative = torch.stack((x, y), dim=-1).flatten(0, 1)  # [R, 2]
        with torch.autocast(relative.device.type, enabled=False):
            if relative.device.type == "cuda":
                return self._gamma_beta_batched(relative)
            return [
                film_gamma_beta(relative, self.freqs, PositionWeights(*(t.to(y.dtype) for t in position)))
                for position in self.positions
            ]

    def _gamma_beta_batched(self, relative: Tensor) -> list[Tensor]:
        """The same in a few launches for all blocks together."""
        code = position_code(relative, self.freqs)  # [R, 2 + 4 F]
        weight1, bias1, weight2, bias2 = (
            torch.stack(layer).to(code.dtype) for layer in zip(*self.positions, strict=True)
        )
        code = code.expand(len(weight1), -1, -1)
        hidden = F.gelu(torch.baddbmm(bias1[:, None], code, weight1.mT))  # [L - 1, R, D]
        return list(torch.baddbmm(bias2[:, None], hidden, weight2.mT).unbind())


def _as_words(values: np.ndarray) -> np.ndarray:
    """Numbers as words of 64 bits, with a number of zero behind them where they do not fill the last."""
    padding = -values.nbytes % 8 // values.itemsize
    return np.concatenate((values, np.zeros(padding, values.dtype))).view(np.int64)


def cell_centres(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres ``((j + 0.5) / W, (i + 0.5) / H)`` of the cells of a grid, row by row.  # [H * W, 2]"""
    y, x = ((torch.arange(n, dtype=dtype, device=device) + 0.5) / n for n in size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)
