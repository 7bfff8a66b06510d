"""What tiling costs beside the network, and what is seen where windows meet.

``python -m vitup_fast.bench.tiling COMMAND``, with ``--model`` and its kin where a network takes part:

- ``seams PHOTO.jpg``: how much more features change across windows' borders than further in, where windows are blended,
  cropped to their middles, or laid side by side.
- ``overhead PHOTO.jpg``: time around the network in units of the network's, and bytes of features in units of labels'.
- ``memory``: peak memory of runs of two sizes, with a network that answers at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.end_to_end import resident_bytes
from vitup_fast.bench.harness import check_device, device_name, versions, write_json

import vitup_fast
from vitup_fast import Upsampler
from vitup_fast.errors import expected, require
from vitup_fast.tiling import Reader, open_reader, upsample
from vitup_fast.tiling.plan import Grid
from vitup_fast.tiling.work import Pixels, Source

WAYS = ("blended", "cropped margins", "side by side")
CLASSES = 8


class Seams(NamedTuple):
    """Mean changes of features between neighbouring pixels.

    A network changes more at some places of its token grid than at others, windows or not, and borders of windows lie
    at the same place of it each. So they are compared with that place one and two patches further in as well.

    Attributes:
        border: across the borders of windows.
        border_inside: one pixel further in than the borders, on both sides.
        patch: where borders would be if they lay one or two patches further in, on both sides.
        patch_inside: one pixel further in than there.
    """

    border: float
    border_inside: float
    patch: float
    patch_inside: float

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"across borders {self.border:.4f}, ratio {self.border / self.border_inside:.3f} to a pixel further in "
            f"(where no border is: {self.patch / self.patch_inside:.3f}), "
            f"{self.border / self.patch:.3f} to a patch further in"
        )


def joined(size: int, window: int, way: str) -> tuple[list[int], np.ndarray]:
    """Starts of the windows along an axis, and what each counts at every pixel, ``[windows, size]``."""
    overlap = 0.0 if way == "side by side" else 0.5
    grid = Grid(size, size, window, overlap, Fraction(1), size, size)
    weights = np.zeros((len(grid.columns), size))
    for i, span in enumerate(grid.columns):
        weights[i, span.first : span.last] = grid.weights(span)
    if way == "cropped margins":
        centres = np.array([span.start + window / 2 for span in grid.columns])
        nearest = np.abs(np.arange(size) + 0.5 - centres[:, None]).argmin(axis=0)
        weights = (np.arange(len(centres))[:, None] == nearest).astype(float)
    return [span.start for span in grid.columns], weights


def borders(weights: np.ndarray, margin: int) -> list[int]:
    """Pixels at which another window begins or ends to count, so far inside the image."""
    found = np.flatnonzero(((weights[:, 1:] > 0) != (weights[:, :-1] > 0)).any(axis=0)) + 1
    return [b for b in found.tolist() if margin <= b <= weights.shape[1] - margin]


def features_at(
    model: Upsampler, picture: Path, places: np.ndarray, window: int, way: str
) -> np.ndarray:  # [N, D]
    """Features of single pixels as tiling joins them from its windows.

    Args:
        model: the network.
        picture: what windows are cut from.
        places: row and column of each pixel.  # [N, 2]
        window: side of a window.
        way: one of ``WAYS``.
    """
    source = Source(picture)
    plane = source.open()
    pixels = Pixels(plane, source, model)
    (tops, down), (lefts, across) = (joined(n, window, way) for n in (plane.height, plane.width))
    sums = np.zeros((len(places), model.vit_up.config.dim))
    norm = np.zeros((len(places), 1))
    for top, of_rows in zip(tops, down, strict=True):
        for left, of_columns in zip(lefts, across, strict=True):
            weight = of_rows[places[:, 0]] * of_columns[places[:, 1]]
            seen = np.flatnonzero(weight)
            if not len(seen):
                continue
            image = pixels.normalised([pixels.filled(plane.read(top, left, window, window))])
            inside = (places[seen] + 0.5 - (top, left)) / window
            coords = torch.from_numpy(inside[None, :, ::-1].copy()).float()
            with torch.no_grad():
                features = model(image, coords)[0].double().cpu().numpy()
            sums[seen] += weight[seen, None] * features
            norm[seen] += weight[seen, None]
    plane.reader.close()
    return sums / norm


def seams(model: Upsampler, picture: Path, window: int, way: str, lines: int) -> Seams:
    """Measure changes across every border of windows, on so many lines that cross it."""
    reader = open_reader(picture)
    size = reader.levels[0][:2]
    reader.close()
    if min(size) <= window:
        raise expected("PICTURE", f"more than {window} pixels a side", f"{size[1]} x {size[0]}")
    patch = max(1, round(window * model.backbone.patch_size / max(model.hidden_layer_img_size)))
    shifts = np.array((0, -2, -1, 1, 2)) * patch
    around = (shifts[:, None] + np.arange(-2, 2)).reshape(-1)
    generator = np.random.default_rng(0)
    places = []
    for axis in (0, 1):
        for border in borders(joined(size[axis], window, way)[1], 2 * patch + 2):
            across = np.repeat(generator.integers(0, size[1 - axis], lines), len(around))
            along = np.tile(border + around, lines)
            places.append(np.stack((along, across) if axis == 0 else (across, along), axis=1))
    features = features_at(model, picture, np.concatenate(places), window, way)
    features = features.reshape(len(places) * lines, len(shifts), 4, -1)
    changes = np.linalg.norm(np.diff(features, axis=2), axis=-1).mean(axis=0)  # [shifts, 3]
    at, inside = changes[:, 1], changes[:, ::2].mean(axis=1)
    return Seams(*map(float, (at[0], inside[0], at[1:].mean(), inside[1:].mean())))


class Overhead(NamedTuple):
    """What a run took.

    Attributes:
        windows: windows computed.
        network: seconds in the network.
        around: seconds beside it, from the call to the finished files.
        bytes: of the results.
    """

    windows: int
    network: float
    around: float
    bytes: int


def overhead(model: Upsampler, picture: Path, folder: Path, stride: str, **asked: Any) -> Overhead:
    """Run tiling, with a clock around every call of the network; the two of the estimate are work around it."""
    spent: list[float] = []

    def clocked(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Any, **options: Any) -> Tensor:
            start = time.perf_counter()
            out = call(*arguments, **options)
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            spent.append(time.perf_counter() - start)
            return out

        return timed

    before = model.dense, model.forward
    model.dense, model.forward = map(clocked, before)
    try:
        start = time.perf_counter()
        summary = upsample(
            picture, folder / "out", model, stride=stride, announce=lambda _: spent.clear(), **asked
        )
        seconds = time.perf_counter() - start
    finally:
        del model.dense, model.forward
    files = (f for path in summary.outputs.values() for f in path.rglob("*") if f.is_file())
    return Overhead(summary.windows, sum(spent), seconds - sum(spent), sum(f.stat().st_size for f in files))


def mosaic(picture: Path, side: int, path: Path) -> None:
    """Write a square of a picture and its mirror images, as a tiled and compressed TIFF."""
    reader: Reader = open_reader(picture)
    pixels = reader.read(0, 0, 0, *reader.levels[0][:2]).pixels
    reader.close()
    missing = [max(0, side - n) for n in pixels.shape[:2]]
    pixels = np.pad(pixels, [(0, n) for n in missing] + [(0, 0)], mode="reflect")[:side, :side]
    tifffile = require("tifffile", "giga", "writing a TIFF")
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(512, 512), compression="zlib")


class Constant(nn.Module):
    """A network that answers nothing at once, so that only what is around it takes time and memory."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.vit_up = SimpleNamespace(config=SimpleNamespace(dim=384))
        self.backbone = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, patch_size=14)
        self.hidden_layer_img_size = (window, window)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def dense(self, images: Tensor, size: tuple[int, int], *, head: tuple[Tensor, Tensor]) -> Tensor:
        """Return zero scores for every cell."""
        return images.new_zeros(len(images), *size, len(head[0]))

    def forward(self, images: Tensor, coords: Tensor, *, head: tuple[Tensor, Tensor]) -> Tensor:
        """Return zero scores for every point."""
        return images.new_zeros(len(images), coords.shape[1], len(head[0]))


