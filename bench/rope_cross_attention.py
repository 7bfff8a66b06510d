"""Benchmark of rope_cross_attention: projection, rotation, attention to 28 x 28 tokens, projection.

``python -m vitup_fast.bench.rope_cross_attention --device cpu``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import OperationCase, Work, operation_main, real_sizes

from vitup_fast import ViTUpConfig


def cases(config: ViTUpConfig, queries: int, itemsize: int) -> list[OperationCase]:
    """Two projections, scores and weighted sum per query; reads matrices, keys and values once."""
    sizes = real_sizes(config, queries)
    N, D, tokens = sizes.N, sizes.D, sizes.token_grid[0] * sizes.token_grid[1]
    work = Work(N * (4 * D**2 + 4 * tokens * D), (2 * N * D + 2 * D**2 + 2 * tokens * D) * itemsize)
    return [OperationCase("rope_cross_attention", "rope_cross_attention", sizes, work)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    return operation_main("Benchmark of rope_cross_attention.", cases, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
