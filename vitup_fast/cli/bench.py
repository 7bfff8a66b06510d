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
    """Run the benchmark, of windows or images if they are named first; return its exit code."""
    if arguments[:1] in (["windows"], ["images"]):
        name, arguments = arguments[0], arguments[1:]
        prog = f"vitup-fast bench {name}"
    else:
        name, prog = "end_to_end", "vitup-fast bench"
    benchmark = require(f"vitup_fast.bench.{name}", "dev", "the benchmark")
    with interruptible():
        return benchmark.main(arguments, prog=prog)
