"""Queries on a regular grid: cells placed exactly over tokens, and tables of what their relative positions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import FilmTable, PositionWeights
from ..ops.film_mlp import film_gamma_beta

# A table of relative positions is computed once per call up to this many rows, beyond that once per chunk.
SHARED_TABLE_ROWS = 2048


class Queries(NamedTuple):
    """Coordinates of queries, and per block a table of their relative positions if they share some."""

    coords: Tensor  # [B, n, 2]
    tables: Sequence[FilmTable | None]


class GridAxis(NamedTuple):
    """The cells of one axis of a regular grid, placed exactly in rational arithmetic."""

    coords: Tensor  # [n] cell centres in [0, 1]
    token: Tensor  # [n] index of the nearest token
    phase: Tensor  # [n] index into relative
    relative: Tensor  # [R] distinct relative positions in token units

    @classmethod
    def create(cls, cells: int, tokens: int, dtype: torch.dtype, device: torch.device) -> GridAxis:
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

    def part(self, cells: slice, keep_relative: bool = False) -> GridAxis:
        """A run of cells, with all relative positions or only those that occur in it."""
        phase, relative = self.phase[cells], self.relative
        if not keep_relative:
            used, phase = torch.unique(phase, return_inverse=True)
            relative = relative[used]
        return GridAxis(self.coords[cells], self.token[cells], phase, relative)


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
    ) -> None:
        self.size, self.token_grid, self.batch = size, token_grid, batch
        self.freqs, self.positions, self.tabulates = freqs, positions, most_rows is not None
        self.rows, self.columns = (
            GridAxis.create(cells, tokens, dtype, device)
            for cells, tokens in zip(size, token_grid, strict=True)
        )
        distinct = len(self.rows.relative) * len(self.columns.relative)
        self.shared = None
        if most_rows is not None and distinct <= most_rows:
            self.shared = self._gamma_beta(self.rows.relative, self.columns.relative)

    def queries(self, span: slice) -> Queries:
        """The queries of whole rows or of a part of one, with tables where enough share relative positions.

        Args:
            span: of the cells, counted row by row.
        """
        _, W = self.size
        y, x = slice(span.start // W, (span.stop - 1) // W + 1), slice(0, W)
        if y.stop - y.start == 1:
            x = slice(span.start % W, (span.stop - 1) % W + 1)
        keep = self.shared is not None
        rows, columns = self.rows.part(y, keep), self.columns.part(x, keep)
        grid_y, grid_x = torch.meshgrid(rows.coords, columns.coords, indexing="ij")
        coords = torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1).expand(self.batch, -1, -1)  # [B, n, 2]
        distinct = len(rows.relative) * len(columns.relative)
        if not self.tabulates or (self.shared is None and 2 * distinct > coords.shape[1]):
            return Queries(coords, [None] * len(self.positions))
        tables = self._gamma_beta(rows.relative, columns.relative) if self.shared is None else self.shared
        row = (rows.phase[:, None] * len(columns.relative) + columns.phase).flatten()  # [n]
        token = (rows.token[:, None] * self.token_grid[1] + columns.token).flatten()  # [n]
        return Queries(coords, [FilmTable(gamma_beta, row, token) for gamma_beta in tables])

    def cells(self, cells: Tensor) -> Queries:  # [n]
        """The queries of any cells, counted row by row, with the table of all relative positions if there is one."""
        y, x = cells // self.size[1], cells % self.size[1]
        coords = torch.stack((self.columns.coords[x], self.rows.coords[y]), dim=-1).expand(self.batch, -1, -1)
        if self.shared is None:
            return Queries(coords, [None] * len(self.positions))
        row = self.rows.phase[y] * len(self.columns.relative) + self.columns.phase[x]  # [n]
        token = self.rows.token[y] * self.token_grid[1] + self.columns.token[x]  # [n]
        return Queries(coords, [FilmTable(gamma_beta, row, token) for gamma_beta in self.shared])

    def _gamma_beta(self, relative_y: Tensor, relative_x: Tensor) -> list[Tensor]:
        """``[gamma, beta]`` of every block for all pairs of relative positions, in float32 or better."""
        y, x = torch.meshgrid(relative_y, relative_x, indexing="ij")
        relative = torch.stack((x, y), dim=-1).flatten(0, 1)  # [R, 2]
        with torch.autocast(relative.device.type, enabled=False):
            return [
                film_gamma_beta(relative, self.freqs, PositionWeights(*(t.to(y.dtype) for t in position)))
                for position in self.positions
            ]


def cell_centres(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres ``((j + 0.5) / W, (i + 0.5) / H)`` of the cells of a grid, row by row.  # [H * W, 2]"""
    y, x = ((torch.arange(n, dtype=dtype, device=device) + 0.5) / n for n in size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)
