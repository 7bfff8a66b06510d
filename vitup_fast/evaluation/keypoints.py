"""Keypoint matching: how close the best match comes to a point that is known in two pictures (PCK)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import expected
from ..files import read_json
from ..images import image_size, read_image
from ..matching import find_matches
from ..network.backbone import Backbone
from ..pictures import read_sound
from ..upsampler import Upsampler
from .features import FeatureFunction, Method, methods_of
from .files import Journal, digest, markdown, shown

if TYPE_CHECKING:
    from PIL.Image import Image

THRESHOLDS = (0.1, 0.05, 0.01)  # of the longer side of the object's box


class KeypointPair(NamedTuple):
    """Points of an object in two pictures, in pixels; the first pixel's centre is (0.5, 0.5)."""

    image_a: Path
    image_b: Path
    points_a: tuple[tuple[float, float], ...]
    points_b: tuple[tuple[float, float], ...]
    box_side: float  # longer side of the object's box in image_b
    category: str


def read_pairs(path: Path, images: Path | None = None) -> list[KeypointPair]:
    """Read pairs in the form of SPair-71k.

    Args:
        path: a JSON file with a list of annotations, or a folder of files with one each (``PairAnnotation/test``).
            Of each ``src_imname``, ``trg_imname``, ``src_kps``, ``trg_kps`` and ``trg_bndbox`` are read, and
            ``category``.
        images: folder of the pictures, or of folders called after the categories (``JPEGImages``); None means
            ``images`` beside the file.

    Raises:
        InputError: no such file, something else in it, points that are none, or a picture that is missing.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise expected("pairs", "a folder with JSON files in it", shown(path))
        records = [(file, read_json(file)) for file in files]
    else:
        content = read_json(path)
        records = [(path, record) for record in (content if isinstance(content, list) else [content])]
    if not records:
        raise expected("pairs", "at least one pair", f"none in {shown(path)}")
    images = path.parent / "images" if images is None else images
    sizes: dict[Path, tuple[int, int]] = {}
    return [_read_pair(file, record, images, sizes) for file, record in records]


def _read_pair(file: Path, record: Any, images: Path, sizes: dict[Path, tuple[int, int]]) -> KeypointPair:
    """Check an annotation."""
    try:
        category = str(record.get("category", ""))
        names = [str(record[f"{side}_imname"]) for side in ("src", "trg")]
        points = [
            tuple((float(x) + 0.5, float(y) + 0.5) for x, y in record[f"{side}_kps"])
            for side in ("src", "trg")
        ]
        left, top, right, bottom = map(float, record["trg_bndbox"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        needed = (
            "src_imname, trg_imname, src_kps, trg_kps and trg_bndbox in every pair, as SPair-71k has them"
        )
        raise expected(shown(file), needed, f"something else ({type(error).__name__}: {error})") from error
    if len(points[0]) != len(points[1]) or not points[0]:
        raise expected(shown(file), "as many keypoints in both pictures of a pair", [len(p) for p in points])
    side = max(right - left, bottom - top)
    if not side > 0:
        raise expected(shown(file), "a box (left, top, right, bottom)", record["trg_bndbox"])
    paths = []
    for name, found in zip(names, points, strict=True):
        places = [images / name, images / category / name]
        picture = next((place for place in places if place.is_file()), None)
        if picture is None:
            raise expected("images", f"the picture {name}", f"none in {shown(images)}")
        if picture not in sizes:
            sizes[picture] = image_size(picture)
        height, width = sizes[picture]
        outside = [p for p in found if not (0 <= p[0] <= width and 0 <= p[1] <= height)]
        if outside:
            got = f"{outside[0][0] - 0.5:g}, {outside[0][1] - 0.5:g}"
            raise expected(shown(file), f"keypoints within the {width} x {height} pixels of {name}", got)
        paths.append(picture)
    return KeypointPair(*paths, *points, side, category)


class MatchingScore(NamedTuple):
    """How close a method's matches come to the true points."""

    method: str
    pck: dict[str, float]  # share of all points within a threshold, by threshold
    pck_per_pair: dict[str, float]  # mean over pairs of the share of their points
    median_pixels: float  # distance to the true point, in pixels of the picture


