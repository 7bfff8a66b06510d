"""Pixels of images larger than memory, by region: a reader for each kind of file, and a plane of one level."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError, MissingPackageError, brief, expected, require
from ..images import open_image

SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi")
RASTERS = (".vrt", ".jp2", ".img", ".ntf")
TIFFS = (".tif", ".tiff", ".btf", ".tf8", ".tf2", ".qptiff")
THUMBNAIL = 2048  # longest side of masks and overviews
TISSUE_BLUR = 1 / 128  # of the longest side of a mask
AREA_BYTES = 32 << 20  # of pixels in float64 that are averaged at once
_GEO_KEYS, _NODATA = 34735, 42113  # tags of TIFF
_MICROMETRES = {"micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6, "nanometer": 1e-3}
_OME_UNITS = {"µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "nm": 1e-3}


class Region(NamedTuple):
    """Pixels of a rectangle."""

    pixels: np.ndarray  # [h, w, C]
    valid: np.ndarray | None  # [h, w] bool: neither nodata, nor transparent, nor broken; None means all
    faults: tuple[str, ...] = ()  # tiles that could not be decoded, and why


class Level(NamedTuple):
    """One resolution of an image."""

    height: int
    width: int
    tile: tuple[int, int]  # rows and columns that are decoded at once


class Georeference(NamedTuple):
    """Where pixels lie on the earth."""

    crs: str  # well-known text
    transform: tuple[float, ...]  # a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f


class Reader:
    """One open image file; every worker opens its own.

    Attributes:
        path: the file, or a zarr's folder.
        bands: numbers of the channels that are read, from 1; None means all but alpha.
        dtype: of the pixels.
        channels: number of channels that are read.
        levels: the resolutions, the finest first.
        mpp: micrometres per pixel of level 0, or None.
        georeference: of level 0, or None.
        unit_range: pixels are floats from 0 to 1, so that no scale has to be given.
    """

    needs: ClassVar[tuple[str, str]] = ("", "")  # module and extra
    dtype: np.dtype
    channels: int
    levels: tuple[Level, ...]
    mpp: float | None = None
    georeference: Georeference | None = None
    unit_range = False

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        self.path, self.bands = path, bands

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        """Read a rectangle that lies inside a level; any exception means that a tile of it is broken."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        """Read a rectangle of a level, in its pixels; what cannot be decoded is invalid, zero, and named."""
        try:
            return self._read(level, top, left, height, width)
        except (MemoryError, MissingPackageError):
            raise
        except Exception:
            return self._read_tiles(level, top, left, height, width)

    def _read_tiles(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        """Read tile by tile and leave out the broken ones."""
        pixels = np.zeros((height, width, self.channels), self.dtype)
        valid = np.ones((height, width), bool)
        faults = []
        rows, columns = self.levels[level].tile
        for tile_top in range(top // rows * rows, top + height, rows):
            for tile_left in range(left // columns * columns, left + width, columns):
                y0, y1 = max(top, tile_top), min(top + height, tile_top + rows)
                x0, x1 = max(left, tile_left), min(left + width, tile_left + columns)
                inside = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
                try:
                    part = self._read(level, y0, x0, y1 - y0, x1 - x0)
                except (MemoryError, MissingPackageError):
                    raise
                except Exception as error:
                    valid[inside] = False
                    reason = brief(str(error) or type(error).__name__, 120)
                    where = f"level {level}, tile at row {tile_top}, column {tile_left}"
                    faults.append(f"{brief(self.path.name)}: {where} ({reason})")
                    continue
                pixels[inside] = part.pixels
                if part.valid is not None:
                    valid[inside] = part.valid
        return Region(pixels, valid, tuple(faults))

    def _choose(self, count: int, colours: int) -> list[int]:
        """Indices of the channels to read, of ``count`` with ``colours`` that are not alpha.

        Raises:
            InputError: bands that are not there, or too many channels to be colours.
        """
        if self.bands is None:
            if colours not in (1, 3):
                raise expected(
                    brief(self.path, 500), "one or three channels", colours, "Choose some with --bands."
                )
            return list(range(colours))
        if not all(1 <= band <= count for band in self.bands):
            got = " ".join(map(str, self.bands))
            raise expected("--bands", f"numbers from 1 to {count}, the image's channels", got)
        return [band - 1 for band in self.bands]


class TiffReader(Reader):
    """TIFF, BigTIFF, OME-TIFF and their pyramids, by tifffile."""

    needs = ("tifffile", "giga")

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        super().__init__(path, bands)
        tifffile = require("tifffile", "giga", "reading a TIFF")
        self._file = tifffile.TiffFile(path)
        series = self._file.series[0]
        self._axes = "".join(a for a, n in zip(series.axes, series.shape, strict=True) if n > 1 or a in "YX")
        if self._axes not in ("YX", "YXS", "CYX", "SYX"):
            shape = f"axes {series.axes} of {' x '.join(map(str, series.shape))}"
            raise expected(brief(path, 500), "one picture with axes YX, YXS or CYX", shape)
        page = series.keyframe
        if page.photometric == 3:
            raise expected(
                brief(path, 500), "grey, colours or bands", "palette colours", "Convert it to RGB."
            )
        self._check_compression(tifffile, page)
        self._inverted = page.photometric == 0
        self.dtype = np.dtype(series.dtype)
        samples = page.samplesperpixel
        count = samples if self._axes != "CYX" else series.shape[series.axes.index("C")]
        alpha = [s for s in page.extrasamples if int(s) in (1, 2)] if self._axes != "CYX" else []
        self._alpha = count - 1 if alpha else None
        self._chosen = self._choose(count, count - len(alpha))
        self.channels = len(self._chosen)
        self._levels = series.levels
        self.levels = tuple(
            Level(level.keyframe.imagelength, level.keyframe.imagewidth, self._tile(level.keyframe))
            for level in series.levels
        )
        tag = page.tags.get(_NODATA)
        self._nodata = float(page.nodata) if tag is not None else None
        self.mpp = _ome_mpp(self._file.ome_metadata) or _tag_mpp(page)

    def _check_compression(self, tifffile: Any, page: Any) -> None:
        """Refuse what cannot be decoded at all, before anything runs."""
        try:
            if page.compression != 1:
                tifffile.TIFF.DECOMPRESSORS[page.compression]
            if page.predictor != 1:
                tifffile.TIFF.UNPREDICTORS[page.predictor]
        except (KeyError, ValueError, NotImplementedError, ImportError) as error:
            raise expected(
                brief(self.path, 500),
                "a TIFF compression that tifffile knows",
                f"{getattr(page.compression, 'name', page.compression)}",
                "pip install 'vitup-fast[giga]' brings imagecodecs, which knows most.",
            ) from error

    @staticmethod
    def _tile(page: Any) -> tuple[int, int]:
        """Rows and columns of a tile or strip."""
        if page.is_tiled:
            return page.tilelength, page.tilewidth
        return min(page.rowsperstrip, page.imagelength), page.imagewidth

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        pages = self._levels[level].pages
        chosen = [*self._chosen, *([self._alpha] if self._alpha is not None else [])]
        if self._axes == "CYX":
            planes = [self._read_page(pages[c], [0], top, left, height, width) for c in chosen]
            pixels = np.concatenate(planes, axis=2)
        else:
            pixels = self._read_page(pages[0], chosen, top, left, height, width)
        alpha = None
        if self._alpha is not None:
            pixels, alpha = pixels[:, :, :-1], pixels[:, :, -1] > 0
        valid = _differs(pixels, self._nodata)
        if alpha is not None:
            valid = alpha if valid is None else alpha & valid
        if self._inverted and self.dtype.kind == "u":
            pixels = np.iinfo(self.dtype).max - pixels
        return Region(np.ascontiguousarray(pixels), valid)

    def _read_page(
        self, page: Any, chosen: list[int], top: int, left: int, height: int, width: int
    ) -> np.ndarray:  # [h, w, len(chosen)]
        """Decode the segments of a page that a rectangle touches."""
        key = page.keyframe
        rows, columns = self._tile(key)
        across = -(-key.imagewidth // columns)
        down = -(-key.imagelength // rows)
        separate = key.planarconfig == 2 and key.samplesperpixel > 1
        out = np.empty((height, width, len(chosen)), self.dtype)
        for plane in chosen if separate else [0]:
            target = [chosen.index(plane)] if separate else slice(None)
            source = [0] if separate else chosen
            for row in range(top // rows, (top + height - 1) // rows + 1):
                for column in range(left // columns, (left + width - 1) // columns + 1):
                    index = (plane * down + row) * across + column
                    y0, x0 = row * rows, column * columns
                    tile = self._segment(page, key, index)
                    ya, yb = max(top, y0), min(top + height, y0 + rows)
                    xa, xb = max(left, x0), min(left + width, x0 + columns)
                    inside = slice(ya - top, yb - top), slice(xa - left, xb - left)
                    if tile is None:
                        out[inside] = 0 if self._nodata is None else self._nodata
                        continue
                    out[(*inside, target)] = tile[ya - y0 : yb - y0, xa - x0 : xb - x0, source]
        return out

    def _segment(self, page: Any, key: Any, index: int) -> np.ndarray | None:  # [rows, columns, samples]
        """Decode one tile or strip; None where the file leaves it out."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None
        file = self._file.filehandle
        file.seek(offset)
        data = file.read(count)
        if len(data) < count:
            raise ValueError(f"the file ends after {len(data)} of its {count} bytes")
        tile, _, shape = key.decode(data, index, jpegtables=page.jpegtables, _fullsize=False)
        if tile is None:
            return None
        return tile.reshape(shape[-3:]) if tile.ndim != 4 else tile[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SlideReader(Reader):
    """Slides of the vendors, by OpenSlide; transparent where nothing was scanned."""

    needs = ("openslide", "slides")
    dtype = np.dtype(np.uint8)
    channels = 3

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        super().__init__(path, bands)
        self._openslide = require("openslide", "slides", "reading a slide")
        self._slide = self._openslide.OpenSlide(path)
        self._chosen = self._choose(3, 3)
        self.channels = len(self._chosen)
        self.levels = tuple(Level(h, w, (512, 512)) for w, h in self._slide.level_dimensions)
        values = [self._slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        self.mpp = _one_mpp([float(value) for value in values if value], path)
        colour = self._slide.properties.get("openslide.background-color", "FFFFFF")
        self._background = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], np.float32)

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        full, own = self.levels[0], self.levels[level]
        location = round(left * full.width / own.width), round(top * full.height / own.height)
        try:
            rgba = np.asarray(self._slide.read_region(location, level, (width, height)))  # [h, w, 4]
        except Exception:
            # OpenSlide answers nothing more after an error.
            self._slide.close()
            self._slide = self._openslide.OpenSlide(self.path)
            raise
        pixels, alpha = rgba[:, :, :3], rgba[:, :, 3]
        if alpha.min() < 255:
            share = alpha[:, :, None].astype(np.float32) / 255
            pixels = np.rint(pixels * share + self._background * (1 - share)).astype(np.uint8)
        return Region(np.ascontiguousarray(pixels[:, :, self._chosen]), alpha > 0)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


