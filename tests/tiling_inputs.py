"""What the tests of tiling share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vitup_fast import Upsampler, ViTUpConfig
from vitup_fast.sources import seeded_network

WINDOW, DIM = 32, 64


def make_model() -> Upsampler:
    network, vit = seeded_network(ViTUpConfig.preset("tiny"))
    return Upsampler(network, vit, hidden_layer_img_size=WINDOW).eval().requires_grad_(False)


def make_head() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, DIM, generator=generator), torch.randn(5, generator=generator)


def pixels(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Smooth colours with some noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin((y * (c + 1) + x * (3 - c)) / 23 + c) for c in range(channels)]
    noise = generator.normal(0, 12, (height, width, channels))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path
