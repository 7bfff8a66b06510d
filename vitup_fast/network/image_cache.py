"""What queries need to know of a batch of images."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch.utils._pytree
from torch import Tensor


@dataclass(frozen=True)
class ImageCache:
    """What a network needs to know of a batch of images, computed once and used by any number of query sets.

    It holds projections by the network's weights: after changing those, call ``prepare`` again. It is a pytree of
    its tensors.

    Attributes:
        keys: per block, projected and rotated keys.  # L - 1 times [B, Hh, h * w, d]
        values: per block, projected values.  # L - 1 times [B, Hh, h * w, d]
        tokens: per block, LayerNormed hidden states.  # L - 1 times [B, h, w, D]
        patch_grid: the fine patch grid.  # [B, P, Q, D]
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    patch_grid: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return (*self.keys, *self.values, *self.tokens, self.patch_grid)

    @property
    def batch_size(self) -> int:
        """Number of images B."""
        return self.patch_grid.shape[0]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens, (h, w)."""
        return self.tokens[0].shape[1], self.tokens[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient may flow back into the image."""
        return any(t.requires_grad for t in self.tensors)

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, images: SupportsIndex | slice | Sequence[int] | Tensor) -> ImageCache:
        """Select images; an integer keeps the batch axis, so that the result is a cache of one image."""
        if isinstance(images, SupportsIndex) and not (isinstance(images, Tensor) and images.dim()):
            image = operator.index(images)
            if not -self.batch_size <= image < self.batch_size:
                raise IndexError(f"image {image} of a cache of {self.batch_size}")
            image %= self.batch_size
            images = slice(image, image + 1)
        return self.map(lambda t: t[images])

    def split(self, sizes: Sequence[int]) -> list[ImageCache]:
        """Cut into caches of as many images each, whose gradients are joined in one pass, not padded and added."""
        if len(sizes) == 1:
            return [self]
        blocks = len(self.keys)
        parts = zip(*(t.split(sizes) for t in self.tensors), strict=True)
        return [ImageCache(*(p[i * blocks : (i + 1) * blocks] for i in range(3)), p[-1]) for p in parts]

    def to(self, *args: object, **kwargs: object) -> ImageCache:
        """Move or cast every tensor, with the arguments of :meth:`torch.Tensor.to`."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def map(self, fn: Callable[[Tensor], Tensor]) -> ImageCache:
        """Apply a function to every tensor."""
        per_block = (tuple(fn(t) for t in ts) for ts in (self.keys, self.values, self.tokens))
        return ImageCache(*per_block, fn(self.patch_grid))


torch.utils._pytree.register_dataclass(ImageCache, serialized_type_name="vitup_fast.ImageCache")