class RasterReader(Reader):
    """GeoTIFF, COG and whatever else GDAL reads, by rasterio."""

    needs = ("rasterio", "geo")

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        super().__init__(path, bands)
        self._rasterio = require("rasterio", "geo", "reading a georeferenced image")
        first = self._rasterio.open(path)
        alpha = [c for c in first.colorinterp if c == self._rasterio.enums.ColorInterp.alpha]
        self._indexes = [i + 1 for i in self._choose(first.count, first.count - len(alpha))]
        self.channels = len(self._indexes)
        self.dtype = np.dtype(first.dtypes[self._indexes[0] - 1])
        factors = first.overviews(self._indexes[0])
        self._levels = [first, *(self._rasterio.open(path, overview_level=i) for i in range(len(factors)))]
        self.levels = tuple(
            Level(level.height, level.width, tuple(level.block_shapes[0])) for level in self._levels
        )
        all_valid = self._rasterio.enums.MaskFlags.all_valid
        self._masked = any(all_valid not in first.mask_flag_enums[i - 1] for i in self._indexes)
        if first.crs is not None or not first.transform.is_identity:
            crs = first.crs.to_wkt() if first.crs is not None else ""
            self.georeference = Georeference(crs, tuple(first.transform)[:6])

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        window = self._rasterio.windows.Window(left, top, width, height)
        dataset = self._levels[level]
        pixels = dataset.read(self._indexes, window=window).transpose(1, 2, 0)
        valid = None
        if self._masked:
            valid = (dataset.read_masks(self._indexes, window=window) > 0).all(axis=0)
        return Region(np.ascontiguousarray(pixels), valid)

    def close(self) -> None:
        """Close the file."""
        for level in self._levels:
            level.close()


