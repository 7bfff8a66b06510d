"""Results are opened by the libraries that QuPath, QGIS and napari use."""

from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_tiling_read import write_slide
from tiling_inputs import WINDOW, make_head, make_model, pixels, save

from vitup_fast import InputError, tiling
from vitup_fast.tiling import plan, report, write
from vitup_fast.tiling.answers import Product

zarr = pytest.importorskip("zarr")
SIZE = (90, 110)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def start(model, monkeypatch):
    """Start a run in small blocks and with small pyramids."""
    monkeypatch.setattr(plan, "BLOCK_STEPS", 3)
    monkeypatch.setattr(write, "SMALLEST_LEVEL", 16)
    monkeypatch.setattr(write, "TILE", 16)

    def start(source, output, **changes):
        arguments = {"head": make_head(), "stride": 2, "window": WINDOW}
        return tiling.upsample(source, output, model, **arguments | changes)

    return start


@pytest.fixture
def image(tmp_path):
    return save(tmp_path / "image.npy", pixels(*SIZE))


def test_ome_zarr(start, image, tmp_path):
    io, reader = pytest.importorskip("ome_zarr.io"), pytest.importorskip("ome_zarr.reader")
    out = start(image, tmp_path / "out", labels=True, scores=True, source_mpp=0.5).outputs
    for name, lead in (("labels", ()), ("scores", (5,))):
        (node,) = reader.Reader(io.parse_url(out[name]))()
        shapes = [(*lead, 45, 55), (*lead, 23, 28), (*lead, 12, 14)]
        assert [d.shape for d in node.data] == shapes
        transforms = node.metadata["coordinateTransformations"]
        for level, (scale, shift) in enumerate(transforms):
            pitch = 2 * 2**level * 0.5
            assert scale["scale"][-2:] == [pitch, pitch]
            # Pixel 0 of level 0 is centred on 0.
            assert shift["translation"][-2:] == [pitch / 2 - 0.25] * 2
        axes = node.metadata["axes"]
        assert axes[-1] == {"name": "x", "type": "space", "unit": "micrometer"}
    array = zarr.open_array(str(out["labels"] / "0"))
    assert array.shards == (24, 24)
    assert (
        json.loads((out["labels"] / "zarr.json").read_text())["attributes"]["vitup_fast"]["settings"][
            "window step"
        ]
        == 16
    )
    four = np.asarray(zarr.open_array(str(out["scores"] / "0"))[:, :44, :54]).reshape(5, 22, 2, 27, 2)
    half = zarr.open_array(str(out["scores"] / "1"))[:, :22, :27]
    np.testing.assert_allclose(half, four.mean(axis=(2, 4)), rtol=1e-5, atol=1e-6)


def test_labels_are_halved_by_the_most_frequent():
    product = Product("labels", None, "uint8", 255)
    four = np.array([[1, 2, 3, 3, 7], [2, 2, 4, 3, 255], [5, 6, 9, 9, 1]], np.uint8)
    np.testing.assert_array_equal(write.halve(four, product), [[2, 3, 7], [5, 9, 1]])
    product = Product("scores", 1, "float32", float("nan"))
    scores = np.array([[[1, np.nan, np.nan], [2, np.nan, np.nan]]], np.float32)
    np.testing.assert_array_equal(write.halve(scores, product), [[[1.5, np.nan]]])


def test_ome_tiff(start, image, tmp_path):
    tifffile, openslide = pytest.importorskip("tifffile"), pytest.importorskip("openslide")
    arguments = {"labels": True, "scores": True, "pca": 3, "source_mpp": 0.5}
    truth = start(image, tmp_path / "zarr", **arguments).outputs
    out = start(image, tmp_path / "out", format=".ome.tif", **arguments).outputs
    assert not (tmp_path / "out" / "blocks").exists()
    for name in ("labels", "scores", "pca"):
        with tifffile.TiffFile(out[name]) as file:
            series = file.series[0]
            assert file.is_ome
            assert file.is_bigtiff
            assert series.axes == {"labels": "YX", "scores": "CYX", "pca": "YXS"}[name]
            assert len(series.levels) == 3
            for level in range(3):
                expected = zarr.open_array(str(truth[name] / str(level)))[:]
                expected = expected.transpose(1, 2, 0) if name == "pca" else expected
                np.testing.assert_array_equal(series.levels[level].asarray(), expected)
            assert 'PhysicalSizeX="1.0"' in file.ome_metadata
    for name in ("labels", "pca"):
        with openslide.OpenSlide(out[name]) as slide:
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(1)
            assert slide.dimensions == (55, 45)
            shown = np.asarray(slide.read_region((0, 0), 0, (55, 45)).convert("RGB"))
        expected = zarr.open_array(str(truth[name] / "0"))[:]
        expected = (
            expected.transpose(1, 2, 0) if name == "pca" else np.repeat(expected[:, :, None], 3, axis=2)
        )
        np.testing.assert_array_equal(shown, expected)
    # An OME-TIFF that this library wrote is an input as any other.
    assert tiling.open_reader(out["labels"]).mpp == pytest.approx(1)


