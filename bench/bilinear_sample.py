"""Benchmark of bilinear_sample: scattered rows of the fine patch grid, bound by memory.

``python -m vitup_fast.bench.bilinear_sample --device cpu``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import OperationCase, Work, operation_main, real_sizes

from vitup_fast import ViTUpConfig


def cases(config: ViTUpConfig, queries: int, itemsize: int) -> list[OperationCase]:
    """Sample N queries from a 224 x 224 grid; each reads four rows and writes one."""
    sizes = real_sizes(config, queries)
    work = Work(flops=8 * sizes.N * sizes.D, bytes=sizes.N * (5 * sizes.D * itemsize + 8))
    return [OperationCase("bilinear_sample", "bilinear_sample", sizes, work)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    return operation_main("Benchmark of bilinear_sample.", cases, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
