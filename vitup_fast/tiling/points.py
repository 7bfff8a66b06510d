"""Answers at points of an image larger than memory: points are grouped so that each window is encoded once."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError, MissingPackageError, brief, expected, require
from ..files import digest_file, digest_tensors, read_record, write_json
from ..images import write_atomically
from ..upsampler import Upsampler
from .answers import Answers, Product, read_basis
from .read import Plane, Region
from .resume import (
    PARTS,
    RECORD,
    SUMMARY,
    Progress,
    alone,
    digest_input,
    make_folder,
)
from .run import Estimate, Options, Summary, check_space, compute, finished_before, read_answers
from .work import Pixels, Source, ahead, fill_window, give_back

SUFFIXES = (".parquet", ".csv", ".safetensors", ".h5ad")
PART_WINDOWS, PART_POINTS = 64, 65536
MOST_POINTS = 16384  # of one window at once
ROWS = 16384  # of a table at once


class Part(NamedTuple):
    """Windows that are computed one after the other, and kept in one file."""

    number: int
    first: int  # window
    last: int  # one after the last


@dataclass(frozen=True)
class PointJob:
    """All that workers share of a run; it is pickled.

    Attributes:
        source: the input.
        window: side of a window in pixels.
        points: (x, y) in pixels of the plane, window after window.  # [N, 2] float64
        origins: top and left of each window.  # [M, 2] int64
        edges: windows' ranges of points.  # [M + 1] int64
        answers: what is asked of every point.
        home: folder of the run's own files.
        batch: windows computed at once.
        strict: whether a broken tile ends the run.
    """

    source: Source
    window: int
    points: np.ndarray
    origins: np.ndarray
    edges: np.ndarray
    answers: Answers
    home: Path
    batch: int
    strict: bool

    def worker(self, model: Upsampler, tick: Callable[[int], object]) -> PointWorker:
        """Make a worker that reports windows done."""
        return PointWorker(self, model, tick)

    def count_windows(self, tasks: Sequence[Part]) -> int:
        """Windows of parts."""
        return sum(part.last - part.first for part in tasks)

    @property
    def window_pixels(self) -> int:
        """Pixels of the image that a window stands for."""
        return self.window**2

    @cached_property
    def parts(self) -> list[Part]:
        """All parts."""
        counts = np.diff(self.edges).tolist()
        parts, first, held = [], 0, 0
        for window, points in enumerate(counts):
            if window > first and (window - first == PART_WINDOWS or held + points > PART_POINTS):
                parts.append(Part(len(parts), first, window))
                first, held = window, 0
            held += points
        return [*parts, Part(len(parts), first, len(counts))]

    def file(self, part: Part) -> Path:
        """The file of a part's answers."""
        return self.home / "blocks" / f"{part.number:06d}.npy"


def part_name(part: Part) -> str:
    """Name of a part's sidecar."""
    return f"{part.number:06d}"