class ZarrReader(Reader):
    """A zarr array ``[Y, X]``, ``[Y, X, C]`` or ``[C, Y, X]``, or an OME-Zarr image of such arrays."""

    needs = ("zarr", "giga")

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        super().__init__(path, bands)
        node = require("zarr", "giga", "reading a zarr").open(path, mode="r")
        axes: str | None = None
        if hasattr(node, "shape"):
            arrays = [node]
        else:
            attributes = node.attrs.asdict()
            scales = attributes.get("ome", attributes).get("multiscales")
            if not scales:
                got = "a group without multiscales"
                raise expected(brief(path, 500), "a zarr array, or an OME-Zarr image", got)
            arrays = [node[item["path"]] for item in scales[0]["datasets"]]
            names = [axis["name"] if isinstance(axis, dict) else axis for axis in scales[0].get("axes", ())]
            axes = "".join(names).upper() or None
            self.mpp = _zarr_mpp(scales[0], path)
        shape = arrays[0].shape
        if axes is None:
            last = len(shape) == 3 and shape[2] < min(shape[:2])
            axes = {2: "YX", 3: "YXC" if last else "CYX"}.get(len(shape), "?" * len(shape))
        kept = [i for i, (a, n) in enumerate(zip(axes, shape, strict=True)) if a in "YXC" or n > 1]
        self._order = "".join(axes[i] for i in kept)
        if self._order not in ("YX", "YXC", "CYX"):
            got = f"axes {axes} of {' x '.join(map(str, shape))}"
            raise expected(brief(path, 500), "one picture with axes YX, YXC or CYX", got)
        self._axes, self._arrays = axes, arrays
        count = shape[axes.index("C")] if "C" in self._order else 1
        self._chosen = self._choose(count, count)
        self.channels = len(self._chosen)
        self.dtype = arrays[0].dtype
        y, x = axes.index("Y"), axes.index("X")
        self.levels = tuple(Level(a.shape[y], a.shape[x], (a.chunks[y], a.chunks[x])) for a in arrays)

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        whole = {"Y": slice(top, top + height), "X": slice(left, left + width), "C": slice(None)}
        pixels = np.asarray(self._arrays[level][tuple(whole.get(axis, 0) for axis in self._axes)])
        if self._order == "CYX":
            pixels = pixels.transpose(1, 2, 0)
        pixels = pixels.reshape(height, width, -1)[:, :, self._chosen]
        return Region(np.ascontiguousarray(pixels), None)


