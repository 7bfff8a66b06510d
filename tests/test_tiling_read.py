from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiling_inputs import pixels, save

from vitup_fast import InputError
from vitup_fast.tiling import read
from vitup_fast.tiling.read import Plane, Region, foreground, open_reader, thumbnail

SIZE = (150, 170)


def check(path, array, level=0, bands=None):
    """Regions of a file are those of an array."""
    reader = open_reader(path, bands)
    array = array.reshape(*array.shape[:2], -1)
    assert (reader.levels[level].height, reader.levels[level].width) == array.shape[:2]
    assert reader.channels == array.shape[2]
    assert reader.dtype == array.dtype
    regions = [(0, 0, *array.shape[:2]), (13, 20, 21, 19), (array.shape[0] - 1, array.shape[1] - 1, 1, 1)]
    for top, left, height, width in regions:
        region = reader.read(level, top, left, height, width)
        np.testing.assert_array_equal(region.pixels, array[top : top + height, left : left + width])
        assert region.faults == ()
    reader.close()
    return reader


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 48)},
        {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
        {"tile": (64, 64), "compression": "lzw", "planarconfig": "separate"},
        {"tile": (16, 16), "compression": "zstd", "bigtiff": True},
        {"tile": (64, 64), "compression": "jpeg2000", "compressionargs": {"level": 0}},
        {},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_tiff(tmp_path, options):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    image, path = pixels(*SIZE), tmp_path / "image.tif"
    options = dict(options)
    bigtiff = options.pop("bigtiff", False)
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as file:
        file.write(
            image.transpose(2, 0, 1) if "planarconfig" in options else image,
            photometric="rgb",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
            **options,
        )
    assert check(path, image).mpp == 0.5


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int16"])
def test_ome_tiff_with_a_pyramid_of_bands(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    image = pixels(*SIZE, channels=5).astype(dtype)
    path = tmp_path / "image.ome.tif"
    planes, half = image.transpose(2, 0, 1), image[::2, ::2].transpose(2, 0, 1)
    with tifffile.TiffWriter(path, ome=True) as file:
        metadata = {"axes": "CYX", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm"}
        options = {"tile": (32, 32), "photometric": "minisblack"}
        file.write(planes, subifds=1, metadata=metadata, **options)
        file.write(half, subfiletype=1, **options)
    assert check(path, image[:, :, [4, 0, 2]], bands=(5, 1, 3)).mpp == 0.25
    check(path, image[::2, ::2, [1]], level=1, bands=(2,))
    with pytest.raises(InputError, match="--bands"):
        open_reader(path)
    with pytest.raises(InputError, match="from 1 to 5"):
        open_reader(path, (6,))
    with pytest.raises(InputError, match="one or three"):
        open_reader(path, (1, 2))


def test_transparency_and_nodata_are_background(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    image, alpha = pixels(*SIZE), np.full(SIZE, 255, np.uint8)
    alpha[:, :30] = 0
    rgba = np.dstack([image, alpha])
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32))
    Image.fromarray(rgba).save(tmp_path / "a.png")
    for name in ("a.tif", "a.png"):
        region = open_reader(tmp_path / name).read(0, 10, 20, 30, 40)
        assert region.pixels.shape == (30, 40, 3)
        np.testing.assert_array_equal(region.valid, np.broadcast_to(np.arange(20, 60) >= 30, (30, 40)))
    grey = image[:, :, 0].astype(np.float32)
    grey[:7] = np.nan
    grey[7:9] = -9999
    tags = [(42113, "s", 0, "-9999", True)]
    tifffile.imwrite(tmp_path / "b.tif", grey, photometric="minisblack", extratags=tags)
    valid = Plane(open_reader(tmp_path / "b.tif")).read(0, 0, *SIZE).valid
    np.testing.assert_array_equal(valid.all(axis=1), np.arange(150) >= 9)
    white = tmp_path / "white.tif"
    tifffile.imwrite(white, image[:, :, 0], photometric="miniswhite")
    np.testing.assert_array_equal(
        open_reader(white).read(0, 0, 0, *SIZE).pixels[:, :, 0], 255 - image[:, :, 0]
    )


def test_zarr_and_numpy(tmp_path):
    zarr = pytest.importorskip("zarr")
    image = pixels(*SIZE)
    check(save(tmp_path / "a.npy", image), image)
    check(save(tmp_path / "b.npy", image[:, :, 1].astype(np.uint16)), image[:, :, 1].astype(np.uint16))
    for name, array in (("c", image), ("d", image.transpose(2, 0, 1)), ("e", image[:, :, 0])):
        chunks = tuple(min(n, 40) for n in array.shape)
        zarr.create_array(str(tmp_path / f"{name}.zarr"), data=np.ascontiguousarray(array), chunks=chunks)
    check(tmp_path / "c.zarr", image)
    check(tmp_path / "d.zarr", image)
    check(tmp_path / "e.zarr", image[:, :, 0])
    group = zarr.open_group(str(tmp_path / "f.zarr"), mode="w")
    five = image.transpose(2, 0, 1)[None, :, None]
    group.create_array("s0", data=np.ascontiguousarray(five), chunks=(1, 1, 1, 64, 64))
    group.create_array("s1", data=np.ascontiguousarray(five[..., ::2, ::2]), chunks=(1, 1, 1, 64, 64))
    axes = [{"name": n} for n in "tcz"] + [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    datasets = [
        {"path": f"s{i}", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1, s, s]}]}
        for i, s in enumerate((0.3, 0.6))
    ]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    assert check(tmp_path / "f.zarr", image).mpp == pytest.approx(0.3)
    check(tmp_path / "f.zarr", image[::2, ::2], level=1)


