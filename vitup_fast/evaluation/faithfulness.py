"""Faithfulness: how close upsampled features come to those that the backbone has of a larger image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import expected, require
from ..images import colours, open_image, panels, principal_colours, rgb, write_atomically
from ..network.backbone import Backbone
from ..pictures import read_sound
from ..upsampler import Upsampler
from .features import (
    BILINEAR,
    FeatureFunction,
    ImageFeatures,
    TokenFeatures,
    frozen_backbone,
    hidden_states,
    methods_of,
)
from .files import Journal, digest, markdown, shown

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = (2, 4)
PANEL = 224  # pixels
WORST = 0.5  # 1 - cosine that is drawn white


class Faithfulness(NamedTuple):
    """How close a method comes to the teacher, of one picture at one depth."""

    picture: str
    scale: int  # the teacher's tokens for one of the method's backbone, along an axis
    method: str
    depth: int
    cosine: float  # mean over tokens
    error: float  # norm of the difference over the norm of the teacher's features
    seconds: float  # for the features of the last depth, backbone included


@torch.no_grad()
def measure_faithfulness(
    model: Upsampler,
    pictures: Sequence[Path],
    *,
    scales: Sequence[int] = SCALES,
    teacher: Backbone | None = None,
    functions: Mapping[str, FeatureFunction] | None = None,
    journal: Journal | None = None,
    drawings: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Faithfulness]:
    """Compare features with those that the frozen backbone has of an image with more pixels.

    The largest square in the middle of a picture is resized to twice the side at which the model's backbone sees
    images (896 pixels for 448). The backbone's hidden states of that image are the truth, at the centres of its tokens.
    At scale 2 a method's backbone sees the image at half that side, at scale 4 at a quarter. Methods are those of
    :func:`methods_of`, and feeding the backbone a larger image: half the teacher's side enlarged bilinearly, and all of
    it, which is right by definition and costs what it costs.

    Args:
        model: the network, and its backbone.
        pictures: image files; broken ones are left out with a warning, if they are few.
        scales: even numbers that divide the teacher's tokens along an axis.
        teacher: the backbone without adapters, if that of the model has them merged.
        functions: other upsamplers by their names.
        journal: keeps what is done, for a run that is cut off.
        drawings: an existing folder for drawings of the features, one for each picture.
        progress: called with 1 after every picture.

    Returns:
        One row for each picture, scale, method and depth.

    Raises:
        InputError: no usable picture, or sizes that do not fit.
    """
    frozen = frozen_backbone(model, teacher)
    height, width = model.hidden_layer_img_size
    if height != width:
        raise expected("hidden_layer_img_size", "a square", f"{height} x {width}")
    side = 2 * height
    tokens = side // frozen.patch_size
    methods = {}
    for scale in scales:
        if scale < 2 or scale % 2 or tokens % scale:
            raise expected("scales", f"even numbers that divide the teacher's {tokens} tokens", scale)
        methods[scale] = methods_of(model, (side // scale,) * 2, teacher, functions)
        if scale > 2:
            methods[scale][f"{side // 2} px, bilinear"] = lambda image: TokenFeatures(
                hidden_states(frozen, image, (side // 2,) * 2), BILINEAR
            )
        methods[scale][f"{side} px"] = lambda image: TokenFeatures(
            hidden_states(frozen, image, (side, side)), BILINEAR
        )

    def measure(path: Path, image: Image) -> list[tuple]:
        """Rows of a picture without its name, and its drawing as a file."""
        truth = hidden_states(frozen, image, (side, side))
        rows, maps = [], {}
        for scale in methods:
            maps[scale] = {}
            for name, method in methods[scale].items():
                layers, seconds = _timed(lambda method=method: method(image), (tokens, tokens))
                maps[scale][name] = layers[-1]
                rows += _compare(scale, name, model.vit_up.config.layer_indices, layers, truth, seconds)
        if drawings is not None:
            drawn = draw_faithfulness(image, maps)
            target = drawings / f"{path.stem}_{digest(path)[:6]}.png"
            write_atomically(target, lambda temporary: drawn.save(temporary, format="PNG"))
        return rows

    journal = Journal(None, {}) if journal is None else journal
    results = []
    for path, image in read_sound(pictures, lambda path: middle_square(open_image(path), side)):
        key = f"faithfulness {path.name} {digest(path)}"
        rows = journal(key, lambda path=path, image=image: measure(path, image))
        results += [Faithfulness(shown(path), *row) for row in rows]
        if progress is not None:
            progress(1)
    return results


def middle_square(image: Image, side: int) -> Image:
    """Cut the largest square out of the middle of an image and resize it (Lanczos)."""
    pillow = require("PIL.Image", "demo", "resizing a picture")
    image = rgb(image)
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.crop((left, top, left + short, top + short))
    return image.resize((side, side), pillow.Resampling.LANCZOS)


def _timed(method: Callable[[], ImageFeatures], size: tuple[int, int]) -> tuple[list[Tensor], float]:
    """Return the features of all depths, and the seconds that those of the last alone take."""
    started = time.perf_counter()
    features = method()
    last = features.dense(size)
    if last.is_cuda:
        torch.cuda.synchronize(last.device)
    seconds = time.perf_counter() - started
    return features.layers(size), seconds


def _compare(
    scale: int, method: str, depths: Sequence[int], layers: list[Tensor], truth: list[Tensor], seconds: float
) -> list[tuple]:
    """Rows of the depths that a method has, the last ones."""
    rows = []
    for depth, features, exact in list(zip(depths[::-1], layers[::-1], truth[::-1], strict=False))[::-1]:
        if features.shape != exact.shape:
            raise expected(
                f"method {method!r}", f"features of shape {tuple(exact.shape)}", tuple(features.shape)
            )
        features, exact = features.to(exact.device, torch.float64), exact.double()
        cosine = F.cosine_similarity(features, exact, dim=-1).mean().item()
        error = ((features - exact).norm() / exact.norm()).item()
        rows.append((scale, method, depth, cosine, error, seconds))
    return rows


def faithfulness_table(rows: Sequence[Faithfulness]) -> str:
    """Draw a table in Markdown for every scale: means over the pictures, and how methods stand to bilinear."""
    parts = []
    for scale in dict.fromkeys(row.scale for row in rows):
        here = [row for row in rows if row.scale == scale]
        depths = sorted({row.depth for row in here})
        bilinear = {
            row.picture: row.cosine for row in here if row.method == BILINEAR and row.depth == depths[-1]
        }
        lines = []
        for method in dict.fromkeys(row.method for row in here):
            own = [row for row in here if row.method == method]
            last = [row for row in own if row.depth == depths[-1]]
            gains = [row.cosine - bilinear[row.picture] for row in last]
            cosines = [[row.cosine for row in own if row.depth == depth] for depth in depths]
            lines.append(
                [
                    method,
                    *(fmean(values) if values else "" for values in cosines),
                    fmean(row.error for row in last),
                    f"{fmean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})",
                    f"{median(row.seconds for row in last):.2f}",
                ]
            )
        header = [f"{scale}x", *(f"cosine, depth {depth}" for depth in depths)]
        header += ["relative error", "cosine to bilinear's (lowest, highest)", "seconds"]
        parts.append(markdown(header, lines))
    pictures = len({row.picture for row in rows})
    return (
        "\n".join(parts)
        + f"\nMeans over {pictures} pictures; relative error and differences at the last depth.\n"
    )


def draw_faithfulness(image: Image, maps: Mapping[int, Mapping[str, Tensor]]) -> Image:
    """Draw the features of methods in the teacher's colours, and below them how far they are from it.

    Args:
        image: what was looked at.
        maps: features ``[h, w, D]`` by scale and method, the teacher's last.
    """
    pillow = require("PIL.Image", "demo", "drawing a picture")
    rows, picture = [], np.array(rgb(image))
    for scale, by_method in maps.items():
        *methods, teacher = by_method.items()
        basis = principal_colours(teacher[1].flatten(0, 1))
        shown = [(f"{scale}x: {name}", colours(features, basis)) for name, features in by_method.items()]
        rows.append(panels([("input", picture), *shown], (PANEL, PANEL)))
        distant = []
        for _, features in methods:
            distance = 1 - F.cosine_similarity(
                features.float().cpu(), teacher[1].float().cpu(), dim=-1
            )  # [h, w]
            grey = (distance / WORST).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
            distant.append((f"1 - cosine: {distance.mean():.3f}", np.repeat(grey[:, :, None], 3, axis=2)))
        blank = ("", np.full((1, 1, 3), 255, dtype=np.uint8))
        rows.append(panels([blank, *distant, blank], (PANEL, PANEL)))
    drawn = pillow.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        drawn.paste(row, (0, top))
        top += row.height
    return drawn
