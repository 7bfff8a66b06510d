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


def export_onnx(
    model: Upsampler,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    size: tuple[int, int] | None = None,
) -> None:
    """Write a model as ONNX, for onnxruntime and others.

    Args:
        model: see :func:`exported_program`.
        path: the file, ``.onnx``, whole or absent; weights beyond 2 GB lie beside it in ``NAME.onnx.data``.
        image_size: see :func:`exported_program`.
        size: see :func:`exported_program`.

    Raises:
        InputError: an argument that does not fit, or a file that cannot be written.
        MissingPackageError: onnx or onnxscript is not installed.
    """
    require("onnx", "export", "writing ONNX")
    require("onnxscript", "export", "writing ONNX")
    target = _target(path, ".onnx")
    program = exported_program(model, image_size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["image"] if size is not None else ["image", "coords"],
            output_names=["features"],
            verbose=False,
        )
    _write(target, converted.save)


def export_pt2(
    model: Upsampler,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    size: tuple[int, int] | None = None,
) -> None:
    """Compile a model ahead of time into a package, for ``torch._inductor.aoti_load_package`` and C++.

    Args:
        model: see :func:`exported_program`.
        path: the file, ``.pt2``, whole or absent.
        image_size: see :func:`exported_program`.
        size: see :func:`exported_program`.

    Raises:
        InputError: an argument that does not fit, a file that cannot be written, or no compiler.
    """
    target = _target(path, ".pt2")
    program = exported_program(model, image_size, size)

    def compile_to(path: str) -> None:
        """Compile, for which Inductor needs a C++ compiler, or on a GPU Triton."""
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=path)
        except OSError:
            raise
        except Exception as error:
            reason = brief(str(error).partition("\n")[0], 300) or type(error).__name__
            raise InputError(f"model: AOTInductor cannot compile it ({reason}).") from error

    _write(target, compile_to)


def _target(path: str | os.PathLike[str], ending: str) -> Path:
    """Check where a file shall be written."""
    target = Path(path)
    if target.suffix != ending:
        raise expected("path", f"a file name that ends in {ending}", brief(path))
    if not target.parent.is_dir():
        raise expected("path", "a file in a folder that exists", brief(path))
    return target


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