def write_large(path: Path, side: int, tile: int = 512) -> None:
    """Write a tiled TIFF of so many pixels a side, all of its tiles alike."""
    y, x = np.mgrid[:tile, :tile]
    colours = np.stack([128 + 90 * np.sin((y + c * x) / 23) for c in range(3)], axis=-1).astype(np.uint8)
    encoded = zlib.compress(colours.tobytes(), 1)
    tifffile = require("tifffile", "giga", "writing a TIFF")
    options = {"photometric": "rgb", "tile": (tile, tile), "compression": "zlib"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        tiles = (encoded for _ in range((-(-side // tile)) ** 2))
        file.write(tiles, shape=(side, side, 3), dtype=np.uint8, **options)


class Memory(NamedTuple):
    """What a run took: windows, seconds, and resident bytes of the process before it and at its peak."""

    side: int
    windows: int
    seconds: float
    before: int
    peak: int


def memory(folder: Path, side: int, stride: str) -> Memory:
    """Label a large image in this process, which should be a fresh one."""
    path = folder / f"{side}.tif"
    write_large(path, side)
    head = torch.zeros(CLASSES, 384, dtype=torch.float32, device="cpu"), None
    model: Any = Constant(448)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    done = upsample(path, folder / f"labels_{side}", model, head=head, labels=True, stride=stride)
    seconds = time.perf_counter() - start
    path.unlink()
    return Memory(side, done.windows, seconds, before, resident_bytes("VmHWM"))


def _seams_main(options: argparse.Namespace, model: Upsampler) -> dict[str, Any]:
    window = options.window or max(model.hidden_layer_img_size)
    found: dict[str, Any] = {}
    for picture in options.picture:
        for way in WAYS:
            measured = seams(model, picture, window, way, options.lines)
            found[f"{picture.name}, {way}"] = measured._asdict()
            print(f"{picture.name}, {way}: {measured}", flush=True)
    for way in WAYS if len(options.picture) > 1 else ():
        each = [found[f"{picture.name}, {way}"].values() for picture in options.picture]
        mean = Seams(*np.mean([list(values) for values in each], axis=0).tolist())
        print(f"all pictures, {way}: {mean}", flush=True)
    return found


def _overhead_main(options: argparse.Namespace, model: Upsampler) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = CLASSES, model.vit_up.config.dim
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    found: dict[str, Any] = {}
    for picture in options.picture:
        runs = {}
        for name, asked in (
            ("labels", {"labels": True, "head": (weight, None)}),
            ("features", {"features": "float16"}),
        ):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                mosaic(picture, options.side, Path(folder, "mosaic.tif"))
                run = overhead(model, Path(folder, "mosaic.tif"), Path(folder), options.stride, **asked)
            runs[name] = run._asdict()
            print(
                f"{picture.name}, {options.side} px a side, stride {options.stride}, {name}: {run.windows} windows, "
                f"network {run.network:.1f} s, around it {run.around:.1f} s "
                f"({100 * run.around / run.network:.1f} %), {run.bytes:,} bytes",
                flush=True,
            )
        share = runs["features"]["bytes"] / runs["labels"]["bytes"]
        print(f"{picture.name}: features take {share:.0f} times the bytes of labels", flush=True)
        found[picture.name] = runs
    return found


def _memory_main(options: argparse.Namespace) -> dict[str, Any]:
    if sys.platform != "linux":
        raise expected("memory", "Linux for peak memory", sys.platform)
    found = []
    for side in options.sides:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                run = process.submit(memory, Path(folder), side, options.stride).result()
        found.append(run._asdict())
        print(
            f"{side} px a side, stride {options.stride}: {run.windows:,} windows, {run.seconds:.0f} s, "
            f"peak {run.peak / 2**20:.0f} MiB (before the run {run.before / 2**20:.0f} MiB)",
            flush=True,
        )
    growth = max(r["peak"] for r in found) / min(r["peak"] for r in found) - 1
    print(f"memory differs by {100 * growth:.1f} %", flush=True)
    return {"runs": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see ``--help``.

    Raises:
        InputError: a device that is not there, a picture or a model that cannot be read.
    """
    parser = argparse.ArgumentParser(description="What tiling costs, and what is seen where windows meet.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in ("seams", "overhead", "memory")}
    for name, command in parsers.items():
        command.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
        if name == "memory":
            continue
        command.add_argument("picture", nargs="+", type=Path, help="photographs")
        command.add_argument("--model", default="vit_up_dinov2_small", help="see vitup_fast.load")
        command.add_argument("--weights", help="see vitup_fast.load")
        command.add_argument("--backbone-weights", help="see vitup_fast.load")
        command.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parsers["seams"].add_argument("--window", type=int, help="side of a window in pixels (the model's)")
    parsers["seams"].add_argument("--lines", type=int, default=128, help="lines across each border (128)")
    for name in ("overhead", "memory"):
        parsers[name].add_argument("--folder", type=Path, help="for temporary files")
    parsers["overhead"].add_argument("--side", type=int, default=2048, help="pixels of the mosaic (2048)")
    parsers["overhead"].add_argument("--stride", default="8", help="pixels between cells (8)")
    parsers["memory"].add_argument("--sides", type=int, nargs="+", default=[10000, 40000])
    parsers["memory"].add_argument("--stride", default="64", help="pixels between cells (64)")
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    if options.command == "memory":
        device, found = torch.device("cpu"), _memory_main(options)
    else:
        device = check_device(options.device)
        model = vitup_fast.load(
            options.model, options.weights, backbone_weights=options.backbone_weights, device=device
        )
        run = _seams_main if options.command == "seams" else _overhead_main
        found = run(options, model)
    if options.json is not None:
        about = {"device": device_name(device), "versions": versions(), "command": options.command}
        write_json(options.json, {**about, "found": found})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
