"""What the kernels for CPUs share: packed weights, threads, scratch, and memory that calls use in turn.

Each kernel takes a tile of queries through a whole operation in one core's cache. Weights are packed for the
instruction set at hand: on every call of an operator, once for a network (:mod:`vitup_fast.walks.cpu`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...extension import load
from ...ops.primitives import LAYER_NORM_EPS

# Most that a thread keeps for its next call of an operator.
ARENA_BYTES = 64 << 20
# Rows of the shortest tile: a block of rows of the widest instruction set.
SHORTEST_TILE = 6


class Held(NamedTuple):
    """Arguments of a kernel, and the tensors whose memory they point to."""

    handle: Any
    tensors: tuple[Tensor, ...]


class Arena(threading.local):
    """Memory that one call of an operator after the other uses, in each thread its own.

    Fresh memory costs a page fault for every 4 KiB, together as long as a small kernel takes.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.used = self.wanted = 0

    def begin(self) -> None:
        """Begin a call: what earlier calls took is free again."""
        size = min(self.wanted, ARENA_BYTES)
        if self.memory.nbytes < size:
            self.memory = aligned_bytes(size)
        self.used = self.wanted = 0

    def take(self, size: int) -> Tensor:
        """Memory from the start of a cache line on, for this call alone."""
        whole_lines = -(-size // 64) * 64
        start = self.used
        self.wanted += whole_lines
        if start + size > self.memory.nbytes:
            return aligned_bytes(size)
        self.used += whole_lines
        return self.memory[start : start + size]

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in such memory."""
        return self.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


arena = Arena()


def aligned_bytes(size: int) -> Tensor:
    """Memory from the start of a cache line on."""
    memory = torch.empty(size + 63, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


class Context:
    """Threads, scratch and number format of the kernels for rows of one dtype and width.

    Args:
        dtype: float32, bfloat16 or float16.
        width: the widest rows, in channels.
        int8: whether products are computed in 8-bit integers.
        max_bytes: most that the scratch of all threads may take; fewer threads and shorter tiles if need be.
        keep: whether packed weights outlive the call of an operator that this context is for.
        tile_rows: most rows of a tile, of a kernel that wants scratch of its own.
        scratch_bytes: scratch that this kernel wants for a thread.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        width: int,
        *,
        int8: bool = False,
        max_bytes: int | None = None,
        keep: bool = False,
        tile_rows: int | None = None,
        scratch_bytes: int | None = None,
    ) -> None:
        cpu = self.kernels = load().cpu
        self.dtype, self.int8, self.keep = dtype, int8, keep
        threads, rows = torch.get_num_threads(), tile_rows or cpu.tile_rows(width)
        if max_bytes is not None:
            while threads > 1 and threads * cpu.scratch_bytes(width, SHORTEST_TILE) + 64 > max_bytes:
                threads -= 1
            while rows > SHORTEST_TILE and threads * cpu.scratch_bytes(width, rows) + 64 > max_bytes:
                rows -= SHORTEST_TILE
        per_thread = scratch_bytes or cpu.scratch_bytes(width, rows)
        self.scratch = self._take(threads * per_thread)
        start = self.scratch.data_ptr()
        self.name = str(dtype).removeprefix("torch.")
        self.handle = cpu.Context(self.name, int8, threads, rows, start, per_thread)
        self.native = cpu.Context(self.name, False, threads, rows, start, per_thread)

    def _take(self, size: int) -> Tensor:
        """Memory from the start of a cache line on, for as long as packed weights live."""
        return aligned_bytes(size) if self.keep else arena.take(size)

    def vector(self, values: Tensor) -> Tensor:
        """A vector of parameters as kernels take it."""
        return values.detach().float().contiguous()

    def norm(self, weight: Tensor, bias: Tensor) -> Held:
        """Parameters of a LayerNorm; ``[D]`` each."""
        tensors = self.vector(weight), self.vector(bias)
        return Held(self.kernels.Norm(*(t.data_ptr() for t in tensors), LAYER_NORM_EPS), tensors)

    def pack(self, matrices: Tensor, *, int8: bool = False) -> Tensor:
        """Pack matrices of any strides, ``[..., N, K]`` with at most one leading axis that is no matrix of its own."""
        *_, n, k = matrices.shape
        batch = matrices.flatten(0, -3) if matrices.dim() > 2 else matrices.unsqueeze(0)
        words = self.kernels.packed_words(self.name, int8, n, k)
        packed = self._take(4 * batch.shape[0] * words).view(torch.int32).view(batch.shape[0], words)
        context = self.handle if int8 else self.native
        self.kernels.pack(context, batch.data_ptr(), batch.shape[0], n, k, *batch.stride(), packed.data_ptr())
        return packed

    def matrix(self, weight: Tensor, bias: Tensor | None, *, int8: bool | None = None) -> Held:
        """A linear layer; ``weight`` is ``[N, K]``, ``bias`` ``[N]``. Kernels of backward passes read no bias."""
        packed = self.pack(weight.detach(), int8=self.int8 if int8 is None else int8)
        tensors = (packed,) if bias is None else (packed, self.vector(bias))
        addresses = packed.data_ptr(), 0 if bias is None else tensors[1].data_ptr()
        return Held(self.kernels.Matrix(*addresses, *weight.shape), tensors)


def smallest_scratch(dim: int, bands: int) -> int:
    """Bytes of scratch with which a network can run, on one thread and with the shortest tiles."""
    return load().cpu.scratch_bytes(max(dim, 2 + 4 * bands), SHORTEST_TILE) + 64


def coords_address(coords: Tensor) -> tuple[int, bool]:
    """Address and whether they are float64; the caller holds the tensor."""
    return coords.data_ptr(), coords.dtype == torch.float64


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins, as kernels take it; zero where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def parts(kept: Tensor, *parts: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Divide bytes among tensors of these shapes and dtypes."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    pieces = kept.split(sizes)
    return [piece.view(dtype).view(shape) for piece, (shape, dtype) in zip(pieces, parts, strict=True)]


def needed_grads(grads: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Gradients that were asked for, as an operator returns them."""
    return [g.contiguous() for g, needed in zip(grads, needs_grad, strict=True) if needed]
