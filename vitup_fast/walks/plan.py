"""How a set of queries is divided: chunks of queries, groups of images, and what a memory budget leaves for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import expected
from ..ops.checks import check_budget

# Queries whose activations stay in the last-level cache of a CPU while a block's weights pass by.
CHUNK_QUERIES = 1568
# Rows of the widest tile of a product, and the width up to which one tile holds a row.
TILE_ROWS, TILE_WIDTH = 128, 384
# Bytes of a query for its place: coordinates, cell, row of a table, token, and the index of its largest score.
PLACE_BYTES = 128


def gpu_chunk(multiprocessors: int, dim: int) -> int:
    """Queries of which the widest tiles give every multiprocessor of a GPU exactly one.

    A block more would double the time of a product of complete rows, one less leave a multiprocessor idle.
    """
    return TILE_ROWS * max(1, multiprocessors * TILE_WIDTH // max(dim, TILE_WIDTH // 6))


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
        usual: int,
        query_chunk_size: int | None,
        max_memory: int | None,
        per_query: int,
        least_scratch: int,
        held: int = 0,
        at_first: int = 0,
    ) -> Budget:
        """Choose from the caller's limits, or as suits the device.

        Args:
            usual: queries to walk at once where memory allows it.
            query_chunk_size: the caller's chunk.
            max_memory: the caller's limit in bytes, instead of a chunk.
            per_query: bytes that a query needs.
            least_scratch: bytes that a walk needs beside its queries; at most half of ``max_memory`` beyond that.
            held: bytes that the pass holds from beginning to end beside both.
            at_first: bytes that it needs before it makes room for queries.

        Raises:
            InputError: both limits, or one that is no positive integer or too small.
        """
        query_chunk_size, max_memory = check_budget(query_chunk_size, max_memory)
        if query_chunk_size is not None:
            return cls(query_chunk_size, None)
        if max_memory is None:
            return cls(usual, None)
        least = max(per_query + least_scratch + held, at_first)
        if max_memory < least:
            raise expected("max_memory", f"at least {least} bytes, the need of one query", max_memory)
        max_memory -= held
        for_queries = max_memory - max(least_scratch, max_memory // 2 if least_scratch else 0)
        chunk = min(usual, max(1, for_queries // per_query))
        return cls(chunk, max_memory - chunk * per_query)


class Spans(NamedTuple):
    """Queries in lines of equal length, cut into spans of at most ``chunk`` queries; at least one.

    Spans of ``whole_lines`` are lines or parts of one, as few as possible and of nearly equal length: lines share
    work, and cores a span. Others have ``chunk`` queries each, wherever that ends, and the last one the rest.
    """

    lines: int
    length: int
    chunk: int
    whole_lines: bool = True

    @property
    def longest(self) -> int:
        """Queries of the longest span."""
        if not self.whole_lines:
            return min(self.chunk, self.lines * self.length)
        if self.chunk >= self.length:
            return _longest(self.lines, self.chunk // max(1, self.length)) * self.length
        return _longest(self.length, self.chunk)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.lines * self.length > self.longest

    def __iter__(self) -> Iterator[slice]:
        """Yield the spans of the queries, counted line by line."""
        length, count = self.length, self.lines * self.length
        if not self.whole_lines:
            for start in range(0, max(1, count), self.chunk):
                yield slice(start, min(start + self.chunk, count))
        elif self.chunk >= length:
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
