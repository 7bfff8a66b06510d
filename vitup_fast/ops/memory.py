"""Memory straight from the system: zeros of which few are written, and large results."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Of Linux 5.14; Python has no name for it.
_MADV_POPULATE_WRITE = 23


def zeros_of_few_writes(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros with the dtype and device of ``like``; on a CPU what is never written takes no memory."""
    return _mapped(like, shape, large_pages=False)


def result_memory(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for a large result; on a CPU in large pages where there are any: 4 KiB ones cost a fault for each.

    They are given at once: threads that write to new ones side by side hinder each other.
    """
    return _mapped(like, shape, large_pages=True)


def _mapped(like: Tensor, shape: Sequence[int], *, large_pages: bool) -> Tensor:
    """Map anonymous memory, which the system clears."""
    size = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS") or size == 0:
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
            pages.madvise(_MADV_POPULATE_WRITE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
