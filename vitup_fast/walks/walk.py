"""The interface of a walk: how a set of queries passes through the network, by one kind of kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..network.grid import Queries
from ..network.image_cache import ImageCache
from ..network.weights import DecoderWeights, NetworkWeights
from ..ops.implementations import GPU_NAMES
from ..ops.norm_linear import label_dtype
from .plan import CHUNK_QUERIES, Spans, gpu_chunk


class Settings(NamedTuple):
    """What a walk is made for, beside the weights.

    Attributes:
        impl: what the caller asked for, ``"auto"`` or the name of an implementation.
        implementation: the implementation that this is here.
        heads: attention heads.
        dtype: compute type.
        device: where the network lies.
        in_place: whether kernels may write where they are told: no gradient is recorded, nothing traced.
        checkpoint: what is kept for a backward pass: what makes it fastest (``"none"``), the inputs of every
            ``"op"``, or those of every ``"block"``.
    """

    impl: str
    implementation: str
    heads: int
    dtype: torch.dtype
    device: torch.device
    in_place: bool
    checkpoint: str = "none"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes, or Triton's interpreter in its place."""
        return self.device.type == "cuda" or self.implementation in GPU_NAMES

    def usual_chunk(self, dim: int) -> int:
        """Queries of a network of width ``dim`` to walk at once where memory allows it."""
        if self.implementation in GPU_NAMES:
            from ..kernels.triton.common import multiprocessors

            return gpu_chunk(multiprocessors(self.device), dim)
        if self.device.type == "cuda":
            return gpu_chunk(torch.cuda.get_device_properties(self.device).multi_processor_count, dim)
        return CHUNK_QUERIES


class Decoding(NamedTuple):
    """What becomes of the queries' states.

    Attributes:
        depths: which depths are decoded, ascending.
        head: matrix ``[C, D]`` and bias ``[C]`` in the place of the last depth's.
        labels: the argmax of the last depth's scores instead of them.
    """

    depths: tuple[int, ...]
    head: tuple[Tensor, Tensor] | None = None
    labels: bool = False

    def decoders(self, weights: NetworkWeights) -> dict[int, DecoderWeights]:
        """Return the decoder of each depth."""
        decoders = {depth: weights.decoders[depth] for depth in self.depths}
        if self.head is not None:
            last = self.depths[-1]
            decoders[last] = DecoderWeights(*decoders[last][:2], *self.head)
        return decoders

    def empty_outputs(
        self, batch: int, count: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """Memory for what is decoded of ``count`` queries of each image, a tensor for each depth."""
        width = dim if self.head is None else self.head[0].shape[0]
        shape = (batch, count) if self.labels else (batch, count, width)
        kind = label_dtype(width) if self.labels else dtype
        return [torch.empty(shape, dtype=kind, device=device) for _ in self.depths]


class Chunk(NamedTuple):
    """Queries that walk together."""

    images: slice  # of the cache
    queries: Queries  # [b, n, 2]


# Walks a chunk and decodes it: into tensors [b, n, E] or [b, n] where these are given, one for each depth.
Step: TypeAlias = Callable[[Chunk, Sequence[Tensor] | None], Sequence[Tensor]]


class Walk(ABC):
    """One way through the network, with what depends on the weights alone prepared.

    Args:
        weights: of the network, read anew.
        settings: what the walk is for.
    """

    # Whether it is worth remembering until the weights change.
    remembered: bool
    # Whether it computes [gamma, beta] of relative positions that queries share.
    makes_tables: bool = False

    @classmethod
    @abstractmethod
    def takes(cls, settings: Settings) -> bool:
        """Whether this is a way for such settings."""

    @classmethod
    @abstractmethod
    def query_bytes(cls, dim: int, dtype: torch.dtype) -> int:
        """Upper bound of the memory of one query on its way, without what is decoded of it."""

    @classmethod
    def least_scratch(cls, dim: int, bands: int) -> int:
        """Bytes that it needs beside its queries, for a width D and a position code of ``bands`` frequencies."""
        return 0

    @abstractmethod
    def __init__(self, weights: NetworkWeights, settings: Settings) -> None: ...

    @abstractmethod
    def project(self, hidden_states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Keys, values and tokens of every block, as an :class:`ImageCache` holds them, from its hidden states."""

    @abstractmethod
    def begin(
        self,
        cache: ImageCache,
        decoding: Decoding,
        spans: Spans,
        groups: Sequence[slice],
        scratch_bytes: int | None,
    ) -> Step:
        """Prepare what the chunks of one set of queries share, and return what walks one of them.

        Args:
            cache: the images.
            decoding: what is decoded.
            spans: how the queries of an image are cut.
            groups: images whose queries walk together.
            scratch_bytes: most bytes to use beside the chunk's activations, None without a limit.
        """


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """Compute as kernels do: nothing recorded, nothing cast, on the tensors' GPU, and no inference tensors made.

    What is kept for later calls could otherwise not be written outside of inference mode.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