@torch.no_grad()
def measure_matching(
    model: Upsampler,
    pairs: Sequence[KeypointPair],
    *,
    teacher: Backbone | None = None,
    functions: Mapping[str, FeatureFunction] | None = None,
    journal: Journal | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[MatchingScore]:
    """Find the first picture's points in the second, and count those that lie close to the true ones.

    All methods search alike (:func:`vitup_fast.matching.find_matches`): the whole picture on a coarse map, then at
    continuous coordinates.

    Args:
        model: the network, and its backbone.
        pairs: from :func:`read_pairs`.
        teacher: the backbone without adapters, if that of the model has them merged.
        functions: other upsamplers by their names.
        journal: keeps what is done, for a run that is cut off.
        progress: called with 1 after every pair.

    Returns:
        A row for each method.

    Raises:
        InputError: too many pairs with pictures that cannot be read; a few are left out with a warning.
    """
    if not pairs:
        raise expected("pairs", "at least one pair", "none")
    journal = Journal(None, {}) if journal is None else journal
    methods = methods_of(model, None, teacher, functions)
    distances: dict[str, list[list[float]]] = {name: [] for name in methods}
    sides = []
    for pair, images in read_sound(pairs, lambda pair: (read_image(pair.image_a), read_image(pair.image_b))):
        key = digest(pair.image_a, pair.image_b, pair.points_a, pair.points_b)
        found = journal(f"matching {key}", partial(_distances, pair, *images, methods, model.device))
        for name in methods:
            distances[name].append(found[name])
        sides.append(pair.box_side)
        if progress is not None:
            progress(1)
    return [_score(name, distances[name], sides) for name in methods]


def _distances(
    pair: KeypointPair, image_a: Image, image_b: Image, methods: Mapping[str, Method], device: torch.device
) -> dict[str, list[float]]:
    """Pixels between every match and its true point, by method."""
    points_a, points_b = (
        torch.tensor(p, dtype=torch.float64, device="cpu") for p in (pair.points_a, pair.points_b)
    )
    coords = (points_a / points_a.new_tensor(image_a.size)).to(device, torch.float32)

    def distance(method: Method) -> Tensor:
        wanted, features = method(image_a).points(coords), method(image_b)
        size = (image_b.height, image_b.width)
        found, _ = find_matches(wanted, features.dense(features.coarse_size), features.points, size)
        return (found.cpu().double() * points_b.new_tensor(image_b.size) - points_b).norm(dim=1)

    return {name: distance(method).tolist() for name, method in methods.items()}


def _score(method: str, distances: Sequence[Sequence[float]], sides: Sequence[float]) -> MatchingScore:
    """Shares of points that are close enough."""
    pck, per_pair = {}, {}
    for threshold in THRESHOLDS:
        near = [[d <= threshold * side for d in pair] for pair, side in zip(distances, sides, strict=True)]
        pck[f"{threshold:g}"] = fmean(hit for pair in near for hit in pair)
        per_pair[f"{threshold:g}"] = fmean(fmean(pair) for pair in near)
    every = torch.tensor([d for pair in distances for d in pair], dtype=torch.float64, device="cpu")
    return MatchingScore(method, pck, per_pair, every.median().item())


def matching_table(scores: Sequence[MatchingScore]) -> str:
    """Draw a table in Markdown."""
    header = ["features", *(f"PCK@{t:g}" for t in THRESHOLDS), "median distance in pixels"]
    rows = [[s.method, *(s.pck[f"{t:g}"] for t in THRESHOLDS), f"{s.median_pixels:.2f}"] for s in scores]
    return markdown(header, rows)
