"""Linear segmentation: how well a linear head reads classes off features, at the token grid and at every pixel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, expected, require
from ..files import read_json
from ..images import image_size, read_image
from ..network.backbone import Backbone
from ..pictures import pictures_below, read_sound
from ..upsampler import Upsampler
from .features import (
    FeatureFunction,
    Head,
    ImageFeatures,
    Method,
    Size,
    frozen_backbone,
    hidden_states,
    methods_of,
)
from .files import Journal, digest, markdown, shown
from .scenes import HELD_OUT, SCENES, TRAIN

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

UNLABELLED = 255
HELD_OUT_EVERY = 3  # pictures, where nothing says which are held out
PIXELS_PER_PICTURE = 2048
MOST_SAMPLES = 2**17  # of all pictures together: float64 copies of them must fit in memory
WEIGHT_PENALTY = 1e-3
MOST_STEPS = 200
AT_TOKENS, AT_PIXELS = "tokens", "pixels"


class LabelledPicture(NamedTuple):
    """A picture, its mask of class indices, and whether it is held out."""

    image: Path
    mask: Path
    held_out: bool


class LabelledFolder(NamedTuple):
    """Pictures with masks, and the names of the classes."""

    pictures: list[LabelledPicture]
    classes: list[str]

    @classmethod
    def read(cls, folder: Path) -> LabelledFolder:
        """Read ``folder/images`` and ``folder/masks``, and check them; a mask is a PNG with its picture's name.

        ``folder/scenes.json``, if there, says which pictures are held out and what the classes are called; without it
        every third picture is held out, in the order of their names, and classes are called by their numbers.
        Broken pictures are left out with a warning, if they are few.

        Raises:
            InputError: no such folder, a mask that is missing or does not fit its picture, an unknown class, or
                nothing to train on or to judge by.
        """
        classes = None
        if (folder / SCENES).is_file():
            pictures, classes = _listed(folder)
        else:
            images = pictures_below(folder / "images", "images")
            pictures = [
                LabelledPicture(
                    image,
                    folder / "masks" / image.relative_to(folder / "images").with_suffix(".png"),
                    index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1,
                )
                for index, image in enumerate(images)
            ]
        sound = [p for p, _ in read_sound(pictures, lambda picture: read_image(picture.image).size)]
        if len({picture.held_out for picture in sound}) < 2:
            raise expected("folder", "pictures to train on and others to judge by", f"{len(sound)} pictures")
        found = {picture: set(read_mask(picture).unique().tolist()) - {UNLABELLED} for picture in sound}
        if classes is None:
            classes = [str(n) for n in range(max(set().union(*found.values()), default=0) + 1)]
        taught = set().union(*(labels for picture, labels in found.items() if not picture.held_out))
        if not taught:
            raise expected("folder", "labelled pixels in the pictures to train on", "none")
        for picture, labels in found.items():
            if unknown := sorted(labels - set(range(len(classes)))):
                wanted = (
                    f"class indices below {len(classes)} ({', '.join(classes)}), or {UNLABELLED} for none"
                )
                raise expected(shown(picture.mask), wanted, ", ".join(map(str, unknown)))
        if untaught := sorted(set().union(*found.values()) - taught):
            names = ", ".join(classes[label] for label in untaught)
            warnings.warn(f"{names}: in no picture to train on; nothing will find them.", stacklevel=2)
        return cls(sound, classes)


def _listed(folder: Path) -> tuple[list[LabelledPicture], list[str]]:
    """Read what ``scenes.json`` says."""
    record = read_json(folder / SCENES)
    try:
        pictures = [
            LabelledPicture(
                folder / s["image"], folder / s["mask"], {TRAIN: False, HELD_OUT: True}[s["split"]]
            )
            for s in record["scenes"]
        ]
        return pictures, [str(name) for name in record["classes"]]
    except (KeyError, TypeError) as error:
        needed = f"'classes', and 'scenes' with 'image', 'mask' and 'split' ({TRAIN} or {HELD_OUT})"
        raise expected(shown(folder / SCENES), needed, f"something else: {error}") from error


def read_mask(picture: LabelledPicture) -> Tensor:
    """Read the mask of a picture: class indices in grey or with a palette, 8 bits.  # [H, W] uint8

    Raises:
        InputError: missing, unreadable, of another size than its picture, or with colours instead of indices.
    """
    pillow = require("PIL.Image", "demo", "reading a mask")
    try:
        with pillow.open(picture.mask) as mask:
            mask.load()
            mode, indices = mask.mode, np.array(mask)
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InputError(f"{shown(picture.mask)}: cannot be read as a mask ({reason}).") from error
    if mode not in ("L", "P", "1"):
        raise expected(shown(picture.mask), "class indices (8 bits of grey, or a palette)", f"mode {mode}")
    size = image_size(picture.image)
    if indices.shape != size:
        (height, width), got = size, " x ".join(map(str, indices.shape[::-1]))
        raise expected(shown(picture.mask), f"the {width} x {height} pixels of its picture", got)
    return torch.from_numpy(indices.astype(np.uint8))


def fit_head(features: Tensor, targets: Tensor) -> Head:
    """Fit a linear head by multinomial logistic regression, in float64 and without chance.

    Features are standardised (the head undoes it); the penalty is ``WEIGHT_PENALTY / 2`` times the squared weights.

    Args:
        features: ``[N, D]``.
        targets: probabilities of the classes.  # [N, C]

    Returns:
        Weight ``[C, D]`` and bias ``[C]``, float32.
    """
    x, targets = features.double(), targets.double()
    mean, deviation = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    x = (x - mean) / deviation
    weight = x.new_zeros(targets.shape[1], x.shape[1]).requires_grad_()
    bias = x.new_zeros(targets.shape[1]).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (
            F.cross_entropy(F.linear(x, weight, bias), targets) + WEIGHT_PENALTY / 2 * weight.square().sum()
        )
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    weight, bias = weight.detach() / deviation, bias.detach()
    return weight.float(), (bias - weight @ mean).float()


class SegmentationScore(NamedTuple):
    """What a head makes of a method's features on the held-out pictures."""

    method: str
    trained_at: str  # AT_TOKENS or AT_PIXELS
    mean_iou: float
    accuracy: float
    iou: dict[str, float]  # by class; those that neither occur nor are found are left out


