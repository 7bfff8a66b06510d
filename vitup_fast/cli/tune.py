"""``vitup-fast tune``: the kernels' fastest launch settings on this GPU; ``vitup_fast.bench.tune`` does the work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import require
from .guards import interruptible


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Name the subcommand; the tuner describes its arguments itself."""
    help = "find the fastest launch settings of the kernels on this GPU"
    commands.add_parser("tune", help=help, add_help=False)


def run(arguments: Sequence[str]) -> int:
    """Run the tuner; return its exit code."""
    tune = require("vitup_fast.bench.tune", "dev", "the tuner")
    with interruptible():
        return tune.main(arguments, prog="vitup-fast tune")
