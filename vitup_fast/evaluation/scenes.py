"""Synthetic scenes of real pictures: cut-outs on photographs, with exact masks and exact correspondences."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .. import __version__
from ..errors import InputError, expected, require
from ..files import write_json
from ..images import read_image
from ..ops.checks import check_count
from ..pictures import pictures_below, read_sound
from .files import shown

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES, PAIRS = "scenes.json", "pairs.json"
BACKGROUND = "background"
TRAIN, HELD_OUT = "train", "held-out"
HELD_OUT_PART = 0.3  # of cut-outs, photographs and scenes
FEWEST_OF_A_CLASS = 4
SMALLEST_CUTOUT = 96  # pixels along its longer side
MARGIN = 2  # transparent pixels around a cut-out, so that its border is interpolated
OBJECT_SIDE = (0.3, 0.65)  # of the scene's
MOST_ENLARGED = 2.0
MOST_TURNED = 30.0  # degrees
GAIN = (0.8, 1.2)
MOST_OTHERS = 3
KEYPOINTS = 10
FAINTEST = 9.0  # smaller eigenvalue of the structure tensor at a keypoint, in grey levels squared
FEWEST_SHARED = 3


class _Cutout(NamedTuple):
    """A picture with alpha, cut to what is opaque."""

    image: Image  # RGBA, with a transparent margin
    offset: tuple[int, int]  # of its upper left corner from that of the file's picture; x, y
    keypoints: np.ndarray  # [K, 2] (x, y) in the file's picture


class _Placed(NamedTuple):
    """A cut-out in a scene."""

    cutout: Path
    matrix: np.ndarray  # [2, 3] from (x, y, 1) in the cut-out's file to (x, y) in the scene
    visible: np.ndarray  # [S, S] bool


class _Scene(NamedTuple):
    image: Image
    mask: Image
    objects: list[_Placed]  # the shared one last
    photograph: Path


def make_scenes(
    cutouts: Path,
    photographs: Path,
    output: Path,
    *,
    scenes: int = 60,
    seed: int = 0,
    size: int = 448,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Paste cut-outs on photographs, and write pictures, masks and correspondences.

    Scenes come in pairs that share a cut-out: at another place, scale, rotation and brightness, on another photograph.
    Three tenths of cut-outs, photographs and scenes are held out: nothing in a held-out scene occurs in the others.
    The same folders and arguments give the same files bit for bit (with the same Pillow and NumPy).

    ``output`` then holds ``images/``, ``masks/`` (class indices, 0 is the background), ``scenes.json`` (seed, classes
    and what lies where) and ``pairs.json`` (correspondences in the form of SPair-71k: the centre of the upper left
    pixel is (0, 0)).

    Args:
        cutouts: folder with a folder of pictures with alpha for each class; what it holds inside belongs to the class.
        photographs: folder of pictures, with those inside it.
        output: a folder that does not exist yet, or is empty.
        scenes: number of scenes, even.
        seed: seeds everything.
        size: height and width of a scene in pixels.
        progress: called with 1 after every scene.

    Raises:
        InputError: folders without usable pictures, too many broken ones, fewer than two classes, or no room.
    """
    if check_count("scenes", scenes) % 2:
        raise expected("scenes", "an even number, for they come in pairs", scenes)
    check_count("seed", seed, 0)
    if check_count("size", size) < 64:
        raise expected("size", "at least 64 pixels", size)
    _check_output(output, scenes * size * size * 4)

    by_class, left_out = _usable_cutouts(cutouts, size)
    usable = [path for path, _ in read_sound(pictures_below(photographs, "photographs"), _read_photograph)]
    if len(usable) < 4:
        raise expected("photographs", "at least 4 pictures", f"{len(usable)} in {shown(photographs)}")
    pools = _split(by_class, usable, seed)
    classes = [BACKGROUND, *by_class]
    labels = {path: classes.index(name) for name, paths in by_class.items() for path in paths}

    record: dict[str, Any] = {
        "made_by": f"vitup_fast {__version__}",
        "seed": seed,
        "size": size,
        "classes": classes,
        "left_out": left_out,
        "scenes": [],
    }
    pairs = []
    temporary = output.with_name(f".vitup-{secrets.token_hex(4)}.part")
    held_out = max(1, round(HELD_OUT_PART * scenes / 2)) if scenes > 2 else 0
    try:
        for folder in ("images", "masks"):
            (temporary / folder).mkdir(parents=True)
        for index in range(scenes // 2):
            split = TRAIN if index < scenes // 2 - held_out else HELD_OUT
            made = _make_pair(np.random.default_rng((seed, 1 + index)), index, *pools[split], labels, size)
            names = [f"{2 * index + i:05d}.png" for i in range(2)]
            for name, scene in zip(names, made, strict=True):
                scene.image.save(temporary / "images" / name)
                scene.mask.save(temporary / "masks" / name)
                record["scenes"].append(_scene_record(scene, name, split, labels, cutouts, photographs))
                if progress is not None:
                    progress(1)
            category = classes[labels[made[0].objects[-1].cutout]]
            pairs += _pair_record(made, names, category, size, index, split)
        write_json(temporary / SCENES, record)
        write_json(temporary / PAIRS, pairs)
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    except OSError as error:
        raise InputError(f"output: {shown(output)} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_output(output: Path, needed: int) -> None:
    """Refuse a folder that holds something, or a disk without room."""
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise expected("output", "a new or empty folder", shown(output), "Choose another, or remove it.")
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
    except OSError as error:
        raise InputError(f"output: {shown(output)} cannot be made ({error.strerror or error}).") from error
    if free < needed:
        raise expected("output", f"{needed / 2**20:,.0f} MiB of free space", f"{free / 2**20:,.0f} MiB")


def _usable_cutouts(folder: Path, size: int) -> tuple[dict[str, list[Path]], list[str]]:
    """List cut-outs by class, and name what was left out: too small, without transparency, or in too small a class."""
    paths = pictures_below(folder, "cutouts")
    usable: dict[str, list[Path]] = {}
    left_out = []
    for path, cutout in read_sound(paths, lambda path: _read_cutout(path, size)):
        name, *inside = path.relative_to(folder).parts
        if cutout is None or not inside:
            left_out.append(path.relative_to(folder).as_posix())
        else:
            usable.setdefault(name, []).append(path)
    classes = {name: found for name, found in usable.items() if len(found) >= FEWEST_OF_A_CLASS}
    left_out += [
        p.relative_to(folder).as_posix() for name in usable if name not in classes for p in usable[name]
    ]
    if not classes:
        raise expected(
            "cutouts",
            f"folders, one a class, with at least {FEWEST_OF_A_CLASS} pictures each that have alpha and "
            f"{SMALLEST_CUTOUT} opaque pixels along a side",
            f"{len(paths)} pictures in {shown(folder)}, of which no class has so many",
        )
    if len(classes) + 1 > 255:
        raise expected("cutouts", "at most 254 classes", len(classes))
    return classes, sorted(left_out)


@lru_cache(maxsize=256)
def _read_cutout(path: Path, size: int) -> _Cutout | None:
    """Read a cut-out; None if it has no transparency or is too small."""
    pillow = require("PIL.Image", "demo", "reading a cut-out")
    read_image(path)  # says what is wrong with the file
    with pillow.open(path) as file:
        if not file.has_transparency_data:
            return None
        image = file.convert("RGBA")
    alpha = np.array(image.getchannel("A"))
    rows, columns = (np.flatnonzero((alpha >= 128).any(axis=axis)) for axis in (1, 0))
    if alpha.min() >= 128 or not rows.size or max(np.ptp(rows), np.ptp(columns)) + 1 < SMALLEST_CUTOUT:
        return None
    left, top = int(columns[0]) - MARGIN, int(rows[0]) - MARGIN
    image = image.crop((left, top, int(columns[-1]) + 1 + MARGIN, int(rows[-1]) + 1 + MARGIN))
    keypoints = _corners(image, size) + np.array((left, top))
    return _Cutout(image, (left, top), keypoints)


def _corners(image: Image, size: int) -> np.ndarray:  # [K, 2]
    """Find distinct points well inside a cut-out: peaks of the structure tensor's smaller eigenvalue, far apart."""
    pillow = require("PIL.Image", "demo", "reading a cut-out")
    scale = min(1.0, size / 2 / max(image.size))
    width, height = (max(8, round(scale * n)) for n in image.size)
    pixels = np.array(image.resize((width, height), pillow.Resampling.BOX), dtype=np.float64)
    alpha = torch.from_numpy(pixels[:, :, 3])[None, None]
    gradients = np.gradient(pixels[:, :, :3].mean(axis=2))  # by y, by x
    y, x = (torch.from_numpy(g)[None, None] for g in gradients)
    xx, yy, xy = (F.avg_pool2d(p, 5, 1, 2) for p in (x * x, y * y, x * y))
    strength = (xx + yy) / 2 - (((xx - yy) / 2) ** 2 + xy**2).sqrt()
    inside = -F.max_pool2d(-alpha, 7, 1, 3) >= 250  # transparent pixels are no part of it, nor is its outline
    strength = torch.where(inside, strength, 0)[0, 0].numpy()
    apart = max(4.0, math.sqrt(inside.sum().item()) / 5)
    rows, columns = np.mgrid[:height, :width]
    found = []
    while len(found) < KEYPOINTS and strength.max() > FAINTEST:
        row, column = np.unravel_index(strength.argmax(), strength.shape)
        found.append(((column + 0.5) * image.width / width, (row + 0.5) * image.height / height))
        strength[(rows - row) ** 2 + (columns - column) ** 2 < apart**2] = 0
    return np.array(found, dtype=np.float64).reshape(-1, 2)


@lru_cache(maxsize=32)
def _read_photograph(path: Path) -> Image:
    return read_image(path)


def _split(
    by_class: dict[str, list[Path]], photographs: list[Path], seed: int
) -> dict[str, tuple[dict[str, list[Path]], list[Path]]]:
    """Divide cut-outs of every class, and photographs, into those of training scenes and of held-out ones."""
    rng = np.random.default_rng((seed, 0))

    def divide(paths: list[Path]) -> tuple[list[Path], list[Path]]:
        order = [paths[i] for i in rng.permutation(len(paths))]
        count = max(1, round(HELD_OUT_PART * len(paths)))
        return order[count:], order[:count]

    divided = {name: divide(paths) for name, paths in by_class.items()}
    train, held_out = divide(photographs)
    return {
        TRAIN: ({name: parts[0] for name, parts in divided.items()}, train),
        HELD_OUT: ({name: parts[1] for name, parts in divided.items()}, held_out),
    }


def _make_pair(
    rng: np.random.Generator,
    index: int,
    cutouts: dict[str, list[Path]],
    photographs: list[Path],
    labels: dict[Path, int],
    size: int,
) -> tuple[_Scene, _Scene]:
    """Make two scenes that share a cut-out, which lies uppermost."""

    def pick() -> Path:
        """Take any class, then any of its cut-outs."""
        paths = cutouts[list(cutouts)[rng.integers(len(cutouts))]]
        return paths[rng.integers(len(paths))]

    # In turn: few pairs show every class, and many show every cut-out.
    paths = cutouts[list(cutouts)[index % len(cutouts)]]
    shared = paths[index // len(cutouts) % len(paths)]
    first = rng.integers(len(photographs))
    second = (
        (first + 1 + rng.integers(len(photographs) - 1)) % len(photographs) if len(photographs) > 1 else first
    )
    scenes = []
    for photograph in (photographs[first], photographs[second]):
        others = dict.fromkeys(pick() for _ in range(rng.integers(MOST_OTHERS + 1)))
        others.pop(shared, None)  # twice in a picture it would have no one place
        chosen = [*others, shared]
        scenes.append(_compose(rng, chosen, photograph, labels, size))
    return tuple(scenes)


def _compose(
    rng: np.random.Generator, chosen: list[Path], photograph: Path, labels: dict[Path, int], size: int
) -> _Scene:
    """Paste cut-outs on a piece of a photograph, one over the other."""
    pillow = require("PIL.Image", "demo", "drawing a scene")
    image = _read_photograph(photograph)
    side = rng.uniform(0.5, 1) * min(image.size)
    left, top = (rng.uniform(0, n - side) for n in image.size)
    box = (left, top, left + side, top + side)
    canvas = image.resize((size, size), pillow.Resampling.LANCZOS, box).convert("RGBA")
    mask = np.zeros((size, size), dtype=np.uint8)
    owner = np.full((size, size), -1, dtype=np.int64)
    matrices = []
    for index, path in enumerate(chosen):
        layer, matrix = _place(rng, _read_cutout(path, size), size, central=index == len(chosen) - 1)
        canvas.alpha_composite(layer)
        covered = np.array(layer.getchannel("A")) >= 128
        mask[covered], owner[covered] = labels[path], index
        matrices.append(matrix)
    objects = [_Placed(p, m, owner == i) for i, (p, m) in enumerate(zip(chosen, matrices, strict=True))]
    return _Scene(canvas.convert("RGB"), pillow.fromarray(mask), objects, photograph)


def _place(rng: np.random.Generator, cutout: _Cutout, size: int, central: bool) -> tuple[Image, np.ndarray]:
    """Draw a cut-out at a random place, scale, rotation and brightness; return the layer and the map to it."""
    pillow = require("PIL.Image", "demo", "drawing a scene")
    longest = max(cutout.image.size) - 2 * MARGIN
    scale = min(MOST_ENLARGED, rng.uniform(*OBJECT_SIDE) * size / longest)
    angle = math.radians(rng.uniform(-MOST_TURNED, MOST_TURNED))
    reach = 0.2 if central else 0.4
    centre = rng.uniform(0.5 - reach, 0.5 + reach, 2) * size
    gain = rng.uniform(*GAIN)
    # Drawn twice as large by bilinear interpolation, which keeps centres of mass (Pillow's bicubic does not), then
    # averaged: alpha is the share of a pixel that the cut-out covers.
    finer = tuple(max(1, round(2 * scale * n)) for n in cutout.image.size)
    fine = cutout.image.resize(finer, pillow.Resampling.LANCZOS)
    turn = np.array(((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))))
    middle = np.array(finer) / 2
    back = np.column_stack((turn.T, middle - turn.T @ (2 * centre)))
    options = pillow.Transform.AFFINE, tuple(back.flat), pillow.Resampling.BILINEAR
    layer = fine.transform((2 * size, 2 * size), *options).reduce(2)
    pixels = np.array(layer)
    pixels[:, :, :3] = (pixels[:, :, :3] * gain).round().clip(0, 255)
    linear = turn @ np.diag(np.array(finer) / cutout.image.size) / 2
    matrix = np.column_stack((linear, centre - turn @ middle / 2 - linear @ cutout.offset))
    return pillow.fromarray(pixels), matrix


def _scene_record(
    scene: _Scene, name: str, split: str, labels: dict[Path, int], cutouts: Path, photographs: Path
) -> dict[str, Any]:
    """Say what lies where in a scene."""
    return {
        "image": f"images/{name}",
        "mask": f"masks/{name}",
        "split": split,
        "photograph": scene.photograph.relative_to(photographs).as_posix(),
        "objects": [
            {
                "cutout": placed.cutout.relative_to(cutouts).as_posix(),
                "class": labels[placed.cutout],
                "matrix": placed.matrix.tolist(),
                "box": _box(placed.visible),
            }
            for placed in scene.objects
        ],
    }


def _box(visible: np.ndarray) -> list[int] | None:
    """Left, top, right and bottom of what is visible; None if nothing is."""
    rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _pair_record(
    scenes: tuple[_Scene, _Scene], names: list[str], category: str, size: int, index: int, split: str
) -> list[dict[str, Any]]:
    """Correspondences of the shared cut-out that are visible in both scenes; none if they are too few."""
    placed = [scene.objects[-1] for scene in scenes]
    keypoints = _read_cutout(placed[0].cutout, size).keypoints
    points = [keypoints @ p.matrix[:, :2].T + p.matrix[:, 2] for p in placed]  # [K, 2] each
    seen = np.ones(len(keypoints), dtype=bool)
    for where, p in zip(points, placed, strict=True):
        column, row = np.floor(where).astype(np.int64).T
        within = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        seen &= within
        seen[within] &= p.visible[row[within], column[within]]
    if seen.sum() < FEWEST_SHARED:
        return []
    record: dict[str, Any] = {"pair_id": index, "category": category, "split": split}
    for side, name, p, where in zip(("src", "trg"), names, placed, points, strict=True):
        record |= {
            f"{side}_imname": name,
            f"{side}_imsize": [size, size, 3],
            f"{side}_bndbox": _box(p.visible),
            f"{side}_kps": (where[seen] - 0.5).tolist(),  # SPair counts from the centre of the first pixel
        }
    return [record]