def test_pictures(tmp_path):
    image = pixels(*SIZE)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert not check(tmp_path / "a.png", image).unit_range
    Image.fromarray(image[:, :, 0].astype(np.uint16) * 200).save(tmp_path / "b.png")
    grey = (image[:, :, 0].astype(np.uint16) * 200).astype(np.float32) / np.float32(65535)
    assert check(tmp_path / "b.png", grey).unit_range


def test_geotiff(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    image, path = pixels(*SIZE, channels=4).astype(np.uint16), tmp_path / "image.tif"
    image[20:40, 30:60] = 0
    transform = rasterio.Affine(10, 0, 500000, 0, -10, 4600000)
    profile = {"driver": "GTiff", "height": 150, "width": 170, "count": 4, "dtype": "uint16", "nodata": 0}
    profile |= {
        "crs": "EPSG:32633",
        "transform": transform,
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(image.transpose(2, 0, 1))
        file.build_overviews([2, 4], rasterio.enums.Resampling.nearest)
    reader = check(path, image[:, :, [3, 2, 1]], bands=(4, 3, 2))
    assert [level[:2] for level in reader.levels] == [(150, 170), (75, 85), (38, 43)]
    assert reader.georeference.transform == tuple(transform)[:6]
    assert "32633" in reader.georeference.crs
    region = open_reader(path, (1,)).read(0, 0, 0, *SIZE)
    np.testing.assert_array_equal(region.valid, image[:, :, 0] > 0)


def write_slide(path, image, mpp=0.25):
    """A pyramid with the marks of an Aperio slide."""
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(path) as file:
        for array in (image, image[::4, ::4]):
            text = f"Aperio Image Library v1\n{array.shape[1]}x{array.shape[0]} |AppMag = 40|MPP = {mpp}"
            file.write(
                array, tile=(64, 64), photometric="rgb", compression="zlib", description=text, metadata=None
            )
    return path


def test_slide(tmp_path):
    pytest.importorskip("openslide")
    image = pixels(256, 320)
    path = write_slide(tmp_path / "image.svs", image)
    reader = check(path, image)
    assert isinstance(reader, read.SlideReader)
    assert reader.mpp == 0.25
    check(path, image[::4, ::4], level=1)
    plane = Plane(open_reader(path), mpp=1)
    assert (plane.height, plane.width, plane.downsample) == (64, 80, (4, 4))
    np.testing.assert_array_equal(plane.read(5, 6, 20, 30).pixels, image[20:100:4, 24:144:4])


def average(image, top, left, height, width, ratio):
    """The mean under each pixel, by summing over a fine grid of all pixels."""
    out = np.zeros((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            y0, y1, x0, x1 = (
                (v + d) * ratio for v, d in ((top + i, 0), (top + i, 1), (left + j, 0), (left + j, 1))
            )
            y, x = np.arange(image.shape[0]), np.arange(image.shape[1])
            wy = np.clip(np.minimum(y + 1, y1) - np.maximum(y, y0), 0, None)
            wx = np.clip(np.minimum(x + 1, x1) - np.maximum(x, x0), 0, None)
            out[i, j] = np.einsum("y,x,yxc->c", wy, wx, image) / (wy.sum() * wx.sum())
    return out


def test_resolution_is_averaged_from_the_nearest_finer_level(tmp_path):
    image = pixels(*SIZE)
    reader = open_reader(save(tmp_path / "a.npy", image))
    with pytest.raises(InputError, match="--source-mpp"):
        Plane(reader, mpp=1)
    with pytest.raises(InputError, match=r"at least the image's 0.4"):
        Plane(reader, mpp=0.3, source_mpp=0.4)
    plane = Plane(reader, mpp=1, source_mpp=0.4)
    assert (plane.height, plane.width, plane.mpp) == (60, 68, pytest.approx(1))
    found = plane.read(11, 7, 20, 30).pixels
    np.testing.assert_allclose(found, average(image, 11, 7, 20, 30, 2.5), rtol=1e-6)
    whole = plane.read(0, 0, 60, 68).pixels
    np.testing.assert_allclose(whole[11:31, 7:37], found, rtol=1e-6)
    valid = np.ones(SIZE, bool)
    valid[:, :9] = False
    pixels_of, known = read.reduce(Region(image, valid), (0, 0), (0, 0), (30, 34), (5, 5))
    np.testing.assert_allclose(
        pixels_of[:, 1], image[:, 9:10].reshape(30, 5, 1, 3).mean(axis=(1, 2)), rtol=1e-6
    )
    np.testing.assert_array_equal(known.all(axis=0), np.arange(34) >= 2)


def test_levels_that_are_not_there(tmp_path):
    reader = open_reader(save(tmp_path / "a.npy", pixels(*SIZE)))
    with pytest.raises(InputError, match="--level"):
        Plane(reader, level=1)


def test_foreground(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "AREA_BYTES", 5000)
    image = np.full((200, 300, 3), 240, np.uint8)
    image[50:150, 100:200] = (180, 90, 160)
    reader = open_reader(save(tmp_path / "a.npy", image))
    truth = np.zeros((200, 300), bool)
    truth[50:150, 100:200] = True
    assert (foreground(reader, "otsu") != truth).sum() <= 4  # the blur takes the corners
    holes = image.copy()
    holes[70:130:4, 120:180:4] = 240
    speckled = foreground(open_reader(save(tmp_path / "speckled.npy", holes)), "otsu")
    assert (speckled != truth).sum() <= 4
    Image.fromarray(truth[::2, ::2].astype(np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(foreground(reader, str(tmp_path / "mask.png")), truth[::2, ::2])
    small = thumbnail(reader, 60).pixels
    assert small.shape == (40, 60, 3)
    np.testing.assert_allclose(small, image.reshape(40, 5, 60, 5, 3).mean(axis=(1, 3)))
    Image.fromarray(truth[:, :50].astype(np.uint8)).save(tmp_path / "other.png")
    with pytest.raises(InputError, match="proportions"):
        foreground(reader, str(tmp_path / "other.png"))
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "empty.png")
    with pytest.raises(InputError, match="some foreground"):
        foreground(reader, str(tmp_path / "empty.png"))


def corrupt(path, kind):
    """Damage one tile of a TIFF in the middle."""
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(path) as file:
        offsets, counts = file.pages[0].dataoffsets, file.pages[0].databytecounts
    data = bytearray(path.read_bytes())
    if kind == "bytes":
        data[offsets[4] : offsets[4] + counts[4]] = bytes(counts[4])
    else:
        del data[offsets[-1] + 3 :]
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["bytes", "truncated"])
def test_broken_tiles_are_named_and_invalid(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    image, path = pixels(*SIZE), tmp_path / "image.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), compression="zlib")
    corrupt(path, kind)
    region = open_reader(path).read(0, 5, 6, 140, 160)
    row, column = (64, 64) if kind == "bytes" else (128, 128)
    (fault,) = region.faults
    assert fault.startswith(f"image.tif: level 0, tile at row {row}, column {column} (")
    truth = np.ones(SIZE, bool)
    truth[row : row + 64, column : column + 64] = False
    truth = truth[5:145, 6:166]
    np.testing.assert_array_equal(region.valid, truth)
    np.testing.assert_array_equal(region.pixels[truth], image[5:145, 6:166][truth])


def test_files_that_are_no_images(tmp_path):
    pytest.importorskip("tifffile")
    (tmp_path / "a.tif").write_bytes(b"II*\x00\xff\xff")
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'")
    whole = save(tmp_path / "c.npy", pixels(20, 30)).read_bytes()
    (tmp_path / "c.npy").write_bytes(whole[:-100])
    (tmp_path / "d.png").write_text("no picture")
    (tmp_path / "e.zarr").mkdir()
    (tmp_path / "f.svs").write_text("no slide")
    np.save(tmp_path / "g.npy", np.zeros((2, 3, 4, 5)))
    np.save(tmp_path / "h.npy", np.zeros((20, 30), complex))
    for name in ("a.tif", "b.npy", "c.npy", "d.png", "e.zarr", "f.svs", "g.npy", "h.npy", "none.tif"):
        with pytest.raises(InputError, match=name) as caught:
            open_reader(tmp_path / name)
        assert "\n" not in str(caught.value)
