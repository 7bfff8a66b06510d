"""Arrays written by region: sharded zarr with OME-Zarr multiscales, and pyramidal OME-TIFF and COG made of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, brief, require
from ..images import write_atomically
from .answers import Product
from .read import Georeference

FORMATS = (".ome.zarr", ".zarr", ".ome.tif", ".ome.tiff", ".tif", ".tiff")
SMALLEST_LEVEL = 512  # cells; a pyramid ends with a level that is no larger
FEATURE_CHUNK = 32
PYRAMID_BYTES = 64 << 20
TILE = 256
TIFF_RGB_CHANNELS = 3


@dataclass(frozen=True)
class Placement:
    """Where the cells of an array lie.

    Attributes:
        cells: rows and columns.
        block: cells along a block's side.
        chunk: cells along a chunk's side.
        pitch: pixels of the input's level 0 per cell, (y, x).
        mpp: micrometres per pixel of level 0, or None.
        georeference: of level 0, or None.
    """

    cells: tuple[int, int]
    block: int
    chunk: int
    pitch: tuple[float, float]
    mpp: float | None
    georeference: Georeference | None


def format_of(path: Path) -> str | None:
    """The known suffix of a path, or None."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)


class Store:
    """The blocks of one product, each a shard of a zarr array of its own.

    Args:
        root: folder of the zarr group.
        product: what it holds.
        placement: where its cells lie.
        name: of the array within the group.
    """

    def __init__(self, root: Path, product: Product, placement: Placement, name: str = "0") -> None:
        self.root, self.product, self.placement, self.name = root, product, placement, name
        self._array: Any = None

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes before rows and columns."""
        return () if self.product.channels is None else (self.product.channels,)

    def block(self, level: int) -> int:
        """Cells along the side of a level's shards; those of coarser levels are small enough to be made at once."""
        place, block = self.placement, self.placement.block
        cell_bytes = math.prod(self.leading) * np.dtype(self.product.dtype).itemsize
        while level and block > place.chunk and block**2 * cell_bytes > PYRAMID_BYTES:
            block = max(1, block // place.chunk // 2) * place.chunk
        return block

    def array(self, level: int = 0) -> Any:
        """Open the array of a level, which is created if it does not exist.

        Raises:
            InputError: it cannot be written.
        """
        if level == 0 and self._array is not None:
            return self._array
        zarr = require("zarr", "giga", "writing a zarr")
        codecs = require("zarr.codecs", "giga", "writing a zarr")
        place, product = self.placement, self.product
        chunk = place.chunk
        if product.name in ("features", "scale"):
            chunk = FEATURE_CHUNK if place.block % FEATURE_CHUNK == 0 else chunk
        depth = self.leading if product.name == "features" else tuple(1 for _ in self.leading)
        block = self.block(level)
        path = self.root / (self.name if level == 0 else str(level))
        if not (path / "zarr.json").exists():
            try:
                zarr.create_array(
                    str(path),
                    shape=(*self.leading, *level_cells(place.cells, level)),
                    shards=(*self.leading, block, block),
                    chunks=(*depth, chunk, chunk),
                    dtype=product.dtype,
                    fill_value=product.nodata,
                    compressors=[codecs.BloscCodec(cname="zstd", clevel=3, shuffle="shuffle")],
                    dimension_names=(*(("c",) if self.leading else ()), "y", "x"),
                )
            except FileExistsError:
                pass  # another worker was faster
            except OSError as error:
                raise InputError(
                    f"{brief(path, 500)}: cannot be written ({error.strerror or error})."
                ) from error
        array = zarr.open_array(str(path), mode="r+")
        if level == 0:
            self._array = array
        return array

    def file(self, row: int, column: int) -> Path:
        """The file of a block."""
        return self.root.joinpath(self.name, "c", *("0" for _ in self.leading), str(row), str(column))

    def write(self, row: int, column: int, values: np.ndarray) -> None:
        """Write a block ``[h, w]`` or ``[C, h, w]`` as a file that is whole or absent."""
        array = self.array()
        # Of a shard that is not full, zarr would read what an earlier run may have left torn.
        self.file(row, column).unlink(missing_ok=True)
        block = self.placement.block
        height, width = values.shape[-2:]
        y, x = row * block, column * block
        array[..., y : y + height, x : x + width] = values


def level_cells(cells: tuple[int, int], level: int) -> tuple[int, int]:
    """Rows and columns of a pyramid's level."""
    return tuple(-(-n // 2**level) for n in cells)


def count_levels(product: Product, cells: tuple[int, int]) -> int:
    """Levels of a product's pyramid, the finest included; features have no other."""
    if product.name in ("features", "scale"):
        return 1
    return 1 + max(0, math.ceil(math.log2(max(cells) / SMALLEST_LEVEL)))


def build_pyramid(store: Store) -> None:
    """Write all coarser levels, each from the one before, block by block."""
    channels: list[Any] = [...] if not store.leading else list(range(store.leading[0]))
    for level in range(1, count_levels(store.product, store.placement.cells)):
        shutil.rmtree(store.root / str(level), ignore_errors=True)
        fine, coarse, block = store.array(level - 1), store.array(level), store.block(level)
        rows, columns = coarse.shape[-2:]
        for y in range(0, rows, block):
            for x in range(0, columns, block):
                bottom, right = min(rows, y + block), min(columns, x + block)
                values = np.empty((*store.leading, bottom - y, right - x), store.product.dtype)
                for channel in channels:
                    source = np.asarray(fine[channel, 2 * y : 2 * bottom, 2 * x : 2 * right])
                    values[channel] = halve(source, store.product)
                coarse[..., y:bottom, x:right] = values


def halve(values: np.ndarray, product: Product) -> np.ndarray:
    """Join four cells to one: the most frequent label, or the mean of those that are not nodata."""
    rows, columns = values.shape[-2:]
    padding = [(0, 0)] * (values.ndim - 2) + [(0, rows % 2), (0, columns % 2)]
    padded = np.pad(values, padding, mode="edge")
    four = np.stack([padded[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    if product.name == "labels":
        a, b, c, d = np.sort(four, axis=0)
        return np.where(a == b, a, np.where(b == c, b, np.where(c == d, c, a)))
    known = product.known(four)
    count = known.sum(axis=0)
    mean = np.where(known, four, 0).sum(axis=0, dtype=np.float64) / np.maximum(count, 1)
    if values.dtype.kind != "f":
        mean = np.rint(mean)
    return np.where(count > 0, mean, product.nodata).astype(values.dtype)


def write_multiscales(store: Store, attributes: dict[str, Any]) -> None:
    """Write the metadata that makes a group an OME-Zarr 0.5 image, which viewers open from then on.

    Args:
        store: the finest level; coarser ones lie beside it.
        attributes: the run's settings, kept beside the metadata of OME.
    """
    place = store.placement
    unit = {} if place.mpp is None else {"unit": "micrometer"}
    axes = [{"name": name, "type": "space", **unit} for name in "yx"]
    lead = [1.0 for _ in store.leading]
    if store.leading:
        axes.insert(0, {"name": "c", "type": "channel"})
    datasets = []
    for level in range(count_levels(store.product, place.cells)):
        pitch = [p * 2**level for p in place.pitch]
        # The centre of pixel 0 is the origin, so that cell 0 of a larger pitch lies to the right of it.
        scale = [p * (place.mpp or 1.0) for p in pitch]
        shift = [(p - 1) / 2 * (place.mpp or 1.0) for p in pitch]
        datasets.append(
            {
                "path": store.name if level == 0 else str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*lead, *scale]},
                    {"type": "translation", "translation": [*(0.0 for _ in lead), *shift]},
                ],
            }
        )
    ome = {
        "version": "0.5",
        "multiscales": [{"name": store.product.name, "axes": axes, "datasets": datasets}],
    }
    if place.georeference is not None:
        attributes = {**attributes, "crs": place.georeference.crs, "transform": cell_transform(place)}
    zarr = require("zarr", "giga", "writing a zarr")
    zarr.open_group(str(store.root), mode="a").attrs.update({"ome": ome, "vitup_fast": attributes})


def cell_transform(place: Placement) -> tuple[float, ...]:
    """The transform (a, b, c, d, e, f) from column and row of a cell's corner to the georeference."""
    a, b, c, d, e, f = place.georeference.transform
    y, x = place.pitch
    return (a * x, b * y, c, d * x, e * y, f)


def write_ome_tiff(path: Path, store: Store) -> None:
    """Write a pyramidal OME-TIFF of a store and its pyramid, tile by tile, with resolution tags.

    Raises:
        InputError: it cannot be written.
    """
    tifffile = require("tifffile", "giga", "writing a TIFF")
    product, place = store.product, store.placement
    colours = product.name == "pca" and product.channels == TIFF_RGB_CHANNELS
    axes = "YX" if not store.leading else "YXS" if colours else "CYX"
    metadata: dict[str, Any] = {"axes": axes, "Name": product.name}
    options: dict[str, Any] = {
        "tile": (TILE, TILE),
        "compression": "zlib",
        "photometric": "rgb" if colours else "minisblack",
        "dtype": product.dtype,
    }
    if place.mpp is not None:
        y, x = (p * place.mpp for p in place.pitch)
        metadata |= {"PhysicalSizeX": x, "PhysicalSizeXUnit": "µm"}
        metadata |= {"PhysicalSizeY": y, "PhysicalSizeYUnit": "µm"}
    levels = count_levels(product, place.cells)

    def write(temporary: Path) -> None:
        with tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as tiff:
            for level in range(levels):
                array = store.array(level)
                shape = array.shape if not colours else (*array.shape[1:], array.shape[0])
                if place.mpp is not None:
                    per_centimetre = (1e4 / (p * 2**level * place.mpp) for p in reversed(place.pitch))
                    options.update(resolution=tuple(per_centimetre), resolutionunit="CENTIMETER")
                first = {"subifds": levels - 1, "metadata": metadata}
                rest = {"subfiletype": 1, "metadata": None}
                extra = first if level == 0 else rest
                tiff.write(_tiles(array, colours, product.nodata), shape=shape, **options, **extra)

    write_atomically(path, write)


def _tiles(array: Any, colours: bool, nodata: float) -> Iterator[np.ndarray]:
    """Yield tiles in the order of a TIFF: planes, rows, columns; those at the edges are filled up."""
    rows, columns = array.shape[-2:]
    planes: list[Any] = [...] if array.ndim == 2 or colours else list(range(array.shape[0]))
    for plane in planes:
        for y in range(0, rows, TILE):
            for x in range(0, columns, TILE):
                tile = np.asarray(array[plane, y : y + TILE, x : x + TILE])
                missing = [(0, 0)] * (tile.ndim - 2) + [(0, TILE - n) for n in tile.shape[-2:]]
                tile = np.pad(tile, missing, constant_values=nodata)
                yield np.ascontiguousarray(tile.transpose(1, 2, 0)) if colours else tile


def write_cog(path: Path, store: Store) -> None:
    """Write a cloud-optimised GeoTIFF of a store, with its CRS, transform, nodata and overviews.

    Raises:
        InputError: it cannot be written.
    """
    rasterio = require("rasterio", "geo", "writing a cloud-optimised GeoTIFF")
    shutil_copy = require("rasterio.shutil", "geo", "writing a cloud-optimised GeoTIFF").copy
    product, place = store.product, store.placement
    array = store.array()
    rows, columns = place.cells
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "width": columns,
        "height": rows,
        "count": product.channels or 1,
        "dtype": product.dtype,
        "nodata": product.nodata,
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        "compress": "deflate",
        "bigtiff": "yes",
        "interleave": "band",
    }
    if place.georeference is not None:
        profile["transform"] = rasterio.Affine(*cell_transform(place))
        profile["crs"] = place.georeference.crs or None
    resampling = "MODE" if product.name == "labels" else "AVERAGE"

    def write(temporary: Path) -> None:
        plain = temporary.with_suffix(".plain")
        try:
            with rasterio.open(plain, "w", **profile) as target:
                for y in range(0, rows, place.chunk):
                    for x in range(0, columns, place.chunk):
                        values = np.asarray(array[..., y : y + place.chunk, x : x + place.chunk])
                        values = values.reshape(-1, *values.shape[-2:])
                        window = rasterio.windows.Window(x, y, values.shape[2], values.shape[1])
                        target.write(values, window=window)
            options = {"compress": "deflate", "overview_resampling": resampling, "bigtiff": "if_safer"}
            shutil_copy(plain, temporary, driver="COG", **options)
        except rasterio.errors.RasterioError as error:
            raise OSError(str(error)) from error
        finally:
            plain.unlink(missing_ok=True)

    write_atomically(path, write)
