"""Images in and pictures out: reading, normalising, and features shown as colours."""

from __future__ import annotations

import os
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, brief, expected, require

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)  # ImageNet's
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 100_000_000
MAX_PANEL = 2048  # pixels
MIN_PANEL = 160
BAR_HEIGHT = 22

_ORIENTATION, _PHOTOMETRIC, _BITS = 0x0112, 262, 258  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises over a broken file into one sentence."""
    try:
        yield
    except (InputError, ImportError, MemoryError, Warning):
        raise
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None)
        raise InputError(
            f"{name}: cannot be read as an image ({reason or error or type(error).__name__})."
        ) from error


@contextmanager
def _opened(path: str | os.PathLike[str], max_pixels: int) -> Iterator[Image]:
    """Open an image file whose header is sound and whose size is allowed; nothing is decoded yet."""
    pillow = require("PIL.Image", "demo", "reading an image file")
    name = brief(path, 500)
    with _readable(name), warnings.catch_warnings():
        # The limit below is stricter than Pillow's warning; Pillow's own error stays on.
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise expected(name, "an image file", "a folder or a device")
        try:
            image = pillow.open(path)
        except pillow.DecompressionBombError as error:
            raise expected(name, f"at most {max_pixels:,} pixels", str(error).rstrip(".")) from error
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise expected(
                    name,
                    f"at most {max_pixels:,} pixels",
                    f"{width} x {height}",
                    "Shrink or crop the image.",
                )
            yield image


def image_size(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of an image file held upright, from its header alone.

    Args:
        path: any file that Pillow reads.
        max_pixels: larger images are refused.

    Raises:
        InputError: missing, no image, or too large.
        MissingPackageError: Pillow is not installed.
    """
    with _opened(path, max_pixels) as image:
        # Pillow turns TIFF files itself.
        turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
        return (width, height) if turned else (height, width)


def open_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image file as :func:`normalise` sees it: upright RGB, or float grey (mode ``F``) if it is deeper.

    Args:
        path: any file that Pillow reads. Of several pages or frames the first is read, with a warning.
        max_pixels: larger images are refused before their pixels are decoded.

    Raises:
        InputError: missing, unreadable, truncated or too large, or values without a known range.
        MissingPackageError: Pillow is not installed.
    """
    with _opened(path, max_pixels) as image:
        pixels = _pixels(image)
        deep = pixels.dtype != np.uint8
        return require("PIL.Image", "demo", "reading an image").fromarray(pixels[:, :, 0] if deep else pixels)


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image file as upright RGB in 8 bits: :func:`open_image`, then :func:`rgb`."""
    return rgb(open_image(path, max_pixels))


def rgb(image: Image) -> Image:
    """Convert any PIL image to upright RGB in 8 bits, as :func:`normalise` sees it.

    Raises:
        InputError: as :func:`normalise`.
    """
    pixels = _pixels(image)
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).round().astype(np.uint8)
    return require("PIL.Image", "demo", "converting an image").fromarray(pixels)


def normalise(
    image: Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Tensor:  # [1, 3, H, W]
    """Convert a PIL image to a tensor normalised as its model expects; it is not resized.

    The image is turned upright (EXIF), transparent pixels are laid over white, and grey means three equal
    channels. Grey of 16 bits keeps them; float grey (mode ``F``) holds values from 0 to 1. Of several pages or
    frames the current one counts; a warning names their number while that is the first.

    Args:
        image: any PIL image but 32-bit integers, which have no range.
        mean: of each channel, in [0, 1]; a backbone's ``mean``.
        std: deviation of each channel; a backbone's ``std``.

    Returns:
        Normalised image, float32, on the CPU.

    Raises:
        InputError: no pixels, values without a known range, or a file that cannot be decoded.
    """
    pixels = _pixels(image)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32)  # [3, H, W]
    if pixels.dtype == np.uint8:
        tensor.div_(255)
    mean, std = (
        torch.tensor(tuple(values), dtype=torch.float32, device="cpu").view(3, 1, 1) for values in (mean, std)
    )
    return tensor.sub_(mean).div_(std).unsqueeze(0)


def _pixels(image: Image) -> np.ndarray:  # [H, W, 3]
    """Return the pixels of an upright, opaque image: uint8, or of deep grey float32 in [0, 1]."""
    pillow = require("PIL.Image", "demo", "converting an image")
    name = brief(getattr(image, "filename", "") or "image", 500)
    if 0 in image.size:
        raise expected(name, "at least one pixel", f"{image.width} x {image.height}")
    with _readable(name):
        image.load()
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.tell() == 0:
            warnings.warn(f"{name}: holds {pages} pages or frames; the first is used.", stacklevel=1)
        upright = require("PIL.ImageOps", "demo", "converting an image").exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            # The copy has no tags of the file any more.
            grey = _grey(np.array(upright), image, name)
            return np.repeat(grey[:, :, None], 3, axis=2)
        palette = upright.mode == "P" and upright.palette is not None and upright.palette.mode.endswith("A")
        if upright.mode.endswith(("A", "a")) or "transparency" in upright.info or palette:
            if upright.mode == "La":
                upright = upright.convert("LA")
            white = pillow.new("RGBA", upright.size, "white")
            upright = pillow.alpha_composite(white, upright.convert("RGBA"))
        return np.array(upright.convert("RGB"))


