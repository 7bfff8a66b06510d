"""The command line, ``vitup-fast``: features of image files, what runs here, and how fast."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import __version__, extension
from ..errors import InputError, MissingPackageError, expected, require
from ..images import feature_picture, normalise, read_image, write_atomically
from ..network.model import check_size
from ..ops import implementations
from ..upsampler import ALIASES, PRESET_OF, Upsampler, WeightsUnavailableError, load

if TYPE_CHECKING:
    from PIL.Image import Image

USER_ERROR = 2
INTERRUPTED = 130
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "triton", "timm", "safetensors", "huggingface_hub", "pillow", "tqdm")


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where help is, and exit with code 2."""
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["bench"]:
            end_to_end = require("vitup_fast.bench.end_to_end", "dev", "the benchmark")
            return end_to_end.main(arguments[1:], prog="vitup-fast bench")
        if arguments[:1] == ["tune"]:
            tune = require("vitup_fast.bench.tune", "dev", "the tuner")
            return tune.main(arguments[1:], prog="vitup-fast tune")
        args = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
            return args.run(args)
    except (InputError, MissingPackageError) as error:
        print(f"vitup-fast: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("vitup-fast: interrupted; files written so far are complete.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = _Parser(prog="vitup-fast", description="Vision transformer features at any image coordinate.")
    parser.add_argument("--version", action="version", version=f"vitup-fast {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="{upsample,info,bench,tune}", parser_class=_Parser
    )

    upsample = commands.add_parser("upsample", help="write upsampled features of image files")
    upsample.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    upsample.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    upsample.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="rows and columns of features (one per pixel)"
    )
    upsample.add_argument("--model", default="splus", choices=sorted({*PRESET_OF, *ALIASES}), metavar="NAME")
    upsample.add_argument("--weights", help="checkpoint file, or 'random' (published weights from the hub)")
    upsample.add_argument("--backbone", help="backbone file (published weights from the hub)")
    upsample.add_argument(
        "--save", default="npy", choices=("npy", "safetensors"), help="format of the features"
    )
    upsample.add_argument("--pca", action="store_true", help="also draw the features as colours")
    upsample.add_argument(
        "--hidden-size", nargs=2, type=int, metavar=("H", "W"), help="image size for hidden states (448 448)"
    )
    upsample.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
    upsample.add_argument("--dtype", choices=sorted(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    upsample.add_argument(
        "--or-random", action="store_true", help="use random weights if published ones cannot be fetched"
    )
    upsample.add_argument("--skip-existing", action="store_true", help="leave finished images alone")
    upsample.set_defaults(run=_upsample)

    info = commands.add_parser("info", help="show versions, devices and implementations")
    info.set_defaults(run=_info)
    commands.add_parser("bench", help="measure speed and accuracy against plain PyTorch", add_help=False)
    commands.add_parser(
        "tune", help="find the fastest launch settings of the kernels on this GPU", add_help=False
    )
    return parser


def _upsample(args: argparse.Namespace) -> int:
    """Write features, and pictures if asked for, of every image."""
    tqdm = require("tqdm", "demo", "showing progress").tqdm
    targets = _targets(args)
    # Before the model is loaded: a mistake shall not cost a minute.
    if args.size:
        check_size("--size", tuple(args.size))
    for path in targets:
        read_image(path)
    model = _load(args)
    for path, (features_path, picture_path) in targets.items():
        if args.skip_existing and features_path.exists() and (not args.pca or picture_path.exists()):
            print(f"{path}: done before")
            continue
        image = read_image(path)
        size = tuple(args.size) if args.size else (image.height, image.width)
        with torch.no_grad(), tqdm(total=size[0] * size[1], desc=path.name, unit="query") as bar:
            features = model.dense(image, size, progress=bar.update)[0]  # [H, W, D]
        _save_features(features_path, features)
        written = [str(features_path)]
        if args.pca:
            _save_picture(picture_path, image, model, features)
            written.append(str(picture_path))
        print(f"{path}: {' x '.join(map(str, features.shape))} -> {', '.join(written)}")
    return 0


def _targets(args: argparse.Namespace) -> dict[Path, tuple[Path, Path]]:
    """Make the output folder and name the results of every image."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.output}: cannot be made a folder ({error.strerror or error}).") from error
    try:
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        raise InputError(f"{args.output}: cannot be written ({error.strerror or error}).") from error
    targets = {
        path: (args.output / f"{path.stem}.{args.save}", args.output / f"{path.stem}_pca.png")
        for path in args.images
    }
    if len({features for features, _ in targets.values()}) < len(args.images):
        raise expected("IMAGE", "files of different names", f"{[str(path) for path in args.images]}")
    return targets


def _load(args: argparse.Namespace) -> Upsampler:
    """Load the model, with random weights as the last resort if that is wanted."""
    options = {
        "backbone": args.backbone,
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "hidden_layer_img_size": tuple(args.hidden_size) if args.hidden_size else None,
    }
    try:
        return load(args.model, args.weights, **options)
    except WeightsUnavailableError as error:
        if not args.or_random:
            raise
        print(f"note: {error}", file=sys.stderr)
        return load(args.model, "random", **options)


def _save_features(path: Path, features: Tensor) -> None:
    """Write features ``[H, W, D]``; npy has no bfloat16 and gets float32."""
    features = features.cpu().contiguous()
    if path.suffix == ".npy":
        array = (features.float() if features.dtype == torch.bfloat16 else features).numpy()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, array)
    else:
        safetensors = require("safetensors.torch", "timm", "writing safetensors")

        def write(temporary: Path) -> None:
            safetensors.save_file({"features": features}, temporary)

    write_atomically(path, write)


def _save_picture(path: Path, image: Image, model: Upsampler, features: Tensor) -> None:
    """Draw input, backbone features, bilinear and upsampled features."""
    with torch.no_grad():
        images = normalise(image).to(model.device)
        tokens = model.backbone.hidden_states(images, model.hidden_size)[-1][0]  # [h, w, D]
    picture = feature_picture(image, tokens, features)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def _describe(part: str) -> str:
    """Say which machines a part of the extension serves."""
    module = extension.load()
    if part == "cuda":
        return f"for compute capabilities {module.cuda_architectures}"
    return f"{module.cpu.instruction_set()} (runs here: {', '.join(module.cpu.instruction_sets())})"


def _info(_: argparse.Namespace) -> int:
    """Print versions, devices, what was compiled, and implementations."""
    print(f"vitup-fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {package:16} {version}")
    print("devices")
    print(f"  cpu              {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        print(f"  cuda:{index:<11} {properties.name}, {memory}, compute capability {capability}")
    print("extension")
    print(f"  build            {extension.summary()}")
    for part in extension.KERNELS:
        print(f"  {part:16} {extension.obstacle(part) or _describe(part)}")
    print("implementations")
    for name, available, reason in implementations():
        print(f"  {name:16} {'yes' if available else 'no':4} {reason}")
    return 0