def test_cog_lies_on_its_input(start, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    array = pixels(*SIZE)
    array[60:, 70:] = 0
    transform = rasterio.Affine.translation(431000, 5290000) * rasterio.Affine.rotation(12)
    transform *= rasterio.Affine.scale(0.3, -0.3)
    profile = {"driver": "GTiff", "height": 90, "width": 110, "count": 3, "dtype": "uint8", "nodata": 0}
    source = tmp_path / "field.tif"
    with rasterio.open(source, "w", crs="EPSG:32632", transform=transform, **profile) as file:
        file.write(array.transpose(2, 0, 1))
    out = start(source, tmp_path / "labels.tif", labels=True).outputs["labels"]
    assert out == tmp_path / "labels.tif"
    scores = start(source, tmp_path / "scores.tif", scores=True).outputs["scores"]
    truth = start(source, tmp_path / "zarr", labels=True, scores=True).outputs
    with rasterio.open(out) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.crs.to_epsg() == 32632
        assert file.nodata == 255
        labels = file.read(1)
        np.testing.assert_array_equal(labels, zarr.open_array(str(truth["labels"] / "0"))[:])
        background = (array[1::2, 1::2] == 0).all(axis=2)
        np.testing.assert_array_equal(labels == 255, background)
        for i, j in ((0, 0), (44, 54), (31, 7)):
            here = ~transform * file.xy(i, j)
            np.testing.assert_allclose(here, (2 * j + 1, 2 * i + 1), atol=0.01)
    with rasterio.open(scores) as file:
        assert file.count == 5
        assert np.isnan(file.nodata)
        np.testing.assert_array_equal(file.read(), zarr.open_array(str(truth["scores"] / "0"))[:])
    attributes = zarr.open_group(str(truth["labels"]), mode="r").attrs["vitup_fast"]
    coarse = transform * rasterio.Affine.scale(2)
    np.testing.assert_allclose(attributes["transform"], tuple(coarse)[:6])


def test_large_cogs_have_overviews(start, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    source = save(tmp_path / "image.npy", pixels(40, 300))
    out = start(source, tmp_path / "labels.tif", labels=True, stride="1/2").outputs["labels"]
    with rasterio.open(out) as file:
        assert (file.height, file.width) == (80, 600)
        assert file.overviews(1) == [2]


def test_a_slide_at_a_resolution_and_a_mask(start, tmp_path):
    pytest.importorskip("openslide")
    array = np.full((512, 640, 3), 240, np.uint8)
    array[120:360, 100:300] = pixels(240, 200)
    slide = write_slide(tmp_path / "slide.svs", array)
    whole = start(slide, tmp_path / "whole.zarr", labels=True, mpp=1)
    estimates = []
    options = {"labels": True, "mpp": 1, "mask": "otsu", "announce": estimates.append}
    summary = start(slide, tmp_path / "labels.zarr", **options)
    assert summary.windows < whole.windows / 2
    # The mask alone says what is background here.
    assert estimates[0].windows == summary.windows
    array = zarr.open_array(str(summary.outputs["labels"] / "0"))
    assert array.shape == (64, 80)
    attributes = zarr.open_group(str(summary.outputs["labels"]), mode="r").attrs["ome"]
    scale, shift = attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [2, 2]  # micrometres: 8 pixels of level 0
    assert shift["translation"] == [0.875, 0.875]
    labels, all_of_it = array[:], zarr.open_array(str(whole.outputs["labels"] / "0"))[:]
    tissue = np.zeros((64, 80), bool)
    tissue[15:45, 12:37] = True
    known = labels != 255
    assert (known & ~tissue).sum() <= 4
    assert (known | ~tissue).mean() > 0.97
    deep = np.zeros_like(tissue)
    deep[19:41, 17:33] = True
    assert (labels[known & deep] == all_of_it[known & deep]).mean() > 0.8


def test_broken_tiles_are_left_out_and_reported(start, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels(*SIZE), photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[3]
    data = bytearray(path.read_bytes())
    data[offset : offset + 50] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"tile at row 64, column 64 .*--strict"):
        start(path, tmp_path / "strict", labels=True, strict=True)
    summary = start(path, tmp_path / "out", labels=True)
    assert len(summary.faults) == 1
    labels = zarr.open_array(str(summary.outputs["labels"] / "0"))[:]
    lost = np.zeros((45, 55), bool)
    lost[32:, 32:] = True
    np.testing.assert_array_equal(labels == 255, lost)
    assert start(path, tmp_path / "out", labels=True).faults == summary.faults


def test_deep_pixels_need_a_scale(start, tmp_path):
    image = pixels(*SIZE).astype(np.uint16) * 16 + 100
    path = save(tmp_path / "image.npy", image)
    with pytest.raises(InputError, match="--scale"):
        start(path, tmp_path / "out", scores=True)
    assert not (tmp_path / "out").exists()
    deep = start(path, tmp_path / "deep.zarr", scores=True, scale=(100, 255 * 16 + 100)).outputs["scores"]
    plain = save(tmp_path / "plain.npy", pixels(*SIZE))
    bytes_ = start(plain, tmp_path / "bytes.zarr", scores=True).outputs["scores"]
    found, expected = (zarr.open_array(str(p / "0"))[:] for p in (deep, bytes_))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_basis_is_reused(start, image, tmp_path):
    start(image, tmp_path / "first", pca=4, head=None)
    basis = tmp_path / "first" / "pca.safetensors"
    again = start(image, tmp_path / "again.zarr", pca=basis, head=None).outputs["pca"]
    expected = zarr.open_array(str(tmp_path / "first" / "pca.ome.zarr" / "0"))[:]
    np.testing.assert_array_equal(zarr.open_array(str(again / "0"))[:], expected)
    assert expected.min() == 1
    assert expected.max() == 255


def test_the_report_shows_input_and_answers(start, image, tmp_path):
    start(image, tmp_path / "out", labels=True, pca=3)
    with Image.open(tmp_path / "out" / "report.png") as report:
        shown = np.asarray(report.convert("RGB"))
    assert shown.shape[1] > 3 * 500
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 500


def test_the_report_looks_at_a_border_with_answers_around():
    grid = plan.Grid(500, 700, WINDOW, 0.5, Fraction(1), 100, 100)
    known = np.zeros((500, 700), bool)
    known[50:120, 400:600] = True
    row, column = report._border(grid, known)
    assert row in [s.start for s in grid.rows]
    assert column in [s.start for s in grid.columns]
    assert 50 + WINDOW / 2 <= row <= 120 - WINDOW / 2
    assert 400 + WINDOW / 2 <= column <= 450  # the nearest to the middle
    assert report._border(grid, np.ones((500, 700), bool)) == (256, 352)


def test_what_cannot_be_written_is_refused_before_anything_is(start, image, tmp_path, monkeypatch):
    cases = [
        ("out", {}, "at least one of labels"),
        ("out", {"labels": True, "head": None}, "--head"),
        ("out", {"features": "int8", "format": ".tif"}, "zarr"),
        ("out", {"labels": True, "format": ".jpg"}, "--format"),
        ("out.tif", {"labels": True, "scores": True}, "a folder for several results"),
        ("out", {"labels": True, "stride": 0}, "--stride"),
        ("out", {"labels": True, "stride": "a"}, "--stride"),
        ("out", {"labels": True, "stride": 181}, "--stride"),
        ("out", {"labels": True, "overlap": 1}, "--overlap"),
        ("out", {"labels": True, "window": 3}, "--window"),
        ("out", {"labels": True, "batch": 0}, "--batch"),
        ("out", {"labels": True, "workers": 0}, "--workers"),
        ("out", {"labels": True, "shard": (3, 2)}, "--shard"),
        ("out", {"labels": True, "max_memory": 1000}, "--max-memory"),
        ("out", {"labels": True, "mpp": 1}, "--source-mpp"),
        ("out", {"pca": 65}, "--pca"),
        ("out", {"features": "float8"}, "--features"),
        ("out", {"similar": image}, "vectors of shape"),
    ]
    for name, changes, message in cases:
        changes = (
            {"head": None, **changes} if "labels" not in changes and "scores" not in changes else changes
        )
        with pytest.raises(InputError, match=message):
            start(image, tmp_path / name, **changes)
    np.savez(tmp_path / "head.npz", weight=np.zeros((3, 5), np.float32))
    with pytest.raises(InputError, match=r"head.npz.*\(C, 64\)"):
        start(image, tmp_path / "out", labels=True, head=tmp_path / "head.npz")
    np.savez(tmp_path / "other.npz", w=np.zeros((3, 5), np.float32))
    with pytest.raises(InputError, match="named weight"):
        start(image, tmp_path / "out", labels=True, head=tmp_path / "other.npz")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="free space"):
        start(image, tmp_path / "out.zarr", labels=True)
    assert not [p for p in tmp_path.glob("out*") if p.is_file()]


def test_a_full_disk_stops_and_goes_on(start, image, tmp_path, monkeypatch):
    truth = start(image, tmp_path / "whole.zarr", scores=True).outputs["scores"]
    calls = iter(range(100))
    function = write.Store.write

    def full(*arguments):
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        function(*arguments)

    monkeypatch.setattr(write.Store, "write", full)
    with pytest.raises(InputError, match=r"No space left on device.*goes on"):
        start(image, tmp_path / "out.zarr", scores=True)
    monkeypatch.setattr(write.Store, "write", function)
    out = start(image, tmp_path / "out.zarr", scores=True).outputs["scores"]
    np.testing.assert_array_equal(zarr.open_array(str(out / "0"))[:], zarr.open_array(str(truth / "0"))[:])
