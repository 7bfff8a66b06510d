"""How a set of queries is divided: chunks of queries, groups of images, and what a memory budget leaves for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import expected
from ..ops.checks import check_budget

# Queries whose activations stay in the last-level cache while a block's weights pass by.
CHUNK_QUERIES = {"cpu": 1568, "cuda": 8448}


class Budget(NamedTuple):
    """What a pass may use.

    Attributes:
        chunk: queries walked at once.
        scratch_bytes: what ``max_memory`` leaves beside the chunk's activations, None without such a limit.
    """

    chunk: int
    scratch_bytes: int | None

    @classmethod
    def divide(
        cls,
        device: torch.device,
        query_chunk_size: int | None,
        max_memory: int | None,
        per_query: int,
        least_scratch: int,
    ) -> Budget:
        """Choose from the caller's limits, or as suits the device.

        Args:
            device: where the pass runs.
            query_chunk_size: the caller's chunk.
            max_memory: the caller's limit in bytes, instead of a chunk.
            per_query: bytes that a query needs.
            least_scratch: bytes that a walk needs beside its queries; at most half of ``max_memory`` beyond that.

        Raises:
            InputError: both limits, or one that is no positive integer or too small.
        """
        query_chunk_size, max_memory = check_budget(query_chunk_size, max_memory)
        if query_chunk_size is not None:
            return cls(query_chunk_size, None)
        chunk = CHUNK_QUERIES.get(device.type, CHUNK_QUERIES["cuda"])
        if max_memory is None:
            return cls(chunk, None)
        least = per_query + least_scratch
        if max_memory < least:
            raise expected("max_memory", f"at least {least} bytes, the need of one query", max_memory)
        for_queries = max_memory - max(least_scratch, max_memory // 2 if least_scratch else 0)
        chunk = min(chunk, max(1, for_queries // per_query))
        return cls(chunk, max_memory - chunk * per_query)


class Spans(NamedTuple):
    """Queries in lines of equal length, cut into whole lines or parts of one, of at most ``chunk`` queries.

    There are as few spans as possible, of nearly equal length, and at least one.
    """

    lines: int
    length: int
    chunk: int

    @property
    def longest(self) -> int:
        """Queries of the longest span."""
        if self.chunk >= self.length:
            return _longest(self.lines, self.chunk // max(1, self.length)) * self.length
        return _longest(self.length, self.chunk)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.lines * self.length > self.longest

    def __iter__(self) -> Iterator[slice]:
        """Yield the spans of the queries, counted line by line."""
        length = self.length
        if self.chunk >= length:
            for lines in cut(self.lines, self.chunk // max(1, length)):
                yield slice(lines.start * length, lines.stop * length)
        else:
            for line in range(self.lines):
                for part in cut(length, self.chunk):
                    yield slice(line * length + part.start, line * length + part.stop)


def cut(count: int, most: int) -> Iterator[slice]:
    """Cut ``count`` into as few pieces of at most ``most`` as possible, of nearly equal length; at least one."""
    pieces = max(1, -(-count // most))
    for i in range(pieces):
        yield slice(i * count // pieces, (i + 1) * count // pieces)


def _longest(count: int, most: int) -> int:
    """Length of the longest piece of :func:`cut`."""
    return -(-count // max(1, -(-count // most)))


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all, or more than any has where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
