"""Starts the command line: a module of its own, because importing the package, and PyTorch with it, takes a second.

Ctrl-C in that second ends the program in one line. Nothing has been written then, so nothing needs to be cleaned up.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Import and run the command line; return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from vitup_fast.cli import main as run

    return run()


def _end(number: int, _: FrameType | None) -> None:
    """End at once: an exception may be lost in what importing calls back."""
    try:
        os.write(2, b"vitup-fast: interrupted.\n")
    finally:
        os._exit(128 + number)
