"""``vitup-fast upsample``: features of image files, and pictures of them."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import InputError, brief, expected, require
from ..files import byte_size, digest_file, digest_tensors
from ..images import feature_picture, image_size, normalise, open_image, write_atomically
from ..network.adaptive import AdaptiveReport, check_tolerance
from ..network.model import check_size
from ..sources import HUB_REVISION, WeightsUnavailableError, find_model
from ..upsampler import Upsampler, load
from . import outputs
from .guards import available_memory, enough_memory, interruptible
from .outputs import Target, shown

if TYPE_CHECKING:
    from PIL.Image import Image

ALL_FAILED = 2
SOME_FAILED = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Describe the subcommand."""
    parser = commands.add_parser("upsample", help="write upsampled features of image files")
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file, or a folder of them"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="rows and columns of features (one per pixel)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="interpolate features where that is expected to be off by less, such as 0.15 (compute all)",
    )
    parser.add_argument(
        "--save", default="npy", choices=("npy", "safetensors"), help="format of the features"
    )
    parser.add_argument("--pca", action="store_true", help="also draw the features as colours")
    add_model_arguments(parser)
    parser.add_argument(
        "--skip-existing", action="store_true", help="leave images alone that these settings have finished"
    )
    parser.set_defaults(run=run)


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Describe what :func:`load_model` takes."""
    parser.add_argument(
        "--model",
        default="splus",
        metavar="NAME",
        help="published model, timm model, file or folder, or owner/name on the hub",
    )
    parser.add_argument("--weights", help="checkpoint file, or 'random' (published weights from the hub)")
    parser.add_argument(
        "--revision",
        default=HUB_REVISION,
        help="commit, tag or branch of the model's repository on the hub (main)",
    )
    parser.add_argument("--backbone-weights", help="backbone file (published weights from the hub)")
    parser.add_argument("--backbone", dest="backbone_weights", help=argparse.SUPPRESS)
    parser.add_argument(
        "--hidden-layer-img-size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="image size for hidden states (what the model says, mostly 448 448)",
    )
    parser.add_argument(
        "--hidden-size", dest="hidden_layer_img_size", nargs=2, type=int, help=argparse.SUPPRESS
    )
    parser.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--or-random", action="store_true", help="use random weights if published ones cannot be fetched"
    )


def run(args: argparse.Namespace) -> int:
    """Write features, and pictures if asked for, of every image; return the exit code."""
    # Imported before Ctrl-C raises an exception, which importing may lose.
    require("tqdm", "demo", "showing progress")
    require("PIL.Image", "demo", "reading an image file")
    require("timm", "timm", "building a backbone")
    if args.save == "safetensors":
        require("safetensors.torch", "timm", "writing safetensors")
    with interruptible():
        return _upsample(args)


def _upsample(args: argparse.Namespace) -> int:
    """Plan, so that a mistake costs no time; then work image by image, whatever becomes of the others."""
    check_tolerance(args.tolerance)
    images = outputs.find_images(args.images)
    ignores_case = outputs.make_folder(args.output)
    targets = outputs.name_targets(images, args.output, args.save, args.pca, ignores_case)
    failures: list[InputError] = []
    planned = _plan(args, targets, failures)
    if planned:
        model = load_model(args)
        _check_memory("--hidden-layer-img-size", model.patch_grid_size, model.vit_up.config.dim, model.dtype)
        parameters = digest_tensors(model.state_dict().items())
        for target in planned:
            try:
                settings = _settings(args, target.image, model, parameters)
                if args.skip_existing and outputs.is_made(target, settings):
                    print(f"{shown(target.image)}: done before", flush=True)
                    continue
                with enough_memory(shown(target.image)), torch.no_grad():
                    results, spent = _compute(target, tuple(settings["size"]), model, args.tolerance)
            except InputError as error:
                _fail(error, failures, targets)
                continue
            # A disk that cannot be written ends the run: the next image would fare no better.
            outputs.forget(target)
            for file, result in zip(target.files, results, strict=True):
                _save(file, result)
            outputs.remember(target, settings)
            shape = " x ".join(map(str, results[0].shape))
            cost = f" from {spent.share:.0%} of the queries" if spent is not None else ""
            print(
                f"{shown(target.image)}: {shape}{cost} -> {', '.join(map(shown, target.files))}", flush=True
            )
            del results  # before the next ones are made
    if failures and len(targets) == 1:
        raise failures[0]
    if failures:
        print(f"vitup-fast: {len(failures)} of {len(targets)} images failed:", file=sys.stderr)
        print(*(f"  {error}" for error in failures), sep="\n", file=sys.stderr)
        return SOME_FAILED if len(failures) < len(targets) else ALL_FAILED
    return 0


def _fail(error: InputError, failures: list[InputError], targets: list[Target]) -> None:
    """Keep what became of an image, and say it now if there are others."""
    failures.append(error)
    if len(targets) > 1:
        print(f"vitup-fast: {error}", file=sys.stderr)


def _plan(args: argparse.Namespace, targets: list[Target], failures: list[InputError]) -> list[Target]:
    """Leave out images that cannot succeed, and check that memory and disk hold the results of the rest."""
    on_cpu = args.device.startswith("cpu") if args.device else not torch.cuda.is_available()
    dtype = DTYPES[args.dtype or ("float32" if on_cpu else "bfloat16")]
    dim = find_model(args.model, args.weights, args.revision, fetch=False).config.dim
    written = torch.float32 if args.save == "npy" and dtype == torch.bfloat16 else dtype
    if args.size:
        _check_memory("--size", check_size("--size", tuple(args.size)), dim, dtype, written)
    planned, files = [], []
    for target in targets:
        try:
            size = image_size(target.image)
            outputs.check_names(target)
            if args.size:
                size = tuple(args.size)
            else:
                _check_memory(shown(target.image), size, dim, dtype, written)
        except InputError as error:
            _fail(error, failures, targets)
            continue
        planned.append(target)
        files.append((target.files[0], math.prod(size) * dim * written.itemsize))
    outputs.check_space(args.output, files)
    return planned


def _check_memory(
    name: str, size: tuple[int, int], dim: int, dtype: torch.dtype, written: torch.dtype | None = None
) -> None:
    """Refuse a map of features that memory cannot hold."""
    copies = dtype.itemsize + (written.itemsize if written not in (None, dtype) else 0)
    needed, available = math.prod(size) * dim * copies, available_memory()
    if available is not None and needed > available:
        raise expected(
            name,
            f"features that fit into the {byte_size(available)} of free memory",
            f"{size[0]} x {size[1]} of {dim} numbers: {byte_size(needed)}",
            "Choose a smaller size." if name.startswith("-") else "Choose a smaller --size.",
        )


def load_model(args: argparse.Namespace) -> Upsampler:
    """Load the model, with random weights as the last resort if that is wanted."""
    options = {
        "backbone_weights": args.backbone_weights,
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "hidden_layer_img_size": tuple(args.hidden_layer_img_size) if args.hidden_layer_img_size else None,
        "revision": args.revision,
    }
    try:
        return load(args.model, args.weights, **options)
    except WeightsUnavailableError as error:
        if not args.or_random:
            raise
        print(f"note: {error}", file=sys.stderr)
        return load(args.model, "random", **options)


def _settings(args: argparse.Namespace, path: Path, model: Upsampler, parameters: str) -> dict[str, Any]:
    """Return all that determines the results of an image."""
    size = tuple(args.size) if args.size else image_size(path)
    return {
        "vitup_fast": __version__,
        "image": digest_file(path),
        "model": model.model_config["model_name"],
        "parameters": parameters,
        "dtype": model.model_config["dtype"],
        "hidden_layer_img_size": list(model.hidden_layer_img_size),
        "size": list(size),
        **({} if args.tolerance is None else {"tolerance": args.tolerance}),
    }


def _compute(
    target: Target, size: tuple[int, int], model: Upsampler, tolerance: float | None
) -> tuple[tuple[Tensor | Image, ...], AdaptiveReport | None]:
    """Compute what a target's files shall hold: features ``[H, W, D]`` on the CPU, and a picture of them.

    With a tolerance the cost of the features is returned as well.
    """
    tqdm = require("tqdm", "demo", "showing progress").tqdm
    image = open_image(target.image)
    with tqdm(total=size[0] * size[1], desc=brief(target.image.name, 40), unit="query") as bar:
        reports: list[AdaptiveReport] = []
        adaptive = {} if tolerance is None else {"tolerance": tolerance, "report": reports.append}
        features = model.dense(image, size, progress=bar.update, **adaptive)[0].cpu().contiguous()
    if not all(row.isfinite().all() for row in features):
        remedy = "float16 overflows: try --dtype bfloat16." if features.dtype == torch.float16 else ""
        raise expected(shown(target.image), "finite features", "NaN or infinity", remedy)
    if target.files[0].suffix == ".npy" and features.dtype == torch.bfloat16:
        features = features.float()  # npy has no bfloat16
    pictures = (_picture(image, model, features) for _ in target.files[1:])
    return (features, *pictures), reports[0] if reports else None


def _picture(image: Image, model: Upsampler, features: Tensor) -> Image:
    """Draw input, backbone features, bilinear and upsampled features."""
    images = normalise(image, model.backbone.mean, model.backbone.std).to(model.device)
    tokens = model.backbone.hidden_states(images, model.hidden_layer_img_size)[-1][0]  # [h, w, D]
    return feature_picture(image, tokens, features)


def _save(path: Path, result: Tensor | Image) -> None:
    """Write features as npy or safetensors, or a picture as PNG, by the path's suffix."""

    def write(temporary: Path) -> None:
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                # Given the file itself, NumPy does not notice when its last bytes find no room.
                np.save(SimpleNamespace(write=file.write), result.numpy())
        elif path.suffix == ".png":
            text = require("PIL.PngImagePlugin", "demo", "drawing a picture").PngInfo()
            text.add_text("Software", outputs.SOFTWARE)
            result.save(temporary, format="PNG", pnginfo=text)
        else:
            safetensors = require("safetensors.torch", "timm", "writing safetensors")
            try:
                safetensors.save_file({"features": result}, temporary)
            except require("safetensors", "timm", "writing safetensors").SafetensorError as error:
                raise OSError(str(error)) from error

    write_atomically(path, write)