class ArrayReader(Reader):
    """A NumPy file ``[H, W]`` or ``[H, W, C]``, mapped into memory."""

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        super().__init__(path, bands)
        array = self._mapped = np.load(path, mmap_mode="r")
        if array.ndim not in (2, 3):
            raise expected(brief(path, 500), "an array of shape (H, W) or (H, W, C)", array.shape)
        self._array = array.reshape(*array.shape[:2], -1)
        self._chosen = self._choose(self._array.shape[2], self._array.shape[2])
        self.channels, self.dtype = len(self._chosen), array.dtype
        self.levels = (Level(*array.shape[:2], (1024, 1024)),)

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        pixels = self._array[top : top + height, left : left + width, self._chosen]
        if hasattr(mmap, "MADV_DONTNEED"):
            # Or all of the file would count as memory in the end.
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED)
        return Region(pixels, None)


class PictureReader(Reader):
    """A picture that Pillow reads and memory holds: upright, colours in 8 bits or grey from 0 to 1."""

    def __init__(self, path: Path, bands: tuple[int, ...] | None) -> None:
        super().__init__(path, bands)
        pixels = np.asarray(open_image(path))
        self._pixels = pixels.reshape(*pixels.shape[:2], -1)
        self._chosen = self._choose(self._pixels.shape[2], self._pixels.shape[2])
        self.channels, self.dtype = len(self._chosen), pixels.dtype
        self.unit_range = pixels.dtype == np.float32
        self.levels = (Level(*pixels.shape[:2], (1024, 1024)),)
        self._alpha = self._transparency(path)

    @staticmethod
    def _transparency(path: Path) -> np.ndarray | None:  # [H, W] bool
        """Where a picture with an alpha channel is not fully transparent."""
        with require("PIL.Image", "demo", "reading an image").open(path) as image:
            if image.mode not in ("RGBA", "LA"):
                return None
            upright = require("PIL.ImageOps", "demo", "reading an image").exif_transpose(image)
            return np.asarray(upright.getchannel("A")) > 0

    def _read(self, level: int, top: int, left: int, height: int, width: int) -> Region:
        inside = slice(top, top + height), slice(left, left + width)
        pixels = np.ascontiguousarray(self._pixels[inside][:, :, self._chosen])
        return Region(pixels, None if self._alpha is None else self._alpha[inside])


