"""Benchmark of norm_linear: the decoder, LayerNorm and a D -> D linear layer.

``python -m vitup_fast.bench.norm_linear --device cpu``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import OperationCase, Work, operation_main, real_sizes

from vitup_fast import ViTUpConfig


def cases(config: ViTUpConfig, queries: int, itemsize: int) -> list[OperationCase]:
    """One matrix product per query; reads and writes the query, reads the matrix."""
    sizes = real_sizes(config, queries, expansion=1)
    D = sizes.D
    work = Work(2 * sizes.N * D**2, (2 * sizes.N * D + D**2) * itemsize)
    return [OperationCase("norm_linear", "norm_linear (decoder)", sizes, work)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    return operation_main("Benchmark of norm_linear.", cases, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
