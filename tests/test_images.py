from __future__ import annotations

import dataclasses
import struct
import warnings
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitup_fast
from vitup_fast import InputError
from vitup_fast.images import (
    MAX_PANEL,
    MEAN,
    STD,
    feature_picture,
    image_size,
    normalise,
    open_image,
    principal_colours,
    read_image,
    rgb,
)
from vitup_fast.network.backbone import Backbone
from vitup_fast.network.config import ViTUpConfig

TINY = ViTUpConfig.preset("tiny")
DEEP = np.array([[0, 1, 255, 256], [4095, 32768, 65534, 65535]], dtype=np.uint16)


def plain(image: Image.Image) -> np.ndarray:
    """Pixels from 0 to 1, [H, W, 3]."""
    return normalise(image, (0, 0, 0), (1, 1, 1))[0].permute(1, 2, 0).numpy()


def is_grey(pixels: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(pixels, np.repeat(expected[..., None], 3, axis=2), atol=1e-6)


def write_tiff(path: Path, values: np.ndarray, *, kind: int = 1, photometric: int = 1, bits: int = 0) -> Path:
    """Write grey values; kind 1 means unsigned, 2 signed, 3 float; photometric 0 means that zero is white."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    data = values.tobytes()
    entries = {256: width, 257: height, 258: bits or 8 * values.itemsize, 259: 1, 262: photometric, 273: 8}
    entries |= {277: 1, 278: height, 279: len(data), 339: kind}
    header = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8 + len(data))
    table = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries.items())
    path.write_bytes(
        header + data + struct.pack(order + "H", len(entries)) + table + struct.pack(order + "I", 0)
    )
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
def test_images_are_held_upright(tmp_path, kind, orientation):
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :8] = (255, 255, 255)  # upper left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(kind, {})
    path = tmp_path / f"photo.{kind}"
    Image.fromarray(corner).save(path, exif=exif, **options)
    # Row 0 and column 0 as stored are which sides of the upright image (TIFF 6.0, Orientation)?
    row, column = (
        ("top", "left"),
        ("top", "right"),
        ("bottom", "right"),
        ("bottom", "left"),
        ("left", "top"),
        ("right", "top"),
        ("right", "bottom"),
        ("left", "bottom"),
    )[orientation - 1]
    upright = np.zeros((32, 16) if orientation > 4 else (16, 32))
    rows, columns = slice(0, 8), slice(0, 8)
    if "bottom" in (row, column):
        rows = slice(-8, None)
    if "right" in (row, column):
        columns = slice(-8, None)
    upright[rows, columns] = 1
    with Image.open(path) as image:
        for pixels in (plain(image), plain(open_image(path)), np.asarray(read_image(path)) / 255):
            np.testing.assert_allclose(pixels, np.repeat(upright[..., None], 3, axis=2), atol=0.02)
    assert image_size(path) == upright.shape


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "jp2"])
def test_grey_of_16_bits_in_files(tmp_path, kind):
    path = tmp_path / f"deep.{kind}"
    Image.fromarray(DEEP).save(path)
    with Image.open(path) as image:
        is_grey(plain(image), DEEP / 65535)
    is_grey(plain(open_image(path)), DEEP / 65535)
    shown = np.asarray(read_image(path))
    assert shown.dtype == np.uint8
    assert np.abs(shown[..., 0] - DEEP / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_grey_of_16_bits_in_memory(mode):
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (4, 2), DEEP.astype(order).tobytes())
    is_grey(plain(image), DEEP / 65535)


@pytest.mark.parametrize(
    ("dtype", "kind", "photometric"),
    [("<u2", 1, 1), (">u2", 1, 1), ("<u2", 1, 0), ("<f4", 3, 1), (">f4", 3, 1), ("<f4", 3, 0)],
)
def test_grey_tiff(tmp_path, dtype, kind, photometric):
    values = DEEP / 65535 if "f" in dtype else DEEP
    path = write_tiff(tmp_path / "grey.tif", values.astype(dtype), kind=kind, photometric=photometric)
    exact = DEEP / 65535 if photometric else 1 - DEEP / 65535
    is_grey(plain(open_image(path)), exact)
    with Image.open(path) as image:
        is_grey(plain(image), exact)


def test_grey_tiff_of_12_bits(tmp_path):
    path = write_tiff(
        tmp_path / "grey.tif", np.frombuffer(b"\xff\xf0\x00\x80\x0f\xff", np.uint8)[None], bits=12
    )
    data = path.read_bytes().replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))
    path.write_bytes(data)
    is_grey(plain(open_image(path)), np.array([[4095, 0, 0x800, 0xFFF]]) / 4095)


@pytest.mark.parametrize(
    ("dtype", "kind", "message"),
    [
        ("<u4", 1, "known range"),
        ("<i4", 2, "known range"),
        (">i4", 2, "known range"),
        ("<i2", 2, "known range"),
        ("<f4", 3, "float pixels from 0 to 1, got values from 0 to 65535"),
    ],
)
def test_values_without_a_range_are_refused(tmp_path, dtype, kind, message):
    path = write_tiff(tmp_path / "grey.tif", DEEP.astype(dtype), kind=kind)
    for read in (open_image, read_image, lambda p: normalise(Image.open(p))):
        with pytest.raises(InputError, match=rf"grey\.tif: expected .*{message}"):
            read(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_float_pixels_out_of_range_are_refused(value):
    pixels = np.full((3, 4), 0.5, np.float32)
    pixels[1, 2] = value
    with pytest.raises(InputError, match="float pixels from 0 to 1"):
        normalise(Image.fromarray(pixels))


COLOURLESS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")


@pytest.mark.parametrize("mode", [*COLOURLESS, "RGBA", "LA", "PA", "RGBa", "La", "I;16", "F"])
@pytest.mark.parametrize("white", [False, True])
def test_black_and_white_of_every_mode(mode, white):
    scale = {"I;16": 65535, "F": 1.0}.get(mode)
    if scale:
        image = Image.new(mode, (3, 2), scale * white)
    else:
        image = Image.new("RGB", (3, 2), "white" if white else "black")
        for step in {"PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa"), "La": ("LA", "La")}.get(mode, (mode,)):
            image = image.convert(step)
    assert image.mode == mode
    np.testing.assert_allclose(plain(image), float(white), atol=0.01)
    assert (np.asarray(rgb(image)) == 255 * white).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La", "P", "1", "L", "RGB", "I;16"])
def test_colours_under_transparency_do_not_show(tmp_path, mode):
    hidden = np.array([[10, 200]], np.uint8)  # two greys, the first of them transparent
    if mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = Image.fromarray(hidden).convert({"L": "L", "P": "P"}.get(mode[0], "RGB"))
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        image = image.convert(mode)
        bright = 200 / 255
    else:
        image = {
            "1": Image.fromarray(np.array([[False, True]])),
            "I;16": Image.fromarray(hidden.astype(np.uint16)),
        }.get(mode, Image.fromarray(hidden))
        image = image if image.mode == mode else image.convert(mode)
        colour = image.getpixel((0, 0))
        image.save(tmp_path / "image.png", transparency=colour)
        image = Image.open(tmp_path / "image.png")
        bright = {"1": 1.0, "I;16": 200 / 65535}.get(mode, 200 / 255)
    assert image.mode == mode
    np.testing.assert_allclose(plain(image)[0], [[1.0] * 3, [bright] * 3], atol=1e-6)
    np.testing.assert_allclose(np.asarray(rgb(image))[0, 0], 255)


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    np.testing.assert_allclose(plain(image)[0, 0], (1, 127 / 255, 127 / 255), atol=0.5 / 255)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_further_pages_are_mentioned(tmp_path, kind):
    path = tmp_path / f"pages.{kind}"
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=rf"pages\.{kind}: holds 3 pages or frames; the first is used"):
        first = open_image(path)
    np.testing.assert_allclose(plain(first)[0, 0], (1, 0, 0), atol=0.05)
    with Image.open(path) as image:
        with pytest.warns(UserWarning, match="3 pages or frames"):
            normalise(image)
        image.seek(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # chosen by hand
            np.testing.assert_allclose(plain(image)[0, 0], (0, 0, 1), atol=0.05)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels_are_refused(size):
    with pytest.raises(InputError, match="expected at least one pixel"):
        normalise(Image.new("RGB", size))


def test_broken_images_in_memory_are_refused(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    closed = Image.open(path)
    closed.close()
    with pytest.raises(InputError, match=r"image\.png: cannot be read as an image"):
        normalise(closed)
    path.write_bytes(path.read_bytes()[:5000])
    for read in (open_image, lambda p: normalise(Image.open(p))):
        with pytest.raises(InputError, match=r"image\.png: cannot be read as an image \(.*truncated"):
            read(path)
    with pytest.raises(InputError, match="cannot be read as an image"):
        open_image("a\0b.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "gif", "webp", "bmp", "pgm", "jp2", "tga", "ico"])
def test_damaged_files_are_refused_or_read(tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    sound = path.read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(25):
        damaged = bytearray(sound)
        for place in generator.integers(0, min(len(damaged), 200), 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged[: generator.integers(1, len(damaged) + 1)])
        for read in (image_size, open_image):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with suppress(InputError):
                    read(path)


def test_size_limit(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (10, 10)).save(path)
    for read in (image_size, open_image, read_image):
        read(path, np.int64(100))
        with pytest.raises(InputError, match="expected at most 99 pixels, got 10 x 10"):
            read(path, np.int64(99))


@pytest.fixture
def backbone():
    return Backbone.create(TINY)


def test_a_backbone_says_how_its_images_are_normalised(backbone):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = vitup_fast.upsampler.Upsampler(vitup_fast.ViTUp(TINY), backbone)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for cfg in ({"mean": mean, "std": std}, {"mean": list(mean), "std": std}):
        backbone.model.pretrained_cfg = cfg
        assert (backbone.mean, backbone.std) == (mean, std)
    coords = torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(picture, coords), model(normalise(picture, mean, std), coords))
        assert not torch.allclose(model(picture, coords), model(normalise(picture), coords))
    for cfg in ({}, None, {"mean": None, "std": None}):
        backbone.model.pretrained_cfg = cfg
        assert (backbone.mean, backbone.std) == (MEAN, STD)
    for cfg, name in product(((0.5,), (0.1, np.nan, 0.1), (0.5,) * 4), ("mean", "std")):
        backbone.model.pretrained_cfg = {name: cfg}
        with pytest.raises(InputError, match=f"pretrained_cfg.*{name}.*expected three numbers"):
            getattr(backbone, name)
    backbone.model.pretrained_cfg = {"std": (0.1, 0, 0.1)}
    with pytest.raises(InputError, match="deviations above zero"):
        _ = backbone.std


@pytest.mark.parametrize("channels", [1, 4])
def test_backbones_of_other_channels_take_no_pictures(channels):
    config = dataclasses.replace(TINY, backbone_options=(*TINY.backbone_options, ("in_chans", channels)))
    model = vitup_fast.upsampler.Upsampler(vitup_fast.ViTUp(config), Backbone.create(config))
    with pytest.raises(InputError, match=f"the {channels} channels of this backbone, got an RGB picture"):
        model.set_images(Image.new("RGB", (20, 20)))
    model.set_images(torch.zeros(1, channels, 20, 20))


def test_turned_images_have_upright_features(tmp_path, backbone):
    model = vitup_fast.upsampler.Upsampler(vitup_fast.ViTUp(TINY), backbone)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    with torch.no_grad(), Image.open(tmp_path / "photo.png") as image:
        features = model.dense(image)
        upright = model.dense(Image.fromarray(np.rot90(pixels, -1)))
    assert features.shape[1:3] == (10, 6)
    torch.testing.assert_close(features, upright)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_does_not_matter(dtype):
    pictures = [
        Image.fromarray(DEEP),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)),
    ]
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    before = [normalise(picture) for picture in pictures], principal_colours(features)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            after = [normalise(picture) for picture in pictures], principal_colours(features)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (2500, 300), (7, 5)])  # width, height
def test_panels_are_bounded(size):
    image = Image.new("RGB", size)
    tokens, features = torch.randn(2, 3, 8), torch.randn(6, 9, 8)
    picture = feature_picture(image, tokens, features)
    assert picture.width <= 4 * MAX_PANEL + 100
    assert picture.height <= MAX_PANEL + 100
    features = torch.randn(1, 5000, 8)
    assert feature_picture(image, tokens, features).height <= MAX_PANEL + 100


def test_panels_show_projected_features():
    generator = torch.Generator().manual_seed(0)
    tokens, features = (torch.randn(h, w, 8, generator=generator) for h, w in ((2, 3), (160, 240)))
    picture = np.asarray(feature_picture(Image.new("RGB", (240, 160), "red"), tokens, features))
    panels = [picture[22:, left : left + 240] for left in (0, 246, 492, 738)]
    mean, components, low, high = principal_colours(tokens.reshape(-1, 8))
    enlarged = torch.nn.functional.interpolate(tokens.permute(2, 0, 1)[None], (160, 240), mode="bilinear")
    coarse = tokens.repeat_interleave(80, 0).repeat_interleave(80, 1)
    assert (panels[0] == (255, 0, 0)).all()
    for panel, shown in zip(panels[1:], (coarse, enlarged[0].permute(1, 2, 0), features), strict=True):
        exact = 255 * (((shown.double() - mean) @ components - low) / (high - low)).clamp(0, 1)
        assert (torch.from_numpy(panel.copy()) - exact).abs().max() <= 0.51


def test_features_that_are_not_finite_have_no_picture():
    with pytest.raises(InputError, match="features: expected finite numbers"):
        principal_colours(torch.full((5, 8), torch.nan))


def test_colours_are_reproducible_and_shared():
    features = torch.randn(500, 16, generator=torch.Generator().manual_seed(2))
    first, second = principal_colours(features), principal_colours(features.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, components, low, high = first
    torch.testing.assert_close(components.T @ components, torch.eye(3, dtype=torch.float64))
    assert (low < high).all()
    few = principal_colours(torch.randn(2, 16))  # fewer samples than components
    assert few[1].shape == (16, 3)
    picture = feature_picture(
        Image.new("RGB", (30, 20)), features[:6].view(2, 3, 16), features[:60].view(6, 10, 16)
    )
    assert picture.size[1] > 160
