"""Benchmark of all five operations, one after the other.

``python -m vitup_fast.bench.operations --device cpu``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitup_fast.bench import bilinear_sample, film_mlp, norm_linear, residual_mlp, rope_cross_attention
from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import OperationCase, operation_main

from vitup_fast import ViTUpConfig


def cases(config: ViTUpConfig, queries: int, itemsize: int) -> list[OperationCase]:
    """List the cases of all operations, in the order in which a query meets them."""
    operations = (bilinear_sample, residual_mlp, rope_cross_attention, film_mlp, norm_linear)
    return [case for operation in operations for case in operation.cases(config, queries, itemsize)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    return operation_main("Benchmark of all five operations.", cases, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