class PointWorker:
    """Computes parts of a job; see :class:`~vitup_fast.tiling.work.Worker`."""

    def __init__(self, job: PointJob, model: Upsampler, tick: Callable[[int], object]) -> None:
        self.job, self.model, self.tick = job, model, tick
        self.answers = job.answers.to(model.device)
        self.plane = job.source.open()
        self.pixels = Pixels(self.plane, job.source, model)
        self.progress = Progress(job.home)

    def close(self) -> None:
        """Close the input."""
        self.plane.reader.close()

    def run(self, parts: Sequence[Part]) -> None:
        """Compute parts.

        Raises:
            InputError: a broken tile if the job is strict; features that are not finite, or cannot be written.
        """
        batches = ahead(batch for part in parts for batch in self._batches(part))
        rows: np.ndarray | None = None
        faults: set[str] = set()
        width = sum(p.channels or 1 for p in self.answers.products(self.model.vit_up.config.dim))
        try:
            for part, windows, images, faulty, last in batches:
                if rows is None:
                    rows = np.empty(
                        (self.job.edges[part.last] - self.job.edges[part.first], width), np.float32
                    )
                if faulty and self.job.strict:
                    raise InputError(f"{faulty[0]}; --strict stops here.")
                faults.update(faulty)
                self._compute(part, windows, images, rows)
                self.tick(len(windows))
                if last:
                    self._write(part, rows, faults)
                    give_back()
                    rows, faults = None, set()
        finally:
            batches.close()

    def _batches(self, part: Part) -> Iterator[tuple[Part, list[int], list[np.ndarray], list[str], bool]]:
        """Read windows, those with about as many points together."""
        counts = np.diff(self.job.edges)[part.first : part.last]
        order = (part.first + np.argsort(counts, kind="stable")).tolist()
        for first in range(0, len(order), self.job.batch):
            windows, images, faults = order[first : first + self.job.batch], [], []
            for window in windows:
                top, left = self.job.origins[window].tolist()
                height, width = (min(self.job.window, n) for n in (self.plane.height, self.plane.width))
                region: Region = self.plane.read(top, left, height, width)
                faults += region.faults
                images.append(fill_window(self.pixels.filled(region), self.job.window))
            yield part, windows, images, faults, first + self.job.batch >= len(order)

    def _compute(self, part: Part, windows: list[int], images: list[np.ndarray], out: np.ndarray) -> None:
        """Compute the answers at the points of a batch of windows, in float32, which holds all of them exactly."""
        job = self.job
        ranges = [(int(job.edges[w]), int(job.edges[w + 1])) for w in windows]
        longest = max(b - a for a, b in ranges)
        coords = np.full((len(windows), longest, 2), 0.5, np.float32)
        for i, (window, (a, b)) in enumerate(zip(windows, ranges, strict=True)):
            coords[i, : b - a] = (job.points[a:b] - job.origins[window][::-1]) / job.window
        queries, start = torch.from_numpy(coords.clip(0, 1)), int(job.edges[part.first])
        with torch.no_grad():
            self.model.set_images(self.pixels.normalised(images))
            for first in range(0, longest, MOST_POINTS):
                piece = queries[:, first : first + MOST_POINTS]
                size = piece.shape[1], 1
                found = self.answers.of_windows(self.model, None, size, piece)  # [B, n, 1, channels]
                ones = torch.ones(found.shape[:2], dtype=torch.float32, device=found.device)
                products = self.answers.finish(found[:, :, 0], ones, np.ones(found.shape[:2], bool))
                columns = [v[None] if v.ndim == 2 else v for v in products.values()]  # [C, B, n]
                table = np.concatenate(columns, dtype=np.float32).transpose(1, 2, 0)
                for answers, (a, b) in zip(table, ranges, strict=True):
                    count = min(b - a - first, len(answers))
                    if count > 0:
                        out[a - start + first : a - start + first + count] = answers[:count]

    def _write(self, part: Part, rows: np.ndarray, faults: set[str]) -> None:
        """Write the answers of a part, and its sidecar last."""
        file = self.job.file(part)
        make_folder(file.parent)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as opened:
                np.lib.format.write_array(opened, rows)

        write_atomically(file, write)
        facts = {"computed": part.last - part.first, "faults": sorted(faults)}
        self.progress.finish(part_name(part), self.job.home, [file], facts)


