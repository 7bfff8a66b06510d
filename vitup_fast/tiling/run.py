"""A whole run: what is asked is checked and recorded, blocks are shared among workers, and files are made of them."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import InputError, brief, expected, require
from ..files import byte_size, digest_file, digest_tensors, read_record, write_json
from ..heads import head_parameters
from ..network.adaptive import AdaptiveReport, check_tolerance
from ..upsampler import Upsampler
from .answers import (
    FEATURES,
    PALETTE_SAMPLES,
    Answers,
    Basis,
    fit_basis,
    read_basis,
    read_head,
    read_vectors,
    save_basis,
    unit_vectors,
)
from .plan import Grid, Segment, make_grid
from .plan import memory as buffer_bytes
from .read import Plane, foreground
from .report import draw_report
from .resume import (
    PARTS,
    RECORD,
    SUMMARY,
    Progress,
    alone,
    digest_input,
    make_folder,
)
from .work import Job, Pixels, Source, Spent, missing_blocks, part_name, seconds_per_window
from .write import (
    FORMATS,
    Placement,
    Store,
    build_pyramid,
    format_of,
    write_cog,
    write_multiscales,
    write_ome_tiff,
)

MAX_MEMORY = 4 << 30
BASIS = "pca.safetensors"
BASIS_WINDOWS = 16
BLOCKS = "blocks"
REPORT = "report.png"


class Estimate(NamedTuple):
    """What a run will take."""

    windows: int  # those of pixels that turn out to be background included
    seconds: float
    bytes: int  # before compression, on the disk
    memory: int  # bytes of all workers' buffers, beside models and their passes
    adaptive: bool = False  # whether a tolerance saves some of the time

    def __str__(self) -> str:
        """Return one line."""
        saved = " less what the tolerance saves, which only the image decides" if self.adaptive else ""
        return (
            f"{self.windows:,} windows at most, about {_duration(self.seconds)}{saved}, "
            f"up to {byte_size(self.bytes)} on disk, {byte_size(self.memory)} of buffers"
        )


class Summary(NamedTuple):
    """What a run did."""

    outputs: dict[str, Path]  # finished files by the names of their products; none while blocks are missing
    faults: tuple[str, ...]  # tiles of the input that could not be decoded
    windows: int  # computed that begin in this run's blocks
    missing: int  # blocks that other shares still have to make
    spent: AdaptiveReport | None = None  # with a tolerance: cells of all windows, this run's and those before


@dataclass(frozen=True)
class Sharing:
    """Who does the work.

    Attributes:
        workers: processes on this machine.
        shard: number of this share and of all shares, (I, N) with I from 1; they meet in a shared folder.
        dask: address of a Dask scheduler.
    """

    workers: int = 1
    shard: tuple[int, int] = (1, 1)
    dask: str | None = None


@dataclass(frozen=True)
class Options:
    """How an image is read, and who does the work: keyword arguments of :func:`upsample` and :func:`upsample_points`.

    Attributes:
        window: side of a window in pixels; None means the longer side of the model's ``hidden_layer_img_size``.
        level: resolution to work at.
        mpp: micrometres per pixel to work at, averaged from the nearest finer level.
        source_mpp: micrometres per pixel of level 0, where the image does not say.
        bands: one or three channels to read, from 1.
        scale: values that are black and white; needed for all but 8 bits.
        batch: windows computed at once; None means 8 on a GPU and 1 on a CPU.
        strict: stop at a tile that cannot be decoded, instead of leaving it out.
        workers: processes on this machine; with several GPUs each takes the next.
        shard: number of this share and of all shares, from (1, N) to (N, N).
        dask: address of a Dask scheduler that shares out the work instead.
        announce: called with the estimate before anything is computed or written; what it raises ends the run.
        progress: show a bar of windows on stderr.
    """

    window: int | None = None
    level: int = 0
    mpp: float | None = None
    source_mpp: float | None = None
    bands: Sequence[int] | None = None
    scale: tuple[float, float] | None = None
    batch: int | None = None
    strict: bool = False
    workers: int = 1
    shard: tuple[int, int] = (1, 1)
    dask: str | None = None
    announce: Callable[[Estimate], object] = lambda estimate: None
    progress: bool = False

    def sharing(self) -> Sharing:
        """Check who does the work."""
        if self.workers < 1:
            raise expected("--workers", "at least 1", self.workers)
        if not (len(self.shard) == 2 and 1 <= self.shard[0] <= self.shard[1]):
            raise expected("--shard", "I/N with I from 1 to N", f"{self.shard[0]}/{self.shard[-1]}")
        if self.dask is not None and (self.workers > 1 or tuple(self.shard) != (1, 1)):
            raise expected("--dask", "neither --workers nor --shard beside it", "both")
        if self.dask is not None:
            _dask_client(self.dask).close()  # a wrong address is told before anything is written
        return Sharing(self.workers, tuple(self.shard), self.dask)

    def source(self, path: str | os.PathLike[str]) -> Source:
        """Say how an image is read."""
        bands = None if self.bands is None else tuple(self.bands)
        scale = self.scale
        if scale is not None:
            scale = low, high = tuple(float(v) for v in scale)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise expected("--scale", "two finite numbers MIN < MAX", f"{low:g} {high:g}")
        return Source(Path(path).absolute(), bands, self.level, self.mpp, self.source_mpp, scale)

    def check(self, plane: Plane, model: Upsampler) -> None:
        """Check what depends on the image and the model."""
        reader = plane.reader
        if self.scale is None and reader.dtype != np.uint8 and not reader.unit_range:
            remedy = "Say which values are black and white."
            raise expected("--scale", f"MIN MAX for {reader.dtype} pixels", None, remedy)
        window = self.window_of(model)
        if isinstance(window, bool) or not isinstance(window, int) or window < 16:
            raise expected("--window", "at least 16 pixels", window)
        if self.batch_of(model) < 1:
            raise expected("--batch", "at least 1", self.batch)

    def window_of(self, model: Upsampler) -> int:
        """Side of a window."""
        return max(model.hidden_layer_img_size) if self.window is None else self.window

    def batch_of(self, model: Upsampler) -> int:
        """Windows computed at once."""
        return (8 if model.device.type == "cuda" else 1) if self.batch is None else self.batch

    def settings(self, model: Upsampler, plane: Plane) -> dict[str, Any]:
        """Return what of this, and of the model, determines a result."""
        return {
            "vitup_fast": __version__,
            "level": self.level,
            "mpp": self.mpp,
            "source_mpp": self.source_mpp,
            "bands": self.bands if self.bands is None else list(self.bands),
            "scale": self.scale if self.scale is None else list(self.scale),
            "size": [plane.height, plane.width],
            "window": self.window_of(model),
            "batch": self.batch_of(model),
            "model": digest_tensors(model.state_dict().items()),
            "mean": list(model.backbone.mean),
            "std": list(model.backbone.std),
            "dtype": str(model.dtype).removeprefix("torch."),
            "hidden_layer_img_size": list(model.hidden_layer_img_size),
        }


def upsample(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: Upsampler,
    *,
    head: str | os.PathLike[str] | tuple[Tensor, Tensor | None] | None = None,
    labels: bool = False,
    scores: bool = False,
    pca: int | str | os.PathLike[str] | None = None,
    similar: str | os.PathLike[str] | Tensor | None = None,
    features: str | None = None,
    stride: float | str | Fraction = 1,
    overlap: float = 0.5,
    tolerance: float | None = None,
    mask: str | os.PathLike[str] | None = None,
    format: str = ".ome.zarr",
    max_memory: int = MAX_MEMORY,
    **options: Any,
) -> Summary:
    """Compute answers for every cell of an image of any size, and write them by region.

    A run that was interrupted goes on where it was when it is called again with the same arguments.

    Args:
        source: the image; see :func:`open_reader`.
        output: one result's file, of a suffix in ``FORMATS``; or a folder for any number of results.
        model: backbone and network.
        head: linear head, a file or (weight ``[C, D]``, bias ``[C]`` or None).
        labels: write the index of the head's largest blended score.
        scores: write the head's blended scores, float32.
        pca: write so many principal components as uint8 from 1 to 255; or the file of an earlier run's basis.
        similar: write the blended cosine to these vectors, a file or ``[Q, D]``.
        features: write blended features as "float16", or as "int8" with a float32 scale for each cell.
        stride: pixels between cells; fractions as 0.5 or "1/3".
        overlap: share of a window that the next one sees too, from 0 to 0.75; blended by raised cosines.
        tolerance: None computes every cell of every window. A number makes windows adaptive, as the maps of
            :meth:`ViTUp.dense` are: some cells are computed, and those interpolated that are expected to be off by
            less, relative to the root mean square in their window, or to the margin between the two largest scores
            where labels are all that is asked. 0.1 to 0.2 suit features, scores and pictures, 0.5 to 2 labels alone;
            0 computes all.
        mask: foreground, a file or "otsu"; see :func:`foreground`.
        format: suffix of the files in a folder.
        max_memory: bytes of all workers' buffers, beside models and their passes.
        options: those of :class:`Options`: how the image is read, and who does the work.

    Returns:
        What was done.

    Raises:
        InputError: an argument, a file or a disk that does not fit.
        MissingPackageError: an optional package is needed.
    """
    tolerance = check_tolerance(tolerance)
    wanted = Options(**options)
    sharing, described = wanted.sharing(), wanted.source(source)
    source, output = described.path, Path(output).absolute()
    plane = described.open()
    try:
        wanted.check(plane, model)
        size = (plane.height, plane.width)
        dim = model.vit_up.config.dim
        answers = read_answers(dim, head, labels, scores, similar, features)
        found = None if mask is None else foreground(plane.reader, str(mask))
        components = pca if isinstance(pca, int) and not isinstance(pca, bool) else None
        if pca is not None and components is None:
            answers = replace(answers, basis=read_basis(pca, dim))
        # A basis that is not known yet has its place in the plan.
        planned = answers
        if components is not None:
            if not 1 <= components <= dim:
                raise expected("--pca", f"from 1 to {dim} components", components)
            zeros = torch.zeros(dim, components, dtype=torch.float32, device="cpu")
            planned = replace(answers, basis=Basis(zeros[:, 0], zeros, zeros[0], zeros[0]))
        products = planned.products(dim)
        if not products:
            raise expected(
                "what to write", "at least one of labels, scores, pca, similar and features", "none"
            )
        home = output if format_of(output) is None else output.with_name(output.name + ".vitup")
        record = read_record(home / RECORD)
        # Blocks of a run that is continued keep their size, however many workers there are now.
        begun = record.get("settings", {})
        grid = make_grid(
            size,
            wanted.window_of(model),
            _check_overlap(overlap),
            _check_stride(stride),
            planned.channels(dim),
            plane.reader.channels * (1 if plane.reader.dtype == np.uint8 else 4),
            256,
            max_memory // sharing.workers,
            (begun["block"], begun["chunk"]) if {"block", "chunk"} <= begun.keys() else None,
            sum(planned.decoded(dim)) if tolerance else 0,
        )
        stores, targets = _name_outputs(home, output, products, format, grid, plane)
        _check_home(output, home, targets, record)
        notes = digest_input(source, record)
        settings = {
            **wanted.settings(model, plane),
            "input": notes["input"],
            "mask": None if found is None else digest_tensors([("mask", torch.from_numpy(found))]),
            "window step": grid.step,
            "stride": str(grid.stride),
            "block": grid.block,
            "chunk": grid.chunk,
            "products": [p.name for p in products],
            "format": sorted(format_of(t) or "" for t in targets.values()),
            "answers": digest_tensors(answers.named_tensors()),
            "features": features,
            "pca": components,
            **({} if tolerance is None else {"tolerance": tolerance}),
        }
        state = Progress(home)
        root = home if home == output else output.parent
        batch = wanted.batch_of(model)
        job = Job(described, grid, planned, found, home, root, stores, batch, wanted.strict, tolerance)
        done = finished_before(home, settings, record)
        if done is not None:
            return done
        if record:
            state.begin(settings, notes)
        mine = _share(grid, sharing.shard)
        missing = missing_blocks(job, mine) if record else mine
        segments = grid.segments(
            missing, 1 if sharing.dask is None and sharing.workers == 1 else 4 * sharing.workers
        )
        if sharing.dask is not None:
            segments = grid.segments(missing, max(1, len(missing) // 2))
        estimate = _estimate(job, segments, model, sharing, targets, dim)
        wanted.announce(estimate)
        make_folder(home / PARTS)
        check_space(home, estimate)
        if components is not None:
            answers = replace(answers, basis=_basis(home, job, plane, model, components, dim))
            job = replace(job, answers=answers)
        state.begin(settings, notes)
    finally:
        plane.reader.close()
    for store in stores:
        store.array()
    started = time.monotonic()
    if segments:
        compute(job, segments, model, sharing, wanted.progress)
    every = [(r, c) for r in range(grid.blocks[0]) for c in range(grid.blocks[1])]
    sidecars = [read_record(home / PARTS / f"{part_name(*block)}.json") for block in every]
    own = set(missing)
    computed = sum(s["computed"] for block, s in zip(every, sidecars, strict=True) if s and block in own)
    faults = sorted({fault for s in sidecars if s for fault in s["faults"]})
    left = sum(not s for s in sidecars)
    spent = None
    if tolerance is not None:
        sums = Spent().plus(*(Spent(**s["spent"]) for s in sidecars if s))
        spent = sums.report(answers.by_margin)
    if left:
        return Summary({}, tuple(faults), computed, left, spent)
    with alone(home):
        # Another share may have been faster.
        done = finished_before(home, settings, record or state.record())
        if done is not None:
            return done._replace(windows=computed)
        _finish_files(stores, targets, settings)
        facts = {
            "settings": settings,
            "seconds": round(time.monotonic() - started, 1),
            "windows": sum(s["computed"] for s in sidecars),
            "background windows": grid.count_windows(grid.segments(every))
            - sum(s["computed"] for s in sidecars),
            "megapixels": round(math.prod(size) / 1e6, 3),
            "faults": faults,
            **({} if spent is None else {"spent": asdict(spent)}),
            "outputs": {
                name: {"file": os.path.relpath(path, home), "digest": digest_file(path)}
                for name, path in targets.items()
            },
        }
        draw_report(home / REPORT, described, stores, grid)
        write_json(home / SUMMARY, facts)
        for leftover in home.rglob(".vitup-*.part"):
            leftover.unlink(missing_ok=True)
        for path in targets.values():
            if path.is_file():
                shutil.rmtree(home / BLOCKS, ignore_errors=True)
    return Summary(dict(targets), tuple(faults), computed, 0, spent)


def read_answers(
    dim: int,
    head: str | os.PathLike[str] | tuple[Tensor, Tensor | None] | None,
    labels: bool,
    scores: bool,
    similar: str | os.PathLike[str] | Tensor | None,
    features: str | None,
) -> Answers:
    """Read and check what is asked, all but principal components."""
    weight = bias = None
    if head is not None and not (labels or scores):
        raise expected("--head", "labels or scores to be asked for", "neither", "Add --labels or --scores.")
    if head is None and (labels or scores):
        raise expected("--head", "a linear head for labels and scores", None)
    if head is not None:
        if isinstance(head, tuple):
            weight, bias = head_parameters(head, dim)
            weight, bias = (
                weight.detach().float().cpu(),
                None if bias is None else bias.detach().float().cpu(),
            )
        else:
            weight, bias = read_head(head, dim)
        if labels and weight.shape[0] > 65534:
            raise expected("--head", "at most 65534 classes", weight.shape[0])
    vectors = None
    if isinstance(similar, Tensor):
        vectors = unit_vectors("similar", similar.detach().cpu(), dim)
    elif similar is not None:
        vectors = read_vectors(similar, dim)
    if features not in (None, *FEATURES):
        raise expected("--features", " or ".join(FEATURES), features)
    return Answers(weight, bias, labels, scores, None, vectors, features)


def _check_overlap(overlap: float) -> float:
    """Check the share that windows overlap by."""
    if not 0 <= overlap <= 0.75:
        raise expected("--overlap", "a share from 0 to 0.75", overlap)
    return float(overlap)


def _check_stride(stride: float | str | Fraction) -> Fraction:
    """Read a stride exactly as it is written."""
    try:
        found = Fraction(str(stride))
    except (ValueError, ZeroDivisionError):
        raise expected("--stride", "a number of pixels, such as 16, 0.5 or 1/3", stride) from None
    if found <= 0:
        raise expected("--stride", "more than 0 pixels", stride)
    return found


def _name_outputs(
    home: Path, output: Path, products: Sequence[Any], format: str, grid: Grid, plane: Plane
) -> tuple[tuple[Store, ...], dict[str, Path]]:
    """Name the stores of blocks, and the files of the results."""
    suffix = format_of(output)
    main = [p for p in products if p.name != "scale"]
    if suffix is not None and len(main) > 1:
        names = ", ".join(p.name for p in main)
        raise expected("--output", "a folder for several results", f"{brief(output)} for {names}")
    if suffix is None and format not in FORMATS:
        raise expected("--format", " or ".join(FORMATS), format)
    kind = format if suffix is None else suffix
    pitch = tuple(float(grid.stride) * d for d in plane.downsample)
    reader = plane.reader
    mpp = None if plane.mpp is None else plane.mpp / plane.downsample[1]
    place = Placement(grid.cells, grid.block, grid.chunk, pitch, mpp, reader.georeference)
    if not kind.endswith("zarr"):
        if any(p.name == "features" for p in main):
            raise expected("--features", "a zarr to write them to", kind, "Choose .ome.zarr.")
        extra = "tifffile" if kind.startswith(".ome") else "rasterio"
        require(extra, "giga" if extra == "tifffile" else "geo", f"writing {kind}")
    require("zarr", "giga", "writing results by region")
    targets, stores = {}, []
    for product in products:
        owner = "features" if product.name == "scale" else product.name
        target = output if suffix is not None else output / f"{owner}{kind}"
        targets[owner] = target
        root = target if kind.endswith("zarr") else home / BLOCKS / f"{owner}.zarr"
        stores.append(Store(root, product, place, "scale" if product.name == "scale" else "0"))
    return tuple(stores), targets


def _check_home(output: Path, home: Path, targets: dict[str, Path], record: dict[str, Any]) -> None:
    """Refuse to touch what this library did not write."""
    if record:
        return
    for path in (*targets.values(), *([home] if home != output else [])):
        if path.exists():
            raise expected(
                "--output", "a new name", f"{brief(path, 500)}, which is something else", "Choose another."
            )
    if home.exists() and not home.is_dir():
        raise expected(
            "--output", "a folder, or a name that ends with " + ", ".join(FORMATS), brief(home, 500)
        )


def finished_before(home: Path, settings: dict[str, Any], record: dict[str, Any]) -> Summary | None:
    """Return what an earlier run with these settings finished, if all of its files are as it left them."""
    summary = read_record(home / SUMMARY)
    if not record or summary.get("settings") != settings:
        return None
    outputs = {}
    for name, entry in summary["outputs"].items():
        path = home / entry["file"]
        if not path.exists() or digest_file(path) != entry["digest"]:
            return None
        outputs[name] = Path(os.path.normpath(path))
    spent = summary.get("spent")
    if spent is not None:
        spent = AdaptiveReport(spent["cells"], tuple(spent["queries"]), tuple(spent["error"]))
    return Summary(outputs, tuple(summary["faults"]), 0, 0, spent)


def _share(grid: Grid, shard: tuple[int, int]) -> list[tuple[int, int]]:
    """Blocks of one of several shares, side by side as far as possible."""
    every = [(r, c) for r in range(grid.blocks[0]) for c in range(grid.blocks[1])]
    number, count = shard
    return every[len(every) * (number - 1) // count : len(every) * number // count]


def _estimate(
    job: Job,
    segments: Sequence[Segment],
    model: Upsampler,
    sharing: Sharing,
    targets: dict[str, Path],
    dim: int,
) -> Estimate:
    """Say what the missing blocks will take."""
    grid = job.grid
    windows = sum(job.count_foreground(s) for s in segments)
    each = seconds_per_window(job, model) if windows else 0.0
    cells = sum(
        (s.last - s.first) * grid.block * (grid.band(s.row)[1] - grid.band(s.row)[0]) for s in segments
    )
    cell_bytes = 0.0
    for store in job.stores:
        product = store.product
        whole = (product.channels or 1) * np.dtype(product.dtype).itemsize
        cell_bytes += whole if product.name in ("features", "scale") else whole * 4 / 3
    copies = 1 if all(format_of(t).endswith("zarr") for t in targets.values()) else 3
    adaptive = sum(job.answers.decoded(dim)) if job.tolerance else 0
    memory = sharing.workers * buffer_bytes(grid, job.answers.channels(dim), 4 * 3, adaptive)
    seconds = windows * each / sharing.workers
    return Estimate(windows, seconds, int(cells * cell_bytes * copies), memory, bool(adaptive))


def check_space(home: Path, estimate: Estimate) -> None:
    """Refuse a disk that the results may not fit on."""
    free = shutil.disk_usage(home).free
    if estimate.bytes > free:
        raise expected(
            "--output",
            f"{byte_size(estimate.bytes)} of free space",
            byte_size(free),
            "Choose another disk, or a larger --stride.",
        )


def _basis(home: Path, job: Job, plane: Plane, model: Upsampler, count: int, dim: int) -> Basis:
    """Return the run's principal components: those on disk, or those of a seeded sample of windows.

    Whoever writes the file first decides: other shares of the run read it.
    """
    path = home / BASIS
    if not path.exists():
        basis = fit_basis(_sample(job, plane, model), count)
        temporary = home / f".{os.getpid()}-{time.time_ns()}.part"
        save_basis(temporary, basis)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:
            os.replace(temporary, path)  # a disk without links
        temporary.unlink(missing_ok=True)
    return read_basis(path, dim)


def _sample(job: Job, plane: Plane, model: Upsampler) -> Tensor:  # [N, D]
    """Features at a coarse grid of cells in a seeded sample of windows with foreground."""
    grid, pixels = job.grid, Pixels(plane, job.source, model)
    side = math.isqrt(PALETTE_SAMPLES // BASIS_WINDOWS)
    order = np.random.default_rng(0).permutation(len(grid.rows) * len(grid.columns))
    axis = (torch.arange(side, dtype=torch.float32, device="cpu") + 0.5) / side
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    coords = torch.stack((grid_x, grid_y), dim=-1).reshape(1, -1, 2)
    places = ((np.arange(side) + 0.5) / side * grid.window).astype(np.int64)
    found: list[Tensor] = []
    for number in order.tolist():
        row, column = divmod(number, len(grid.columns))
        top, left = grid.rows[row].start, grid.columns[column].start
        height, width = min(grid.window, grid.height - top), min(grid.window, grid.width - left)
        known = np.zeros((side, side), bool)
        inside = np.ix_(places < height, places < width)
        known[inside] = True
        if job.mask is not None:
            y = ((top + places[places < height]) / grid.height * job.mask.shape[0]).astype(np.int64)
            x = ((left + places[places < width]) / grid.width * job.mask.shape[1]).astype(np.int64)
            known[inside] = job.mask[np.ix_(y, x)]
        if not known.any():
            continue
        region = plane.read(top, left, height, width)
        if region.valid is not None:
            known[inside] &= region.valid[np.ix_(places[places < height], places[places < width])]
        if not known.any():
            continue
        image = np.pad(
            pixels.filled(region), ((0, grid.window - height), (0, grid.window - width), (0, 0)), mode="edge"
        )
        with torch.no_grad():
            features = model(pixels.normalised([image]), coords)[0].float().cpu()
        found.append(features[torch.from_numpy(known.reshape(-1))])
        if len(found) == BASIS_WINDOWS:
            break
    if not found:
        raise expected("--pca", "an image with foreground", "none")
    return torch.cat(found)


class Work(Protocol):
    """A job that can be pickled, and is divided into tasks that can be done in any order."""

    source: Source

    def worker(self, model: Upsampler, tick: Callable[[int], object]) -> Any:
        """Make one worker, with ``run(tasks)`` and ``close()``, that reports windows done."""

    def count_windows(self, tasks: Sequence[Any]) -> int:
        """Windows of tasks."""

    @property
    def window_pixels(self) -> int:
        """Pixels of the image that a window stands for."""


def compute(job: Work, tasks: Sequence[Any], model: Upsampler, sharing: Sharing, progress: bool) -> None:
    """Do the tasks of a job, here or by other workers, and show progress on stderr if wanted."""
    with _Tick(job, tasks, progress) as tick:
        if sharing.dask is not None:
            _compute_by_dask(job, tasks, model, sharing.dask, tick)
        elif sharing.workers == 1:
            worker = job.worker(model, tick)
            try:
                worker.run(tasks)
            finally:
                worker.close()
        else:
            _compute_by_processes(job, tasks, model, sharing.workers, tick)


class _Tick:
    """Counts windows on a bar that also shows megapixels."""

    def __init__(self, job: Work, tasks: Sequence[Any], progress: bool) -> None:
        self.window_pixels, self.start, self.bar = job.window_pixels, time.monotonic(), None
        if progress:
            tqdm = require("tqdm", "demo", "showing progress").tqdm
            name, total = brief(job.source.path.name, 40), job.count_windows(tasks)
            self.bar = tqdm(total=total, unit="window", desc=name, file=sys.stderr)

    def __call__(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)
            seconds = max(1e-3, time.monotonic() - self.start)
            self.bar.set_postfix_str(
                f"{self.bar.n * self.window_pixels / 1e6 / seconds:.2f} MP/s", refresh=False
            )

    def __enter__(self) -> _Tick:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _packed(model: Upsampler) -> bytes:
    """Pickle a model for other processes, which may not share this one's GPU."""
    if model.device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    return pickle.dumps(model)


