"""From a step's crops to its loss: which queries the student answers, and what the teacher says there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import expected
from ..upsampler import Upsampler
from .configuration import TrainingConfig
from .data import Placement
from .losses import cosine_distance, normalised_l2, similarity_divergence
from .teacher import pixels


class Geometry(NamedTuple):
    """Grids of the teacher's sizes over a crop; a block is a token of the smallest."""

    sides: tuple[int, ...]  # tokens of an axis, ascending

    @classmethod
    def of(cls, config: TrainingConfig, patch: int) -> Geometry:
        """Read it from the settings.

        Raises:
            InputError: sizes are no multiples of the patch.
        """
        for name in ("teacher_sizes", "student_sizes"):
            if any(size % patch for size in getattr(config, name)):
                raise expected(name, f"multiples of the backbone's patch size {patch}", getattr(config, name))
        return cls(tuple(size // patch for size in config.teacher_sizes))

    @property
    def block(self) -> int:
        """Queries of an axis of a block."""
        return self.sides[-1] // self.sides[0]

    @property
    def blocks(self) -> int:
        """Blocks of a crop."""
        return self.sides[0] ** 2

    def cells(self, blocks: Tensor) -> Tensor:  # [K, k * k, 2]
        """(x, y) of the finest grid's cells in each of K blocks, row by row within a block."""
        k = self.block
        corner = torch.stack((blocks % self.sides[0], blocks // self.sides[0]), dim=-1) * k  # [K, 2]
        steps = torch.arange(k, dtype=torch.int64, device=blocks.device)
        inside = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(-1, 2)  # [k * k, 2]
        return corner[:, None] + inside

    def tokens(self, layer: Tensor, blocks: Tensor) -> Tensor:  # [K, m * m, D]
        """The teacher's tokens of ``[h, h, D]`` in each of K blocks, row by row within a block."""
        side = self.sides[0]
        m = len(layer) // side
        layer = layer.unflatten(0, (side, m)).unflatten(2, (side, m))  # [side, m, side, m, D]
        return layer.transpose(1, 2).reshape(side * side, m * m, -1)[blocks]

    def pooled(self, features: Tensor, side: int) -> Tensor:  # [K, m * m, D]
        """Means of the queries ``[K, k * k, D]`` of each block on the tokens of a grid of ``side``."""
        k, m = self.block, side // self.sides[0]
        features = features.unflatten(1, (m, k // m, m, k // m))  # [K, m, k / m, m, k / m, D]
        return features.mean((2, 4)).flatten(1, 2)


class Batch(NamedTuple):
    """What a step of one process trains on."""

    crops: Tensor  # [B, 3, S, S] uint8
    features: dict[int, list[Tensor]]  # of the teacher; for each size [B, h, h, D] of each depth
    placements: list[Placement]
    blocks: Tensor  # [B, K] of each crop
    student_size: int
    noise: list[np.random.Generator]


def accumulate_gradients(
    upsampler: Upsampler, config: TrainingConfig, geometry: Geometry, batch: Batch, share: float
) -> float:
    """Add the gradient of a batch's loss to the parameters', some blocks at a time.

    Args:
        upsampler: the student.
        config: of the run.
        geometry: of the grids.
        batch: crops and what the teacher makes of them.
        share: of the step's loss that this batch is.

    Returns:
        The loss times ``share``; NaN or infinity as soon as a part is not finite.
    """
    backbone = upsampler.backbone
    adapted = bool(backbone.lora_parameters())
    with torch.set_grad_enabled(adapted):
        inputs = _student_inputs(upsampler, batch)
    # Each part's gradient stops here; the backbone goes backward once, with the sum.
    leaves = [t.detach().requires_grad_(adapted) for t in inputs]
    total = 0.0
    for blocks in batch.blocks.split(config.blocks_per_backward, dim=1):
        coords = torch.stack(
            [
                placement.coords(geometry.cells(chosen).flatten(0, 1), geometry.sides[-1])
                for placement, chosen in zip(batch.placements, blocks, strict=True)
            ]
        )  # [B, K * k * k, 2]
        cache = upsampler.vit_up.prepare(leaves[1:], leaves[0])
        layers = upsampler.vit_up(cache, coords, return_all_layers=True, checkpoint=config.checkpoint)
        weight = share * blocks.shape[1] / batch.blocks.shape[1]
        loss = weight * feature_loss(layers, batch.features, blocks, config, geometry)
        total += loss.item()
        if not loss.isfinite():
            return total
        loss.backward()
    if adapted:
        reached = [(t, leaf.grad) for t, leaf in zip(inputs, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward(*zip(*reached, strict=True))
    return total


def _student_inputs(upsampler: Upsampler, batch: Batch) -> list[Tensor]:
    """Compute the fine patch grid and the hidden states of the containers."""
    backbone, size = upsampler.backbone, batch.student_size
    crops = pixels(batch.crops, backbone)
    images = zip(crops, batch.placements, batch.noise, strict=True)
    containers = torch.stack([placement.contain(crop, rng) for crop, placement, rng in images])
    fills = all(placement.fills for placement in batch.placements)
    if fills and not backbone.lora_parameters() and size in batch.features:
        states = batch.features[size]  # the same backbone saw the same crop
    else:
        states = backbone.hidden_states(containers, (size, size))
    side = size // backbone.patch_size * upsampler.vit_up.config.patch_grid_density
    return [backbone.patch_grid(containers, (side, side)), *states]


def feature_loss(
    layers: Sequence[Tensor],  # [B, K * k * k, D] each
    features: dict[int, list[Tensor]],
    blocks: Tensor,  # [B, K]
    config: TrainingConfig,
    geometry: Geometry,
) -> Tensor:
    """Sum the kinds of losses, averaged over depths and teacher sizes."""
    B, K = blocks.shape
    total = layers[0].new_zeros((), dtype=torch.float32)
    depth_weights = _shares(config.depth_weights, len(layers))
    size_weights = _shares(config.size_weights, len(geometry.sides))
    for (depth, layer), depth_weight in zip(enumerate(layers), depth_weights, strict=True):
        layer = layer.float().unflatten(1, (K, -1)).flatten(0, 1)  # [B * K, k * k, D]
        for size, side, size_weight in zip(config.teacher_sizes, geometry.sides, size_weights, strict=True):
            if depth_weight * size_weight == 0:
                continue
            student = geometry.pooled(layer, side).reshape(B, -1, layer.shape[-1])  # [B, K * m * m, D]
            teacher = torch.stack(
                [
                    geometry.tokens(image, chosen)
                    for image, chosen in zip(features[size][depth], blocks, strict=True)
                ]
            )
            teacher = teacher.to(student).reshape(student.shape)
            kinds = (
                (config.l2, normalised_l2),
                (config.cosine, cosine_distance),
                (config.similarity, similarity_divergence),
            )
            distance = sum(weight * kind(student, teacher) for weight, kind in kinds if weight)
            total = total + depth_weight * size_weight * distance
    return total


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """Weights that add up to one; equal ones where none are given."""
    weights = weights or (1.0,) * count
    return [weight / sum(weights) for weight in weights]