def read_points(path: str | os.PathLike[str]) -> np.ndarray:  # [N, 2] float64
    """Read points in pixels of level 0: columns x and y of CSV or Parquet, or points and polygons of GeoJSON.

    A polygon, such as the outline of a cell, stands for its centroid.

    Raises:
        InputError: missing, broken, of another kind, or without points.
        MissingPackageError: Parquet without pyarrow.
    """
    path = Path(path)
    readers = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".geojson": _read_geojson,
        ".json": _read_geojson,
    }
    if path.suffix.lower() not in readers:
        raise expected("--points", "a file that ends with .csv, .parquet or .geojson", brief(path, 500))
    try:
        points = readers[path.suffix.lower()](path)
    except (InputError, MissingPackageError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{brief(path, 500)}: cannot be read as points ({brief(reason, 300)}).") from error
    if not len(points):
        raise expected("--points", "at least one point", f"none in {brief(path, 500)}")
    return points


def _column(names: Sequence[str], wanted: str, path: Path) -> int:
    """Find a column by its name, whatever its case."""
    found = [i for i, name in enumerate(names) if name.strip().lower() == wanted]
    if len(found) != 1:
        raise expected(brief(path, 500), f"one column named {wanted}", ", ".join(names))
    return found[0]


def _read_csv(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        x, y = (_column(names, axis, path) for axis in "xy")
        values = np.fromiter((float(row[i]) for row in rows if row for i in (x, y)), np.float64)
    return values.reshape(-1, 2)


def _read_parquet(path: Path) -> np.ndarray:
    parquet = require("pyarrow.parquet", "tables", "reading Parquet")
    names = parquet.read_schema(path).names
    chosen = [names[_column(names, axis, path)] for axis in "xy"]
    table = parquet.read_table(path, columns=chosen)
    columns = [table[name].to_numpy().astype(np.float64) for name in chosen]
    return np.stack(columns, axis=1)


def _read_geojson(path: Path) -> np.ndarray:
    content = json.loads(path.read_text("utf-8"))
    features = content.get("features", content) if isinstance(content, dict) else content
    return np.array([_centroid(f.get("geometry", f)) for f in features], np.float64).reshape(-1, 2)


def _centroid(geometry: dict[str, Any]) -> tuple[float, float]:
    """A point, or the centroid of a polygon's outline."""
    kind, coordinates = geometry["type"], geometry["coordinates"]
    if kind == "Point":
        return coordinates[0], coordinates[1]
    if kind != "Polygon":
        raise expected("--points", "geometries of type Point or Polygon", kind)
    ring = np.asarray(coordinates[0], np.float64)[:, :2]
    centre = ring[:-1].mean(axis=0)
    a, b = (ring[:-1] - centre), (ring[1:] - centre)
    cross = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
    if abs(cross.sum()) < 1e-12:
        return tuple(centre)
    return tuple(centre + ((a + b) * cross[:, None]).sum(axis=0) / (3 * cross.sum()))


def group(
    points: np.ndarray, size: tuple[int, int], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each point the window, of those at every half window, in whose middle it lies best.

    Args:
        points: (x, y) in pixels.  # [N, 2]
        size: rows and columns of the image.
        window: side of a window.

    Returns:
        Order of the points window by window ``[N]``, origins (top, left) of the windows ``[M, 2]``, and the windows'
        ranges in that order ``[M + 1]``. A point is a quarter of a window or more away from its window's border,
        unless the image's own border is nearer.
    """
    step = max(1, window // 2)
    origins = np.rint((points[:, ::-1] - window / 2) / step).astype(np.int64) * step
    origins = np.clip(origins, 0, np.maximum(0, np.array(size) - window))
    order = np.lexsort((origins[:, 1], origins[:, 0]))
    ordered = origins[order]
    starts = np.flatnonzero(np.r_[True, (np.diff(ordered, axis=0) != 0).any(axis=1)])
    return order, ordered[starts], np.r_[starts, len(points)]


def upsample_points(
    source: str | os.PathLike[str],
    points: str | os.PathLike[str] | np.ndarray,
    output: str | os.PathLike[str],
    model: Upsampler,
    *,
    head: str | os.PathLike[str] | tuple[torch.Tensor, torch.Tensor | None] | None = None,
    labels: bool = False,
    scores: bool = False,
    pca: str | os.PathLike[str] | None = None,
    similar: str | os.PathLike[str] | torch.Tensor | None = None,
    features: bool | None = None,
    **options: Any,
) -> Summary:
    """Compute answers at points of an image of any size, and write them as a table in the points' order.

    A run that was interrupted goes on where it was when it is called again with the same arguments.

    Args:
        source: the image; see :func:`open_reader`.
        points: a file, see :func:`read_points`; or (x, y) in pixels of level 0, where the pixel in column j and row i
            has its centre at (j + 0.5, i + 0.5).  # [N, 2]
        output: .parquet (x, y, labels, and lists of numbers), .csv (x, y, labels, scores_0, ..., f0, f1, ...),
            .safetensors (points ``[N, 2]`` float64, and a tensor for each answer), or .h5ad (AnnData: features as X,
            labels in obs, points as obsm["spatial"] beside the other answers).
        model: backbone and network.
        head: see :func:`upsample`, as the next four; but nothing is blended.
        labels: the index of the head's largest score.
        scores: the head's scores.
        pca: the file of an earlier run's principal components.
        similar: the cosine to these vectors.
        features: write features in float32; None means if nothing else is asked.
        options: those of :class:`Options`: how the image is read, and who does the work.

    Returns:
        What was done; its output is called "points".

    Raises:
        InputError: an argument, a file or a disk that does not fit; points that are NaN or outside of the image.
        MissingPackageError: an optional package is needed.
    """
    wanted = Options(**options)
    sharing, described = wanted.sharing(), wanted.source(source)
    source, output = described.path, Path(output).absolute()
    if output.suffix not in SUFFIXES:
        raise expected("--output", f"a name that ends with {', '.join(SUFFIXES)}", brief(output))
    if output.suffix == ".parquet":
        require("pyarrow.parquet", "tables", "writing Parquet")
    if output.suffix == ".h5ad":
        require("anndata", "anndata", "writing .h5ad")
    given = points if isinstance(points, np.ndarray) else read_points(points)
    given = np.ascontiguousarray(given, np.float64)
    if given.ndim != 2 or given.shape[1] != 2 or not len(given):
        raise expected("points", "an array of shape (N, 2)", given.shape)
    dim = model.vit_up.config.dim
    if features is None:
        features = not (labels or scores or similar is not None or pca is not None)
    answers = read_answers(dim, head, labels, scores, similar, None)
    if isinstance(pca, int):
        raise expected("--pca", "with points, the file pca.safetensors of an earlier run", pca)
    basis = None if pca is None else read_basis(pca, dim)
    answers = replace(answers, basis=basis, features="float32" if features else None)
    if not answers.products(dim):
        raise expected("what to write", "at least one of labels, scores, pca, similar and features", "none")
    plane = described.open()
    try:
        wanted.check(plane, model)
        _check_points(given, plane)
        settings = wanted.settings(model, plane)
        size = (plane.height, plane.width)
        scaled = given / np.array(plane.downsample[::-1])
    finally:
        plane.reader.close()
    window, batch = wanted.window_of(model), wanted.batch_of(model)
    order, origins, edges = group(scaled, size, window)
    home = output.with_name(output.name + ".vitup")
    job = PointJob(described, window, scaled[order], origins, edges, answers, home, batch, wanted.strict)
    record = read_record(home / RECORD)
    if not record:
        for path in (output, home):
            if path.exists():
                got = f"{brief(path, 500)}, which is something else"
                raise expected("--output", "a new name", got, "Choose another.")
    notes = digest_input(source, record)
    settings |= {
        "input": notes["input"],
        "points": digest_tensors([("points", torch.from_numpy(given))]),
        "products": [p.name for p in answers.products(dim)],
        "answers": digest_tensors(answers.named_tensors()),
    }
    state = Progress(home)
    done = finished_before(home, settings, record)
    if done is not None:
        return done
    if record:
        state.begin(settings, notes)
    every = job.parts
    number, count = sharing.shard
    mine = every[len(every) * (number - 1) // count : len(every) * number // count]
    missing = [p for p in mine if not record or state.finished(part_name(p), home) is None]
    windows = job.count_windows(missing)
    seconds = windows * _seconds_per_window(job, model) / sharing.workers if windows else 0.0
    memory = sharing.workers * job.batch * window**2 * 12 * 4 + given.nbytes * 3
    width = sum(p.channels or 1 for p in answers.products(dim))
    estimate = Estimate(windows, seconds, 3 * len(given) * width * 4, memory)
    wanted.announce(estimate)
    make_folder(home / PARTS)
    check_space(home, estimate)
    state.begin(settings, notes)
    started = time.monotonic()
    if missing:
        compute(job, missing, model, sharing, wanted.progress)
    sidecars = [read_record(home / PARTS / f"{part_name(p)}.json") for p in every]
    faults = sorted({fault for s in sidecars if s for fault in s["faults"]})
    left = sum(not s for s in sidecars)
    if left:
        return Summary({}, tuple(faults), windows, left)
    with alone(home):
        # Another share may have been faster.
        done = finished_before(home, settings, record or state.record())
        if done is not None:
            return done._replace(windows=windows)
        _write_table(output, job, given, order, answers.products(dim))
        facts = {
            "settings": settings,
            "seconds": round(time.monotonic() - started, 1),
            "windows": len(origins),
            "points": len(given),
            "faults": faults,
            "outputs": {"points": {"file": os.path.relpath(output, home), "digest": digest_file(output)}},
        }
        write_json(home / SUMMARY, facts)
        for part in every:
            job.file(part).unlink(missing_ok=True)
    return Summary({"points": output}, tuple(faults), windows, 0)


def _check_points(points: np.ndarray, plane: Plane) -> None:
    """Refuse points that are not on the image."""
    full = plane.reader.levels[0]
    inside = (points >= 0) & (points <= np.array([full.width, full.height]))
    bad = np.flatnonzero(~inside.all(axis=1))  # comparisons with NaN are false
    if len(bad):
        x, y = points[bad[0]]
        raise expected(
            "--points",
            f"x from 0 to {full.width} and y from 0 to {full.height}, in pixels of level 0",
            f"{len(bad)} others, the first in row {bad[0] + 1}: ({x:g}, {y:g})",
        )


def _seconds_per_window(job: PointJob, model: Upsampler) -> float:
    """Measure how long a window with the usual number of points takes in a batch."""
    usual = min(MOST_POINTS, math.ceil(len(job.points) / len(job.origins)))
    images = torch.zeros(job.batch, 3, job.window, job.window, dtype=torch.float32, device=model.device)
    coords = torch.full((job.batch, usual, 2), 0.5, dtype=torch.float32, device=model.device)
    answers, seconds = job.answers.to(model.device), math.inf
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            answers.of_windows(model, images, (usual, 1), coords).sum().item()
            seconds = min(seconds, time.perf_counter() - start)
    return seconds / job.batch


class Table:
    """Answers in the points' order, on disk.

    Args:
        points: (x, y) in pixels of level 0.  # [N, 2] float64
        rows: all answers side by side.  # [N, channels] float32
        products: which columns are what, in this order.
    """

    def __init__(self, points: np.ndarray, rows: np.ndarray, products: Sequence[Product]) -> None:
        self.points, self.rows, self.products = points, rows, products

    def __len__(self) -> int:
        return len(self.points)

    def pieces(self) -> Iterator[slice]:
        """Ranges of rows that memory holds."""
        return (slice(first, first + ROWS) for first in range(0, len(self), ROWS))

    def values(self, product: Product, rows: slice) -> np.ndarray:  # [n] or [n, C]
        """Answers of some rows in their own dtype."""
        first = sum(p.channels or 1 for p in self.products[: self.products.index(product)])
        own = self.rows[rows, first : first + (product.channels or 1)]
        return np.ascontiguousarray(own if product.channels else own[:, 0]).astype(product.dtype, copy=False)


def _write_table(
    output: Path, job: PointJob, points: np.ndarray, order: np.ndarray, products: Sequence[Product]
) -> None:
    """Bring answers into the points' order, on disk, and write the table piece by piece."""
    scratch = job.home / "ordered.part"
    width = sum(p.channels or 1 for p in products)
    rows = np.memmap(scratch, np.float32, "w+", shape=(len(points), width))
    try:
        for part in job.parts:
            a, b = job.edges[part.first], job.edges[part.last]
            rows[order[a:b]] = np.load(job.file(part), mmap_mode="r")
        table = Table(points, rows, products)
        writers = {
            ".parquet": _write_parquet,
            ".csv": _write_csv,
            ".safetensors": _write_safetensors,
            ".h5ad": _write_h5ad,
        }
        write_atomically(output, lambda temporary: writers[output.suffix](temporary, table))
    finally:
        scratch.unlink(missing_ok=True)


def _write_parquet(path: Path, table: Table) -> None:
    pyarrow = require("pyarrow", "tables", "writing Parquet")
    parquet = require("pyarrow.parquet", "tables", "writing Parquet")
    fields = [("x", pyarrow.float64()), ("y", pyarrow.float64())]
    for p in table.products:
        number = pyarrow.from_numpy_dtype(p.dtype)
        fields.append((p.name, pyarrow.list_(number, p.channels) if p.channels else number))
    schema = pyarrow.schema(fields)
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in table.pieces():
            columns = [pyarrow.array(np.ascontiguousarray(table.points[rows, i])) for i in (0, 1)]
            for p in table.products:
                values = pyarrow.array(table.values(p, rows).reshape(-1))
                lists = pyarrow.FixedSizeListArray.from_arrays
                columns.append(lists(values, p.channels) if p.channels else values)
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def _write_csv(path: Path, table: Table) -> None:
    names = ["x", "y"]
    for p in table.products:
        prefix = "f" if p.name == "features" else f"{p.name}_"
        names += [f"{prefix}{i}" for i in range(p.channels)] if p.channels else [p.name]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for rows in table.pieces():
            columns = [table.values(p, rows) for p in table.products]
            for i, point in enumerate(table.points[rows].tolist()):
                writer.writerow([*point, *(str(v) for column in columns for v in np.atleast_1d(column[i]))])


_SAFETENSORS_DTYPES = {"float32": "F32", "uint8": "U8", "uint16": "U16"}


def _write_safetensors(path: Path, table: Table) -> None:
    """Write the format by hand: its library holds all tensors in memory."""
    header, end = {}, table.points.nbytes
    header["points"] = {"dtype": "F64", "shape": list(table.points.shape), "data_offsets": [0, end]}
    for p in table.products:
        shape = [len(table), p.channels] if p.channels else [len(table)]
        start, end = end, end + math.prod(shape) * np.dtype(p.dtype).itemsize
        kind = _SAFETENSORS_DTYPES[p.dtype]
        header[p.name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(table.points.tobytes())
        for p in table.products:
            for rows in table.pieces():
                file.write(table.values(p, rows).tobytes())


def _write_h5ad(path: Path, table: Table) -> None:
    """Write AnnData; features are written from disk, the other answers are small."""
    anndata = require("anndata", "anndata", "writing .h5ad")
    pandas = require("pandas", "anndata", "writing .h5ad")
    every = slice(0, len(table))
    small = {p.name: table.values(p, every) for p in table.products if p.name != "features"}
    features = [p for p in table.products if p.name == "features"]
    obs = pandas.DataFrame(index=[str(i) for i in range(len(table))])
    if "labels" in small:
        obs["labels"] = pandas.Categorical(small.pop("labels").tolist())
    spatial = {"spatial": table.points, **small}
    # Features are the last of all answers.
    x = np.asarray(table.rows)[:, -features[0].channels :] if features else None
    # What pandas 3 takes text for is written if asked for only; before, there was nothing to ask.
    known = hasattr(anndata.settings, "allow_write_nullable_strings")
    with anndata.settings.override(allow_write_nullable_strings=True) if known else nullcontext():
        anndata.AnnData(X=x, obs=obs, obsm=spatial).write_h5ad(path)
