"""The Upsampler as a file that runs without this library: ONNX, or a package of AOTInductor.

What is exported is the definition of every operation in plain PyTorch, for which each runtime has kernels of its own.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import InputError, brief, expected, require
from .network.model import check_size
from .upsampler import Upsampler

# Points that an exported program is traced with; it takes any number from one to the most.
_TRACED_POINTS = 20
_MOST_POINTS = 2**24
ENDINGS = (".onnx", ".pt2")


class _AtPoints(nn.Module):
    """Features of an image at coordinates."""

    def __init__(self, model: Upsampler, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, image: Tensor, coords: Tensor | None = None) -> Tensor:
        """Run backbone and network, by definitions alone."""
        model = self.model
        states = model.backbone.hidden_states(image, model.hidden_layer_img_size)
        grid = model.backbone.patch_grid(image, model.patch_grid_size)
        cache = model.vit_up.prepare(states, grid, impl="reference")
        if self.size is not None:
            return model.vit_up.dense(cache, self.size, impl="reference")
        return model.vit_up(cache, coords, impl="reference")


def exported_program(
    model: Upsampler, image_size: tuple[int, int], size: tuple[int, int] | None = None
) -> ExportedProgram:
    """Export a model for images of one size, with its weights.

    Args:
        model: the model, in the dtype and on the device that the program shall have.
        image_size: height and width of the images in pixels.
        size: rows and columns (H, W) of a map; None makes a program for points, of any number.

    Returns:
        A program of ``image`` [1, 3, H, W], normalised, and ``coords`` [1, N, 2] in float32 that returns features
        [1, N, D]; or of ``image`` alone that returns a map [1, H, W, D].

    Raises:
        InputError: sizes that are no sizes.
    """
    height, width = check_size("image_size", image_size)
    size = None if size is None else check_size("size", size)
    image = torch.zeros(1, 3, height, width, dtype=model.dtype, device=model.device)
    arguments, shapes = {"image": image}, {"image": {}}
    if size is None:
        arguments["coords"] = torch.rand(1, _TRACED_POINTS, 2, dtype=torch.float32, device=model.device)
        shapes["coords"] = {1: Dim("points", min=1, max=_MOST_POINTS)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's own, about what it traces
        return torch.export.export(
            _AtPoints(model, size).eval(), (), arguments, dynamic_shapes=shapes, strict=False
        )


def export(
    model: Upsampler,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    size: tuple[int, int] | None = None,
) -> None:
    """Write a model as a file that runs without this library.

    Args:
        model: see :func:`exported_program`.
        path: the file, whole or absent: ``.onnx``, for onnxruntime and others, with weights beyond 2 GB beside it in
            ``NAME.onnx.data``; or ``.pt2``, compiled for ``torch._inductor.aoti_load_package`` and C++.
        image_size: see :func:`exported_program`.
        size: see :func:`exported_program`.

    Raises:
        InputError: an argument that does not fit, a file that cannot be written, or no compiler for a ``.pt2``.
        MissingPackageError: onnx or onnxscript is not installed, for an ``.onnx``.
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
        raise expected("path", f"a file name that ends in {' or '.join(ENDINGS)}", brief(path))
    if not target.parent.is_dir():
        raise expected("path", "a file in a folder that exists", brief(path))
    if target.suffix == ".onnx":
        require("onnx", "export", "writing ONNX")
        require("onnxscript", "export", "writing ONNX")
    program = exported_program(model, image_size, size)
    convert = _to_onnx if target.suffix == ".onnx" else _to_package
    _write(target, lambda file: convert(program, file))


def _to_onnx(program: ExportedProgram, file: str) -> None:
    """Translate a program to ONNX."""
    inputs = list(program.graph_signature.user_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"dynamo": True, "input_names": inputs, "output_names": ["features"], "verbose": False}
        converted = torch.onnx.export(program, **options)
    converted.save(file)


def _to_package(program: ExportedProgram, file: str) -> None:
    """Compile a program, for which Inductor needs a C++ compiler, or on a GPU Triton."""
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=file)
    except OSError:
        raise
    except Exception as error:
        reason = brief(str(error).partition("\n")[0], 300) or type(error).__name__
        raise InputError(f"model: AOTInductor cannot compile it ({reason}).") from error


def _write(target: Path, write: Callable[[str], object]) -> None:
    """Write a file under its name in a folder of its own, and move what lies there to its place.

    ONNX names the file of its weights inside, so that both keep their names.
    """
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            write(str(Path(folder) / target.name))
            for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
                os.replace(written, target.parent / written.name)
    except OSError as error:
        raise InputError(f"{brief(target, 300)}: cannot be written ({error.strerror or error}).") from error
