"""Benchmark of residual_mlp: the transition (D -> 2D -> D) and the MLP (D -> 4D -> D) of a block.

``python -m vitup_fast.bench.residual_mlp --device cpu``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import OperationCase, Work, operation_main, real_sizes

from vitup_fast import ViTUpConfig


def cases(config: ViTUpConfig, queries: int, itemsize: int) -> list[OperationCase]:
    """Two matrix products per query; reads and writes the query, reads both matrices."""
    found = []
    for name, expansion in (("transition", 2), ("mlp", 4)):
        sizes = real_sizes(config, queries, expansion)
        matrices = 2 * expansion * sizes.D**2
        work = Work(2 * sizes.N * matrices, (2 * sizes.N * sizes.D + matrices) * itemsize)
        found.append(OperationCase("residual_mlp", f"residual_mlp ({name})", sizes, work))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    return operation_main("Benchmark of residual_mlp.", cases, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
