"""``vitup-fast bench``: speed and accuracy against plain PyTorch; ``vitup_fast.bench`` does the work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import require
from .guards import interruptible


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Name the subcommand; the benchmark describes its arguments itself."""
    commands.add_parser("bench", help="measure speed and accuracy against plain PyTorch", add_help=False)


def run(arguments: Sequence[str]) -> int:
    """Run the benchmark; return its exit code."""
    end_to_end = require("vitup_fast.bench.end_to_end", "dev", "the benchmark")
    with interruptible():
        return end_to_end.main(arguments, prog="vitup-fast bench")