@torch.no_grad()
def measure_segmentation(
    model: Upsampler,
    folder: LabelledFolder,
    *,
    size: Size | None = None,
    teacher: Backbone | None = None,
    functions: Mapping[str, FeatureFunction] | None = None,
    journal: Journal | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[SegmentationScore]:
    """Train linear heads on features of some pictures, and judge them by the pixels of others.

    One head is trained on the backbone's tokens, where a target is the share of each class in the token's cell, and is
    used with the features of every method. Another is trained for every method on its features at pixels' centres:
    the same 2048 of each picture for all methods, fewer if there are more than 64 pictures. Both are judged by
    intersection over union at all cells of a grid over the held-out pictures; a cell's class is that of the pixel at
    its centre.

    Args:
        model: the network, and its backbone.
        folder: pictures and masks; 255 in a mask means no label.
        size: rows and columns of the grid; None means every pixel.
        teacher: the backbone without adapters, if that of the model has them merged.
        functions: other upsamplers by their names.
        journal: keeps what is done, for a run that is cut off.
        progress: called with the number of pictures done in each step: those to train on for the tokens' head and for
            each method, and those held out for each method.

    Returns:
        A row for each method and head.

    Raises:
        InputError: features or sizes that do not fit.
    """
    journal = Journal(None, {}) if journal is None else journal
    classes = len(folder.classes)
    training = [p for p in folder.pictures if not p.held_out]
    held_out = [p for p in folder.pictures if p.held_out]
    most = max(1, MOST_SAMPLES // len(training))
    frozen = frozen_backbone(model, teacher)
    files = [path for picture in folder.pictures for path in (picture.image, picture.mask)]
    data = digest(folder.classes, [picture.held_out for picture in folder.pictures], *files)

    def done(key: str, pictures: int, compute: Callable[[], T]) -> T:
        """Result of a step, and progress."""
        result = journal(f"{key} {data}", compute)
        if progress is not None:
            progress(pictures)
        return result

    def fit(samples: Callable[[Image, Tensor], tuple[Tensor, Tensor]]) -> list[list]:
        """Head of what a function takes of every picture to train on, as lists."""
        features, targets = [], []
        for picture in training:
            x, target = samples(read_image(picture.image), read_mask(picture))
            features.append(x.float().cpu())
            targets.append(target.cpu())
        return [tensor.tolist() for tensor in fit_head(torch.cat(features), torch.cat(targets))]

    def at_tokens(image: Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states(frozen, image, model.hidden_layer_img_size)[-1].cpu()  # [h, w, D]
        shares = _shares(mask, tuple(tokens.shape[:2]), classes)  # [h, w, C]
        labelled = shares.sum(-1) > 0
        tokens, shares = tokens[labelled], shares[labelled]
        step = math.ceil(len(tokens) / most) or 1
        return tokens[::step], (shares / shares.sum(-1, keepdim=True))[::step]

    def at_pixels(method: Method, image: Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        coords, labels = _some_pixels(mask, min(PIXELS_PER_PICTURE, most))
        return method(image).points(coords.to(model.device)), F.one_hot(labels, classes)

    def confusion(picture: LabelledPicture, method: Method, heads: Sequence[Head]) -> list[list[list[int]]]:
        """Pixels of each class and answer, for every head."""
        mask = read_mask(picture)
        answers = _answers(method(read_image(picture.image)), size or tuple(mask.shape), heads)
        truth = _at_centres(mask, answers[0].shape)
        valid = truth != UNLABELLED
        counts = [torch.bincount(truth[valid] * classes + a[valid], minlength=classes**2) for a in answers]
        return [count.view(classes, classes).tolist() for count in counts]

    def tensors(head: list[list]) -> Head:
        weight, bias = (torch.tensor(values, dtype=torch.float32, device=model.device) for values in head)
        return weight, bias

    shared = tensors(done("head of tokens", len(training), partial(fit, at_tokens)))
    scores = []
    for name, method in methods_of(model, None, teacher, functions).items():
        own = tensors(done(f"head of {name}", len(training), partial(fit, partial(at_pixels, method))))
        totals = torch.zeros(2, classes, classes, dtype=torch.int64, device="cpu")
        for picture in held_out:
            step = partial(confusion, picture, method, (shared, own))
            totals += torch.tensor(done(f"{name} {picture.image}", 1, step), dtype=torch.int64, device="cpu")
        for trained_at, counts in zip((AT_TOKENS, AT_PIXELS), totals, strict=True):
            scores.append(_score(name, trained_at, counts, folder.classes))
    return scores


def _shares(mask: Tensor, size: Size, classes: int) -> Tensor:
    """Share of each class in every cell of a grid over a mask.  # [h, w, C]"""
    shares = torch.zeros(*size, classes, dtype=torch.float32, device="cpu")
    for label in set(mask.unique().tolist()) - {UNLABELLED}:
        plane = (mask == label).to(torch.float32)[None, None]  # [1, 1, H, W]
        shares[:, :, label] = F.adaptive_avg_pool2d(plane, size)[0, 0]
    return shares


def _some_pixels(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres (x, y) in [0, 1] and classes of labelled pixels, the same ones for a mask of the same size."""
    H, W = mask.shape
    # A sequence of low discrepancy spreads them evenly, without chance.
    spread = torch.quasirandom.SobolEngine(2).draw(count, dtype=torch.float64)
    column, row = (spread[:, 0] * W).long().clamp(max=W - 1), (spread[:, 1] * H).long().clamp(max=H - 1)
    labels = mask[row, column].long()
    coords = torch.stack(((column + 0.5) / W, (row + 0.5) / H), dim=1).float()
    labelled = labels != UNLABELLED
    return coords[labelled], labels[labelled]


def _at_centres(mask: Tensor, size: Size) -> Tensor:
    """Class of the pixel at every cell's centre.  # [H, W] int64"""
    rows, columns = (
        ((torch.arange(cells, dtype=torch.float64, device="cpu") + 0.5) / cells * pixels).long()
        for cells, pixels in zip(size, mask.shape, strict=True)
    )
    return mask[rows][:, columns].long()


def _answers(features: ImageFeatures, size: Size, heads: Sequence[Head]) -> list[Tensor]:
    """Class that each head finds in every cell, all of them in one pass.  # [H, W] each"""
    weight, bias = (torch.cat(parts) for parts in zip(*heads, strict=True))
    scores = features.scores(size, (weight, bias))
    return [part.argmax(-1).cpu() for part in scores.split([len(head[1]) for head in heads], dim=-1)]


def _score(method: str, trained_at: str, counts: Tensor, names: Sequence[str]) -> SegmentationScore:
    """Intersection over union from the pixels of each class (rows) and answer (columns)."""
    both = counts.diagonal().double()
    either = counts.sum(0) + counts.sum(1) - counts.diagonal()
    iou = {name: (b / e).item() for name, b, e in zip(names, both, either, strict=True) if e > 0}
    return SegmentationScore(
        method, trained_at, sum(iou.values()) / len(iou), (both.sum() / counts.sum()).item(), iou
    )


def segmentation_table(scores: Sequence[SegmentationScore]) -> str:
    """Draw a table in Markdown."""
    header = ["features", "head trained at", "mIoU", "accuracy"]
    return markdown(header, [row[:4] for row in scores])
