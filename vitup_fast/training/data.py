"""Pictures, the crops that are trained on, and where each lies in its container of noise."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError, brief, expected, require
from ..images import rgb
from ..pictures import BrokenPictures, is_picture, pictures_below
from .configuration import TrainingConfig

if TYPE_CHECKING:
    from PIL.Image import Image

SHARDS = {".tar"}
MOST_CUTOUTS = 3
# Uses of the seed; each use draws from numbers of its own.
ORDER, CROP, STEP = range(3)


class Picture(NamedTuple):
    """A picture in a file, or in a member of a tar file."""

    path: str
    offset: int = 0
    size: int = -1

    @property
    def name(self) -> str:
        """How messages call it."""
        return brief(self.path if self.size < 0 else f"{self.path} at byte {self.offset}", 300)


def find_pictures(sources: Sequence[str]) -> list[Picture]:
    """List the pictures of folders and tar files, in an order that does not depend on the machine.

    Raises:
        InputError: a source is missing, unreadable, or holds no picture.
    """
    if not sources:
        raise expected("data", "folders of pictures, or tar files", "none", "Name one: --data FOLDER.")
    found: list[Picture] = []
    for source in sources:
        path = Path(source)
        before = len(found)
        try:
            if path.is_dir():
                found += [Picture(str(picture)) for picture in pictures_below(path, "data")]
            elif path.suffix in SHARDS:
                with tarfile.open(path, "r:") as shard:
                    found += [
                        Picture(str(path), member.offset_data, member.size)
                        for member in shard
                        if member.isfile() and is_picture(member.name)
                    ]
            else:
                what = "a file" if path.is_file() else "no such folder"
                raise expected("data", "folders of pictures, or .tar files of them", f"{source} ({what})")
        except (OSError, tarfile.TarError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"data: {brief(source, 300)} cannot be read ({reason}).") from error
        if len(found) == before:
            raise expected("data", "pictures", f"none in {source}")
    return found


def read_picture(picture: Picture) -> Image:
    """Decode a picture as upright RGB.

    Raises:
        InputError: it cannot be read.
    """
    pillow = require("PIL.Image", "train", "reading pictures")
    try:
        if picture.size < 0:
            with pillow.open(picture.path) as image:
                return rgb(image)
        with open(picture.path, "rb") as shard:
            shard.seek(picture.offset)
            return rgb(pillow.open(BytesIO(shard.read(picture.size))))
    except InputError:
        raise
    except Exception as error:  # Pillow raises whatever a broken file leads to
        raise InputError(f"{picture.name}: cannot be read as an image ({error}).") from error


class Crops(Dataset):
    """Square crops of pictures: the k-th is the same wherever and whenever it is made.

    Args:
        config: of the run.

    Raises:
        InputError: no pictures, or too many that cannot be read.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.pictures = find_pictures(config.data)
        self.cutouts = find_pictures([config.cutouts]) if config.cutouts else []
        self.broken = BrokenPictures(len(self.pictures))

    @property
    def digest(self) -> str:
        """Identifies the crops: pictures by name and size, and the settings that crops depend on."""
        config = self.config
        made = (config.crop_size, config.crop_scale, config.colour_jitter, config.seed)
        pasted = config.cutout_probability if self.cutouts else 0
        files = [(Path(p.path).name, p.offset, _file_size(p)) for p in (*self.pictures, *self.cutouts)]
        return hashlib.sha256(repr((made, pasted, files)).encode()).hexdigest()[:16]

    def __getitem__(self, k: int) -> Tensor:  # [3, S, S]
        """Return the k-th crop, uint8 RGB."""
        rng = np.random.default_rng([self.config.seed, CROP, k])
        image = self._picture(k)
        image = _cropped(image, self.config, rng)
        if self.cutouts and rng.random() < self.config.cutout_probability:
            for _ in range(int(rng.integers(1, MOST_CUTOUTS + 1))):
                _paste(image, self.cutouts[int(rng.integers(len(self.cutouts)))], rng)
        image = _jittered(image, self.config.colour_jitter, rng)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()

    def _picture(self, k: int) -> Image:
        """Decode the k-th picture of an endless shuffled sequence; the next one where it is broken."""
        n = len(self.pictures)
        for attempt in range(n):
            epoch, place = divmod(k + attempt, n)
            order = np.random.default_rng([self.config.seed, ORDER, epoch]).permutation(n)
            picture = self.pictures[int(order[place])]
            if picture in self.broken.errors:
                continue
            try:
                return read_picture(picture)
            except InputError as error:
                self.broken.add(picture, error)
        raise expected("data", "a picture that can be read", "none")