def _grey(values: np.ndarray, image: Image, name: str) -> np.ndarray:  # [H, W]
    """Scale 16-bit or float grey to [0, 1] in float32."""
    tags = getattr(image, "tag_v2", None) or {}
    if image.mode == "F":
        grey = values.astype(np.float32)
        low, high = float(grey.min()), float(grey.max())
        if not (low >= 0 and high <= 1):
            got = f"values from {low:g} to {high:g}"
            raise expected(name, "float pixels from 0 to 1", got, "Scale them to that range.")
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # there Pillow widens 16 bits
        remedy = "Scale them to [0, 1] as floats (mode F), or save them in 8 or 16 bits."
        raise expected(name, "pixels of a known range", "32-bit or signed integers (mode I)", remedy)
    else:
        bits = 12 if image.format == "TIFF" and tags.get(_BITS) == (12,) else 16
        grey = values.astype(np.float32) / np.float32(2**bits - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.float32(1), grey)
    return grey


def principal_colours(features: Tensor, samples: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the three principal components of features, and the range to show them in.

    Args:
        features: feature vectors.  # [N, D]
        samples: components are fitted to at most this many, evenly spread over N.

    Returns:
        Mean ``[D]``, components ``[D, 3]``, and lower and upper end of the range ``[3]`` (first and last percent
        cut off), for :func:`colours`.

    Raises:
        InputError: features that are not finite.
    """
    step = max(1, features.shape[0] // samples)
    sample = features[::step].detach().to("cpu", torch.float64)  # [n, D]
    if not sample.isfinite().all():
        raise expected("features", "finite numbers", "NaN or infinity", "float16 overflows: try bfloat16.")
    mean = sample.mean(0)
    _, _, components = torch.linalg.svd(sample - mean, full_matrices=False)
    components = components[:3].T  # [D, 3]
    components = F.pad(components, (0, 3 - components.shape[1]))
    # The sign of a component is arbitrary; fix it so that pictures are reproducible.
    components = components * torch.where(components.sum(0) < 0, -1.0, 1.0)
    projected = (sample - mean) @ components
    low, high = torch.quantile(projected, projected.new_tensor((0.01, 0.99)), dim=0)
    return mean, components, low, torch.maximum(high, low + 1e-12)


def colours(features: Tensor, basis: tuple[Tensor, Tensor, Tensor, Tensor]) -> np.ndarray:
    """Show features as colours of a basis from :func:`principal_colours`; ``[H, W, D] -> [H, W, 3]`` uint8."""
    # Row by row: the map may fill most of the memory.
    return np.stack([_to_bytes(_project(row, basis)) for row in features.detach()])


def _project(features: Tensor, basis: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:  # [..., 3]
    """Project features ``[..., D]`` on three components, 0 and 1 being the ends of their range."""
    mean, components, low, high = (t.to(torch.float32) for t in basis)
    return ((features.to("cpu", torch.float32) - mean) @ components - low) / (high - low)


def _to_bytes(colours: Tensor) -> np.ndarray:
    """Show values from 0 to 1 as uint8."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def panels(pictures: Sequence[tuple[str, np.ndarray]], size: tuple[int, int]) -> Image:
    """Set titled pictures side by side at equal size; pixels stay visible where they are enlarged.

    Args:
        pictures: title and picture ``[H, W, 3]`` uint8 of each panel.
        size: height and width of every panel in pixels, without its title.
    """
    pillow = require("PIL.Image", "demo", "drawing a picture")
    draw = require("PIL.ImageDraw", "demo", "drawing a picture")
    (height, width), gap = size, 6
    canvas = pillow.new("RGB", ((width + gap) * len(pictures) - gap, height + BAR_HEIGHT), "white")
    left = 0
    for title, picture in pictures:
        enlarged = picture.shape[0] <= height and picture.shape[1] <= width
        kind = pillow.Resampling.NEAREST if enlarged else pillow.Resampling.LANCZOS
        draw.Draw(canvas).text((left + 2, 5), title, fill="black")
        canvas.paste(pillow.fromarray(picture).resize((width, height), kind), (left, BAR_HEIGHT))
        left += width + gap
    return canvas


def feature_picture(image: Image, tokens: Tensor, features: Tensor) -> Image:
    """Draw input, backbone features, their bilinear enlargement and upsampled features, in the same colours.

    Every panel has the image's proportions and at most ``MAX_PANEL`` pixels a side.

    Args:
        image: the input, any PIL image that :func:`normalise` takes.
        tokens: the backbone's last hidden state.  # [h, w, D]
        features: upsampled features.  # [H, W, D]

    Raises:
        InputError: features that are not finite.
    """
    H, W, D = features.shape
    picture = np.array(rgb(image))  # [height, width, 3]
    basis = principal_colours(tokens.reshape(-1, D))
    # Projection and interpolation commute: three channels are enlarged, not D.
    coarse = _project(tokens.detach(), basis)  # [h, w, 3]
    enlarged = F.interpolate(coarse.permute(2, 0, 1)[None], (H, W), mode="bilinear")  # [1, 3, H, W]
    height, width = picture.shape[:2]
    scale = min(max(height, H, MIN_PANEL) / height, MAX_PANEL / max(height, width))
    shown = [
        ("input", picture),
        (f"backbone {tokens.shape[0]}x{tokens.shape[1]}", _to_bytes(coarse)),
        ("bilinear", _to_bytes(enlarged[0].permute(1, 2, 0))),
        (f"ViT-Up {H}x{W}", colours(features, basis)),
    ]
    return panels(shown, (max(1, round(scale * height)), max(1, round(scale * width))))


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen.

    Args:
        path: where the file shall be; its folder must exist.
        write: called with the temporary path.

    Raises:
        InputError: the path cannot be written.
    """
    target = Path(path)
    # Short: the target's name may be as long as names can be.
    temporary = target.with_name(f".vitup-{secrets.token_hex(4)}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:  # some writers, safetensors among them, keep others from reading
            temporary.chmod(mode)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{brief(target, 500)}: cannot be written ({error.strerror or error}).") from error
    finally:
        temporary.unlink(missing_ok=True)
