"""Images in and pictures out: reading, normalising, and features shown as colours."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, require

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 100_000_000
BAR_HEIGHT = 22


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image file as RGB.

    Args:
        path: any file that Pillow reads.
        max_pixels: larger images are refused before their pixels are decoded.

    Raises:
        InputError: missing, unreadable, truncated or too large.
        MissingPackageError: Pillow is not installed.
    """
    pillow = require("PIL.Image", "demo", "reading an image file")
    try:
        with warnings.catch_warnings():
            # The limit below is stricter than Pillow's warning; Pillow's own error stays on.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            with pillow.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise InputError(
                        f"{path}: expected at most {max_pixels:,} pixels, got {width} x {height}; "
                        "shrink or crop the image."
                    )
                return image.convert("RGB")
    except pillow.DecompressionBombError as error:
        raise InputError(f"{path}: expected at most {max_pixels:,} pixels; {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path}: cannot be read as an image ({reason}).") from error


def normalise(image: Image) -> Tensor:
    """Convert a PIL image to a tensor normalised as DINO models expect (ImageNet mean and deviation).

    Args:
        image: any PIL image, converted to RGB; not resized.

    Returns:
        Normalised image, float32.  # [1, 3, H, W]
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [3, H, W]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((pixels.float() / 255 - mean) / std).unsqueeze(0)


def principal_colours(features: Tensor, samples: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the three principal components of features, and the range to show them in.

    Args:
        features: feature vectors.  # [N, D]
        samples: components are fitted to at most this many, evenly spread over N.

    Returns:
        Mean ``[D]``, components ``[D, 3]``, and lower and upper end of the range ``[3]`` (first and last percent
        cut off), for :func:`colours`.
    """
    step = max(1, features.shape[0] // samples)
    sample = features[::step].detach().double().cpu()  # [n, D]
    mean = sample.mean(0)
    _, _, components = torch.linalg.svd(sample - mean, full_matrices=False)
    components = components[:3].T  # [D, 3]
    components = F.pad(components, (0, 3 - components.shape[1]))
    # The sign of a component is arbitrary; fix it so that pictures are reproducible.
    components = components * torch.where(components.sum(0) < 0, -1.0, 1.0)
    projected = (sample - mean) @ components
    low, high = torch.quantile(projected, torch.tensor((0.01, 0.99), dtype=projected.dtype), dim=0)
    return mean, components, low, torch.maximum(high, low + 1e-12)


def colours(features: Tensor, basis: tuple[Tensor, Tensor, Tensor, Tensor]) -> np.ndarray:
    """Show features as colours of a basis from :func:`principal_colours`; ``[H, W, D] -> [H, W, 3]`` uint8."""
    mean, components, low, high = (t.float() for t in basis)
    projected = (features.detach().float().cpu() - mean) @ components  # [H, W, 3]
    return (((projected - low) / (high - low)).clamp(0, 1) * 255).round().byte().numpy()


def panels(pictures: Sequence[tuple[str, np.ndarray]], height: int) -> Image:
    """Set titled pictures side by side at equal height; pixels stay visible where they are enlarged.

    Args:
        pictures: title and picture ``[H, W, 3]`` uint8 of each panel.
        height: height of every panel in pixels, without its title.
    """
    pillow = require("PIL.Image", "demo", "drawing a picture")
    draw = require("PIL.ImageDraw", "demo", "drawing a picture")
    images = []
    for _, picture in pictures:
        width = max(1, round(height * picture.shape[1] / picture.shape[0]))
        smaller = picture.shape[0] < height
        kind = pillow.Resampling.NEAREST if smaller else pillow.Resampling.LANCZOS
        images.append(pillow.fromarray(picture).resize((width, height), kind))
    gap = 6
    total = sum(image.width for image in images) + gap * (len(images) - 1)
    canvas = pillow.new("RGB", (total, height + BAR_HEIGHT), "white")
    left = 0
    for (title, _), image in zip(pictures, images, strict=True):
        draw.Draw(canvas).text((left + 2, 5), title, fill="black")
        canvas.paste(image, (left, BAR_HEIGHT))
        left += image.width + gap
    return canvas


def feature_picture(image: Image, tokens: Tensor, features: Tensor) -> Image:
    """Draw input, backbone features, their bilinear enlargement and upsampled features, in the same colours.

    Args:
        image: the input.
        tokens: the backbone's last hidden state.  # [h, w, D]
        features: upsampled features.  # [H, W, D]
    """
    H, W, D = features.shape
    enlarged = F.interpolate(tokens.float().permute(2, 0, 1)[None], (H, W), mode="bilinear")  # [1, D, H, W]
    basis = principal_colours(tokens.reshape(-1, D))
    height = max(image.height, H, 160)
    width = round(height * image.width / image.height)
    # Tokens and features cover the whole image: show each panel in the image's proportions.
    shown = [
        ("input", np.array(image)),
        (f"backbone {tokens.shape[0]}x{tokens.shape[1]}", colours(tokens, basis)),
        ("bilinear", colours(enlarged[0].permute(1, 2, 0), basis)),
        (f"ViT-Up {H}x{W}", colours(features, basis)),
    ]
    pillow = require("PIL.Image", "demo", "drawing a picture")
    nearest = pillow.Resampling.NEAREST
    stretched = [(t, np.array(pillow.fromarray(p).resize((width, height), nearest))) for t, p in shown[1:]]
    return panels([shown[0], *stretched], height)


def write_atomically(path: str | os.PathLike[str], write: object) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen.

    Args:
        path: where the file shall be; its folder must exist.
        write: called with the temporary path.

    Raises:
        InputError: the path cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error}).") from error
    finally:
        temporary.unlink(missing_ok=True)