def _file_size(picture: Picture) -> int:
    return os.stat(picture.path).st_size if picture.size < 0 else picture.size


def _cropped(image: Image, config: TrainingConfig, rng: np.random.Generator) -> Image:
    """Cut a random square out, resize it, and flip every second one."""
    pillow = require("PIL.Image", "train", "cropping pictures")
    shorter = min(image.size)
    # Uniform in the logarithm: half of the crops are closer than the geometric mean.
    low, high = np.log(config.crop_scale)
    side = max(1.0, shorter * float(np.exp(rng.uniform(low, high))))
    left, top = (float(rng.uniform(0, length - side)) for length in image.size)
    size = config.crop_size
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), pillow.Resampling.BICUBIC, box=box)
    return image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _paste(image: Image, cutout: Picture, rng: np.random.Generator) -> None:
    """Paste a cut-out at a random size, turn and place."""
    pillow = require("PIL.Image", "train", "pasting cut-outs")
    with pillow.open(cutout.path) as opened:
        piece = opened.convert("RGBA")
    side = image.width * float(rng.uniform(0.15, 0.6))
    ratio = side / max(piece.size)
    width, height = (max(1, round(ratio * length)) for length in piece.size)
    piece = piece.resize((width, height), pillow.Resampling.BICUBIC)
    piece = piece.rotate(float(rng.uniform(-30, 30)), pillow.Resampling.BICUBIC, expand=True)
    place = tuple(int(rng.uniform(-0.25, 1.0) * (image.width - length / 2)) for length in piece.size)
    image.paste(piece, place, piece)


def _jittered(image: Image, most: float, rng: np.random.Generator) -> Image:
    """Change brightness, contrast and saturation."""
    enhance = require("PIL.ImageEnhance", "train", "changing colours")
    for kind in (enhance.Brightness, enhance.Contrast, enhance.Color):
        image = kind(image).enhance(float(rng.uniform(1 - most, 1 + most)))
    return image


class Placement(NamedTuple):
    """Where a crop lies in its container, in pixels."""

    left: int
    top: int
    side: int
    container: int

    @classmethod
    def draw(cls, config: TrainingConfig, rng: np.random.Generator, fills: bool = False) -> Placement:
        """Draw size and place, or let the crop be all there is."""
        relative = float(rng.uniform(*config.relative_size))
        side = config.crop_size if fills else round(config.crop_size * relative)
        left, top = (int(n) for n in rng.integers(0, config.crop_size - side + 1, 2))
        return cls(left, top, side, config.crop_size)

    @property
    def fills(self) -> bool:
        """Whether the crop is all there is."""
        return self.side == self.container

    def contain(self, crop: Tensor, rng: np.random.Generator) -> Tensor:  # [3, S, S]
        """Lay a normalised crop into a container of standard normal noise."""
        if self.fills:
            return crop
        noise = rng.standard_normal((3, self.container, self.container), dtype=np.float32)
        container = torch.from_numpy(noise).to(crop)
        side = (self.side, self.side)
        small = torch.nn.functional.interpolate(crop[None], side, mode="bilinear", antialias=True)[0]
        container[:, self.top : self.top + self.side, self.left : self.left + self.side] = small
        return container

    def coords(self, cells: Tensor, count: int) -> Tensor:  # [N, 2]
        """Where in the container the cell centres of the crop lie.

        Args:
            cells: (x, y) of cells of a ``count`` x ``count`` grid over the crop, integers.  # [N, 2]
            count: cells of an axis.

        Returns:
            Coordinates in [0, 1] over the container, float32.
        """
        corner = torch.tensor((self.left, self.top), dtype=torch.float64, device=cells.device)
        pixels = corner + (cells.to(torch.float64) + 0.5) / count * self.side
        return (pixels / self.container).to(torch.float32)
