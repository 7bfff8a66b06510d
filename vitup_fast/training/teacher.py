"""The teacher: the frozen backbone's hidden states of a crop at several sizes, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, brief, expected, require
from ..files import digest_tensors
from ..images import write_atomically
from ..network.backbone import Backbone
from .configuration import TrainingConfig
from .data import Crops

FEATURE_DTYPE = torch.bfloat16
SPARE_DISK = 2**28


class Example(NamedTuple):
    """A crop, and what the teacher makes of it."""

    crop: Tensor  # [3, S, S] uint8
    features: dict[int, list[Tensor]]  # of each size, [h, h, D] for each depth


class Teacher:
    """Gives the hidden states that the student shall have.

    Args:
        backbone: whose adapters, if it has any, are off meanwhile.
        config: of the run.
    """

    def __init__(self, backbone: Backbone, config: TrainingConfig) -> None:
        self.backbone, self.config = backbone, config

    @torch.no_grad()
    def __call__(self, crops: Tensor) -> dict[int, list[Tensor]]:
        """Compute features of crops.

        Args:
            crops: normalised.  # [B, 3, S, S]

        Returns:
            For each of ``teacher_sizes`` a list with ``[B, h, h, D]`` of each depth.
        """
        device = crops.device.type
        autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.bfloat16)
        with self.backbone.adapters_disabled(), autocast:
            return {
                size: self.backbone.hidden_states(crops, (size, size)) for size in self.config.teacher_sizes
            }


def pixels(crops: Tensor, backbone: Backbone) -> Tensor:  # [B, 3, S, S]
    """Normalise uint8 crops ``[B, 3, S, S]`` as the backbone expects."""
    device = next(backbone.parameters()).device
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
        for values in (backbone.mean, backbone.std)
    )
    return (crops.to(device, torch.float32) / 255 - mean) / std


class Cache:
    """Keeps a teacher's features of fixed crops, one file a crop.

    Args:
        folder: holds a folder for each set of crops, teacher and sizes, so that none is taken for another.
        crops: whose examples are kept.
        teacher: that makes what is not there yet.
    """

    def __init__(self, folder: str | os.PathLike[str], crops: Crops, teacher: Teacher) -> None:
        self.crops, self.teacher = crops, teacher
        config, backbone = teacher.config, teacher.backbone
        identity = [crops.digest, config.teacher_sizes, backbone.layer_indices, _weights_digest(backbone)]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.folder = Path(folder, name)

    def path(self, k: int) -> Path:
        """File of the k-th example."""
        return self.folder / f"{k:06d}.safetensors"

    @property
    def example_bytes(self) -> int:
        """Bytes of one example."""
        config, backbone = self.teacher.config, self.teacher.backbone
        tokens = sum((size // backbone.patch_size) ** 2 for size in config.teacher_sizes)
        depths = len(backbone.layer_indices)
        return tokens * depths * backbone.dim * FEATURE_DTYPE.itemsize + 3 * config.crop_size**2

    def missing(self) -> list[int]:
        """Examples that have not been made."""
        return [k for k in range(self.teacher.config.samples) if not self.path(k).exists()]

    def check_space(self, count: int) -> None:
        """Refuse to make ``count`` examples for which the disk has no room.

        Raises:
            InputError: the disk is too small, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(
                f"cache: {brief(self.folder, 300)} cannot be made ({error.strerror})."
            ) from error
        needed = count * self.example_bytes + SPARE_DISK
        if needed > free:
            raise expected(
                "cache",
                f"{needed / 2**30:.1f} GiB free for {count} crops",
                f"{free / 2**30:.1f} GiB",
                "Choose another folder, fewer samples, or no cache.",
            )

    def fill(self, ks: Iterable[int], progress: Callable[[], object] = lambda: None) -> None:
        """Make examples that are not there.

        Raises:
            InputError: the disk is too small, or cannot be written.
        """
        ks = list(ks)
        self.check_space(len(ks))
        save = require("safetensors.torch", "train", "caching features").save_file
        for k in ks:
            if self.path(k).exists():  # another process made it meanwhile
                continue
            crop = self.crops[k]
            features = self.teacher(pixels(crop[None], self.teacher.backbone))
            tensors = {
                f"{size}.{depth}": layer[0].to("cpu", FEATURE_DTYPE).contiguous()
                for size, layers in features.items()
                for depth, layer in zip(self.teacher.backbone.layer_indices, layers, strict=True)
            }
            write_atomically(self.path(k), lambda path, t={"crop": crop, **tensors}: save(t, path))
            progress()

    def __getitem__(self, k: int) -> Example:
        """Read an example.

        Raises:
            InputError: it is broken; deleting it makes it anew.
        """
        load = require("safetensors.torch", "train", "reading cached features").load_file
        try:
            tensors = load(self.path(k))
            depths = self.teacher.backbone.layer_indices
            sizes = self.teacher.config.teacher_sizes
            return Example(tensors["crop"], {s: [tensors[f"{s}.{d}"] for d in depths] for s in sizes})
        except Exception as error:
            raise InputError(f"cache: {self.path(k)} is broken ({brief(error, 200)}); delete it.") from error


def _weights_digest(backbone: Backbone) -> str:
    """Identifies the teacher's weights, whatever dtype they are kept in."""
    adapters = {id(parameter) for parameter in backbone.lora_parameters()}
    named = (*backbone.model.named_parameters(), *backbone.model.named_buffers())
    return digest_tensors((name, tensor.float()) for name, tensor in named if id(tensor) not in adapters)