def _unpacked(packed: bytes, device: str) -> Upsampler:
    """Load a pickled model."""
    return pickle.loads(packed).to(device)


def _devices(model: Upsampler, workers: int) -> list[str]:
    """Device of each worker: GPUs in turn."""
    if model.device.type != "cuda":
        return [str(model.device)] * workers
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]


def _serve(job: Work, packed: bytes, device: str, threads: int, tasks: Any, results: Any) -> None:
    """What a worker process does: take tasks until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def tick(count: int) -> None:
        if not parent.is_alive():
            os._exit(1)
        results.put(("windows", count))

    try:
        worker = job.worker(_unpacked(packed, device), tick)
        while (task := tasks.get()) is not None:
            worker.run([task])
        results.put(("ended", None))
    except BaseException as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            got = brief(str(error).partition("\n")[0] or "less", 200)
            error = expected("--workers", "enough memory", got, "Choose fewer, or a smaller --batch.")
        kind = "input" if isinstance(error, InputError) else "other"
        results.put((kind, str(error) if kind == "input" else f"{type(error).__name__}: {error}"))


def _compute_by_processes(
    job: Work, tasks: Sequence[Any], model: Upsampler, count: int, tick: Callable[[int], object]
) -> None:
    """Share tasks among processes."""
    context = multiprocessing.get_context("spawn")
    waiting, results = context.Queue(), context.Queue()
    for task in [*tasks, *([None] * count)]:
        waiting.put(task)
    packed, threads = _packed(model), max(1, torch.get_num_threads() // count)
    processes = [
        context.Process(target=_serve, args=(job, packed, device, threads, waiting, results), daemon=True)
        for device in _devices(model, count)
    ]
    try:
        for process in processes:
            process.start()
        ended = 0
        while ended < count:
            try:
                kind, value = results.get(timeout=1)
            except queue.Empty:
                dead = [p for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise InputError(
                        f"--workers: a worker ended with code {dead[0].exitcode}, perhaps for want of memory; "
                        "blocks written so far are complete: the same command goes on."
                    ) from None
                continue
            if kind == "windows":
                tick(value)
            elif kind == "ended":
                ended += 1
            elif kind == "input":
                raise InputError(value)
            else:
                raise RuntimeError(f"a worker failed: {value}")
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


_dask_workers: dict[str, Any] = {}
_dask_lock = threading.Lock()


def _dask_task(job: Work, packed: bytes, device: str, key: str, task: Any) -> int:
    """Do a task in a Dask worker, which keeps model and input open; return its windows."""
    with _dask_lock:
        if key not in _dask_workers:
            _dask_workers.clear()
            device = "cuda" if device.startswith("cuda") and torch.cuda.is_available() else "cpu"
            _dask_workers[key] = job.worker(_unpacked(packed, device), lambda _: None)
        _dask_workers[key].run([task])
    return job.count_windows([task])


def _dask_client(address: str) -> Any:
    """Connect to a Dask scheduler."""
    distributed = require("distributed", "dask", "working with a Dask cluster")
    try:
        return distributed.Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise expected("--dask", "the address of a Dask scheduler", address) from error


def _compute_by_dask(
    job: Work, tasks: Sequence[Any], model: Upsampler, address: str, tick: Callable[[int], object]
) -> None:
    """Share tasks among the workers of a Dask cluster, which see the same folders."""
    distributed = require("distributed", "dask", "working with a Dask cluster")
    with _dask_client(address) as client:
        key = f"{job.source.path}-{time.time_ns()}"
        shared = client.scatter([job, _packed(model)], broadcast=True)
        futures = [
            client.submit(_dask_task, *shared, str(model.device), key, task, retries=2, pure=False)
            for task in tasks
        ]
        try:
            for future in distributed.as_completed(futures):
                tick(future.result())
        finally:
            client.cancel(futures)


def _finish_files(stores: Sequence[Store], targets: dict[str, Path], settings: dict[str, Any]) -> None:
    """Make pyramids, and the files that people open."""
    for store in stores:
        if store.product.name == "scale":
            continue
        target = targets[store.product.name]
        suffix = format_of(target)
        if not suffix.startswith((".tif",)):
            build_pyramid(store)
        if suffix.endswith("zarr"):
            write_multiscales(store, {"settings": settings})
            for leftover in store.root.rglob("*.partial"):
                leftover.unlink(missing_ok=True)
        elif suffix.startswith(".ome"):
            write_ome_tiff(target, store)
        else:
            write_cog(target, store)


def _duration(seconds: float) -> str:
    """Show a duration."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
