"""Benchmark of film_mlp: scattered queries with the position MLP, and grid queries with its table.

``python -m vitup_fast.bench.film_mlp --device cpu``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import OperationCase, Work, operation_main, real_sizes

from vitup_fast import ViTUpConfig


def cases(config: ViTUpConfig, queries: int, itemsize: int) -> list[OperationCase]:
    """Count the MLP (D -> 4D -> D), and for scattered queries the position MLP (66 -> D -> 2D) before it.

    Queries of the table lie on a 32 x 32 grid of tokens, whose cell centres float32 holds exactly.
    """
    sizes = real_sizes(config, queries)
    N, D = sizes.N, sizes.D
    mlp, position = 8 * D**2, 2 * D**2 + 66 * D
    traffic = 2 * N * D + D * sizes.token_grid[0] * sizes.token_grid[1] + mlp
    scattered = Work(2 * N * (mlp + position), (traffic + position) * itemsize)
    grid = Work(2 * N * mlp, traffic * itemsize)
    return [
        OperationCase("film_mlp", "film_mlp (scattered)", sizes, scattered),
        OperationCase("film_mlp_table", "film_mlp (grid)", sizes._replace(token_grid=(32, 32)), grid),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    return operation_main("Benchmark of film_mlp.", cases, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