def open_reader(path: str | os.PathLike[str], bands: Sequence[int] | None = None) -> Reader:
    """Open an image by the reader that fits its kind.

    Args:
        path: TIFF, slide, GeoTIFF or other raster of GDAL, zarr folder, NumPy file, or picture.
        bands: one or three channels to read, from 1; None means all where there are one or three.

    Raises:
        InputError: missing, broken, of a kind or shape that cannot be read.
        MissingPackageError: an optional package is needed.
    """
    path = Path(path)
    chosen = None if bands is None else tuple(bands)
    if chosen is not None and len(chosen) not in (1, 3):
        raise expected("--bands", "one or three channels", len(chosen))
    try:
        if not path.exists():
            raise InputError(f"{brief(path, 500)}: cannot be read as an image (no such file).")
        reader = _reader_class(path)(path, chosen)
    except (InputError, MissingPackageError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{brief(path, 500)}: cannot be read as an image ({brief(reason, 300)}).") from error
    level = reader.levels[0]
    if not level.height or not level.width:
        raise expected(brief(path, 500), "at least one pixel", f"{level.width} x {level.height}")
    if reader.dtype.kind not in "uif":
        raise expected(brief(path, 500), "integers or floats as pixels", reader.dtype)
    return reader


def _reader_class(path: Path) -> type[Reader]:
    """Choose the reader of a file by its kind."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return ZarrReader
    if suffix == ".npy":
        return ArrayReader
    if suffix in SLIDES:
        return SlideReader
    if suffix in RASTERS:
        return RasterReader
    if suffix not in TIFFS:
        return PictureReader
    try:
        vendor = require("openslide", "slides", "reading a slide").OpenSlide.detect_format(str(path))
    except MissingPackageError:
        vendor = None
    if vendor not in (None, "generic-tiff"):
        return SlideReader
    tifffile = require("tifffile", "giga", "reading a TIFF")
    with tifffile.TiffFile(path) as file:
        return RasterReader if file.pages[0].tags.get(_GEO_KEYS) is not None else TiffReader


def _differs(pixels: np.ndarray, nodata: float | None) -> np.ndarray | None:  # [h, w]
    """Where pixels are not nodata in every channel."""
    if nodata is None:
        return None
    return ~(np.isnan(pixels) if np.isnan(nodata) else pixels == nodata).all(axis=2)


def _one_mpp(values: Sequence[float], path: Path) -> float | None:
    """One resolution for both axes; None where there is none, or none that means anything."""
    if not values or not all(np.isfinite(values)) or min(values) <= 0:
        return None
    if max(values) > 1.01 * min(values):
        got = " and ".join(f"{v:g}" for v in values)
        raise expected(brief(path, 500), "square pixels", f"{got} micrometres")
    return float(np.mean(values))


def _ome_mpp(xml: str | None) -> float | None:
    """Micrometres per pixel from OME-XML."""
    if not xml:
        return None
    from xml.etree import ElementTree

    for element in ElementTree.fromstring(xml).iter():
        if element.tag.endswith("}Pixels") and "PhysicalSizeX" in element.attrib:
            unit = element.attrib.get("PhysicalSizeXUnit", "µm")
            return float(element.attrib["PhysicalSizeX"]) * _OME_UNITS[unit] if unit in _OME_UNITS else None
    return None


def _tag_mpp(page: Any) -> float | None:
    """Micrometres per pixel from a TIFF's resolution tags."""
    micrometres = {2: 25400.0, 3: 10000.0}.get(int(getattr(page, "resolutionunit", 1)))
    x = page.resolution[0] if micrometres else 0
    return micrometres / x if x > 0 else None


def _zarr_mpp(scales: dict[str, Any], path: Path) -> float | None:
    """Micrometres per pixel of an OME-Zarr image."""
    axes = scales.get("axes", ())
    transforms = scales["datasets"][0].get("coordinateTransformations", ())
    scale = next((t["scale"] for t in transforms if t.get("type") == "scale"), None)
    if scale is None:
        return None
    values = [
        factor * _MICROMETRES[axis["unit"]]
        for axis, factor in zip(axes, scale, strict=True)
        if isinstance(axis, dict) and axis["name"] in ("x", "y") and axis.get("unit") in _MICROMETRES
    ]
    return _one_mpp(values, path)


def _average(values: np.ndarray, start: int, first: int, count: int, ratio: float) -> np.ndarray:
    """Average along the first axis: output i covers [i ratio, (i + 1) ratio) of the input; values begin at start."""
    length = values.shape[0]
    edges = np.clip((first + np.arange(count + 1)) * ratio - start, 0, length)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    sums = np.zeros((length + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, dtype=np.float64, out=sums[1:])
    shape = (-1,) + (1,) * (values.ndim - 1)
    integral = sums[whole] + (edges - whole).reshape(shape) * values[whole]
    return np.diff(integral, axis=0) / np.diff(edges).reshape(shape)


class Plane:
    """An image at one resolution, the pixels that windows are cut from.

    Attributes:
        reader: the open file.
        height: rows.
        width: columns.
        downsample: pixels of level 0 per pixel, (y, x).
        mpp: micrometres per pixel, or None.
    """

    def __init__(
        self, reader: Reader, *, level: int = 0, mpp: float | None = None, source_mpp: float | None = None
    ):
        self.reader = reader
        known = reader.mpp if source_mpp is None else source_mpp
        full = reader.levels[0]
        if mpp is not None:
            if level:
                raise expected("--level", "either --level or --mpp", "both")
            if known is None:
                raise expected(
                    "--mpp", "an image that says its resolution", "none", "Say it with --source-mpp."
                )
            if mpp < known * 0.999:
                raise expected("--mpp", f"at least the image's {known:g} micrometres per pixel", f"{mpp:g}")
            wanted = max(1.0, mpp / known)
            fine = [i for i, v in enumerate(reader.levels) if full.width / v.width <= wanted * 1.001]
            self._level = max(fine, key=lambda i: full.width / reader.levels[i].width)
        else:
            if not 0 <= level < len(reader.levels):
                raise expected("--level", f"a level from 0 to {len(reader.levels) - 1}", level)
            self._level = level
        own = reader.levels[self._level]
        self._ratio = 1.0
        if mpp is not None:
            ratio = wanted * own.width / full.width
            self._ratio = ratio if abs(ratio - 1) > 1e-3 else 1.0
        self.height, self.width = (max(1, int(n / self._ratio + 1e-6)) for n in (own.height, own.width))
        self.downsample = (
            full.height / own.height * self._ratio,
            full.width / own.width * self._ratio,
        )
        self.mpp = None if known is None else known * self.downsample[1]

    def read(self, top: int, left: int, height: int, width: int) -> Region:
        """Read a rectangle; averages over areas of level 0 or the nearest finer level are float32."""
        ratio = self._ratio
        if ratio == 1.0:
            region = self.reader.read(self._level, top, left, height, width)
        else:
            own = self.reader.levels[self._level]
            y0, x0 = int(top * ratio), int(left * ratio)
            y1 = min(own.height, int(np.ceil((top + height) * ratio)))
            x1 = min(own.width, int(np.ceil((left + width) * ratio)))
            fine = self.reader.read(self._level, y0, x0, y1 - y0, x1 - x0)
            pixels, valid = reduce(fine, (y0, x0), (top, left), (height, width), (ratio, ratio))
            region = Region(pixels, valid, fine.faults)
        if region.pixels.dtype.kind == "f":
            finite = np.isfinite(region.pixels).all(axis=2)
            if not finite.all():
                valid = finite if region.valid is None else finite & region.valid
                region = Region(np.where(valid[:, :, None], region.pixels, 0), valid, region.faults)
        return region


def reduce(
    region: Region,
    start: tuple[int, int],
    first: tuple[int, int],
    size: tuple[int, int],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Average the valid pixels under each pixel of a coarser grid; valid where half of them are.

    Args:
        region: pixels of the finer grid.
        start: row and column at which they begin.
        first: row and column of the first pixel of the result.
        size: rows and columns of the result.
        ratio: pixels of the finer grid per pixel of the result, (y, x).
    """
    pixels, valid = region.pixels, region.valid
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        finite = np.isfinite(pixels).all(axis=2)
        valid = finite if valid is None else finite & valid
    if valid is not None:
        pixels = np.where(valid[:, :, None], pixels, 0)

    def average(values: np.ndarray) -> np.ndarray:
        rows = _average(values, start[0], first[0], size[0], ratio[0])
        return _average(rows.swapaxes(0, 1), start[1], first[1], size[1], ratio[1]).swapaxes(0, 1)

    averaged = average(pixels)
    if valid is None:
        return averaged.astype(np.float32), None
    share = average(valid.astype(np.float64)[:, :, None])
    averaged = np.divide(averaged, share, out=np.zeros_like(averaged), where=share > 0)
    return averaged.astype(np.float32), share[:, :, 0] >= 0.5


def thumbnail(
    reader: Reader, longest: int = THUMBNAIL, convert: Callable[[np.ndarray], np.ndarray] | None = None
) -> Region:
    """Return a whole image of at most ``longest`` pixels a side, averaged area by area.

    Args:
        reader: the open image.
        longest: an image that is smaller keeps its size.
        convert: applied to pixels before they are averaged.
    """
    full = reader.levels[0]
    scale = max(1.0, max(full.height, full.width) / longest)
    size = max(1, round(full.height / scale)), max(1, round(full.width / scale))
    level = max(i for i, v in enumerate(reader.levels) if v.height >= size[0] and v.width >= size[1])
    own = reader.levels[level]
    ratio = own.height / size[0], own.width / size[1]
    # Areas about as wide as high, so that few tiles are decoded twice; as wide as the image where tiles are.
    area = max(1, int(AREA_BYTES / (reader.channels * 8 * ratio[0] * ratio[1])))
    across = min(size[1], area, max(math.isqrt(area), math.ceil(own.tile[1] / ratio[1])))
    down = max(1, area // across)
    averaged: np.ndarray | None = None
    valid, faults = np.ones(size, bool), []
    for top in range(0, size[0], down):
        for left in range(0, size[1], across):
            count = min(down, size[0] - top), min(across, size[1] - left)
            y0, x0 = int(top * ratio[0]), int(left * ratio[1])
            y1, x1 = (
                min(n, math.ceil((first + c) * r - 1e-9))
                for n, first, c, r in zip((own.height, own.width), (top, left), count, ratio, strict=True)
            )
            region = reader.read(level, y0, x0, y1 - y0, x1 - x0)
            if convert is not None:
                region = region._replace(pixels=convert(region.pixels))
            pixels, known = reduce(region, (y0, x0), (top, left), count, ratio)
            if averaged is None:
                averaged = np.empty((*size, pixels.shape[2]), np.float32)
            inside = slice(top, top + count[0]), slice(left, left + count[1])
            averaged[inside] = pixels
            if known is not None:
                valid[inside] = known
            faults += region.faults
    return Region(averaged, None if valid.all() else valid, tuple(dict.fromkeys(faults)))


def foreground(source: Reader, mask: str) -> np.ndarray:  # [h, w] bool
    """Return where an image shows something, on a coarse grid over all of it.

    Args:
        source: the image.
        mask: a file that is not zero there, of the image's proportions; or ``"otsu"``: pixels whose saturation lies
            above the threshold that parts a slide's tissue from its glass best, blurred so that pale spots within
            tissue count as well.

    Raises:
        InputError: a mask of other proportions, without foreground, or of an image without colours.
    """
    if mask == "otsu":
        if source.channels != 3:
            raise expected("--mask", "a file for images without colours", "otsu")
        pixels, valid, _ = thumbnail(source)
        most = pixels.max(axis=2)
        saturation = np.divide(most - pixels.min(axis=2), most, out=np.zeros_like(most), where=most > 0)
        saturation = _blurred(saturation)
        known = saturation if valid is None else saturation[valid]
        found = saturation > _otsu(known)
        if valid is not None:
            found &= valid
    else:
        reader = open_reader(mask, (1,))
        ours, theirs = (r.levels[0].width / r.levels[0].height for r in (source, reader))
        if abs(ours / theirs - 1) > 0.02:
            got = f"{reader.levels[0].width} x {reader.levels[0].height}"
            shape = f"{source.levels[0].width} x {source.levels[0].height}"
            raise expected("--mask", f"the image's proportions, {shape}", got)
        pixels, _, _ = thumbnail(reader, 2 * THUMBNAIL, lambda p: (p != 0).any(axis=2, keepdims=True))
        reader.close()
        found = pixels[:, :, 0] >= 0.5
    if not found.any():
        raise expected("--mask", "some foreground", "none")
    return found


def _blurred(values: np.ndarray) -> np.ndarray:  # [h, w]
    """The mean of a square around each pixel."""
    side = 2 * int(max(values.shape) * TISSUE_BLUR / 2) + 1
    square = {"kernel_size": side, "stride": 1, "padding": side // 2, "count_include_pad": False}
    return F.avg_pool2d(torch.from_numpy(values)[None, None], **square)[0, 0].numpy()


def _otsu(values: np.ndarray) -> float:
    """The threshold that splits values from 0 to 1 into two classes of the largest variance between them."""
    counts, edges = np.histogram(values, 256, (0, 1))
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[int(np.nanargmax(np.where(below * above > 0, between, -1))) + 1])
