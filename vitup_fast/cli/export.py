"""``vitup-fast export``: a model as a file that runs without this library."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import brief, expected, require
from ..export import export
from ..testing import relative_error
from ..upsampler import Upsampler
from .upsample import add_model_arguments, load_model

CHECKED_POINTS = 50


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Describe the subcommand."""
    parser = commands.add_parser("export", help="write a model as ONNX, or compiled by AOTInductor")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--onnx", type=Path, metavar="FILE", help="write ONNX (extra: export)")
    kind.add_argument("--pt2", type=Path, metavar="FILE", help="write a package of AOTInductor")
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        default=(448, 448),
        metavar=("H", "W"),
        help="size of the images in pixels (448 448)",
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="return a map of so many cells, not points"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not run the file and compare it with PyTorch"
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file, and say how far its features are from PyTorch's."""
    option, path = ("onnx", args.onnx) if args.pt2 is None else ("pt2", args.pt2)
    if path.suffix != f".{option}":
        raise expected(f"--{option}", f"a file name that ends in .{option}", brief(path))
    if option == "onnx" and not args.no_check:
        require("onnxruntime", "export", "running ONNX (or pass --no-check)")
    model = load_model(args)
    image_size, size = tuple(args.image_size), None if args.size is None else tuple(args.size)
    export(model, path, image_size, size)
    print(f"{path}: image [1, 3, {image_size[0]}, {image_size[1]}] in {model.dtype}", end="")
    print(", coords [1, N, 2] in float32" if size is None else f", a map of {size[0]} x {size[1]} cells")
    if not args.no_check:
        difference = compare(model, (run_onnx if option == "onnx" else run_pt2)(path), image_size, size)
        print(f"relative difference to PyTorch: {difference:.1e}")
    return 0


def compare(
    model: Upsampler,
    run_file: Callable[[dict[str, Tensor]], Tensor],
    image_size: tuple[int, int],
    size: tuple[int, int] | None,
) -> float:
    """Relative difference of a file's features of a random image from those of the model."""
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(1, 3, *image_size, generator=generator, dtype=torch.float32, device="cpu").to(
        model.device, model.dtype
    )
    coords = torch.rand(1, CHECKED_POINTS, 2, generator=generator, dtype=torch.float32, device="cpu").to(
        model.device
    )
    with torch.no_grad():
        if size is None:
            return relative_error(run_file({"image": image, "coords": coords}), model(image, coords).double())
        return relative_error(run_file({"image": image}), model.dense(image, size).double())


def run_onnx(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """Open a file with onnxruntime."""
    runtime = require("onnxruntime", "export", "running ONNX")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(
        session.run(None, {n: t.cpu().numpy() for n, t in inputs.items()})[0]
    )


def run_pt2(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """Load a package of AOTInductor."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: package(**inputs)
