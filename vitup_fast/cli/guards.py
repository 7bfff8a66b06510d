"""What can end a command early, interruptions and a lack of memory, so that it ends cleanly and in one sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from ..errors import expected

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, with the signal's number, inside the ``with`` block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads may not set handlers
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _interrupt(number: int, _: FrameType | None) -> None:
    """Raise the interruption where the program is."""
    raise KeyboardInterrupt(number)


@contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Turn a lack of memory, whoever reports it, into an error about ``name``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not lacking:
            raise
        reason = str(error).partition("\n")[0].rpartition("Allocator: ")[2] or "less"
        raise expected(
            name, "enough memory", reason, "Choose a smaller size, or --dtype bfloat16."
        ) from error


def available_memory() -> int | None:
    """Return how many bytes this process may still take, as far as the system says."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        limits.append(1024 * (kibibytes["MemAvailable"] + kibibytes["SwapFree"]))
    except (OSError, ValueError, KeyError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for group in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's
        try:
            limits.append(int(Path("/sys/fs/cgroup", group).read_text()))
        except (OSError, ValueError):
            continue
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits, default=None)
